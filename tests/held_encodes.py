"""Encodes that begin when a test lets them: no test has to assume that an encode takes long.

    python -m tests.held_encodes GATE_FOLDER [OPTIONS OF main.py]

The command runs `main.py` with its encodes held. The encode is the real one; only its beginning is delayed.
"""

from __future__ import annotations

import runpy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from latent_encoder.outputs.encoded import Encoded, Prepared
from service import LatentEncoder
from tests.helpers import PATIENCE_S, PROJECT

POLL_S = 0.05


@dataclass(frozen=True)
class Gate:
    """A gate before each encode, shared between processes by files in a folder. It is closed at first."""

    folder: Path

    @property
    def _begun(self) -> Path:
        return self.folder / "begun"

    @property
    def _open(self) -> Path:
        return self.folder / "open"

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Hold the encodes of this process."""
        encode, begun, is_open = LatentEncoder.encode_prepared, self._begun, self._open

        def held(self: LatentEncoder, prepared: Prepared) -> Encoded:
            begun.touch()
            while not is_open.exists():
                time.sleep(POLL_S)
            return encode(self, prepared)

        LatentEncoder.encode_prepared = held  # type: ignore[method-assign]
        try:
            yield
        finally:
            self.open()
            LatentEncoder.encode_prepared = encode  # type: ignore[method-assign]

    def wait(self) -> None:
        """Wait until an encode is held."""
        deadline = time.monotonic() + PATIENCE_S
        while not self._begun.exists():
            assert time.monotonic() < deadline, "no encode has begun"
            time.sleep(POLL_S)

    def open(self) -> None:
        """Let the encodes begin."""
        self._open.touch()


if __name__ == "__main__":
    _, folder, *arguments = sys.argv
    sys.argv = [str(PROJECT / "main.py"), *arguments]
    with Gate(Path(folder)).holding():
        runpy.run_path(sys.argv[0], run_name="__main__")
