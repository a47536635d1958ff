"""Encodes that begin when a test lets them: no test has to assume that an encode takes long.

    python -m tests.held_encodes GATE_FOLDER STAGE [OPTIONS OF main.py]

The command runs `main.py` with its encodes held, or with `STAGE` another stage: a method of `LatentEncoder`. The stage is the
real one; only its beginning is delayed.
"""

from __future__ import annotations

import runpy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service import LatentEncoder
from tests.helpers import PATIENCE_S, PROJECT

POLL_S = 0.05


@dataclass(frozen=True)
class Gate:
    """A gate before each encode, shared between processes by files in a folder. It is closed at first."""

    folder: Path
    stage: str = "encode_prepared"

    @property
    def _begun(self) -> Path:
        return self.folder / "begun"

    @property
    def _ended(self) -> Path:
        return self.folder / "ended"

    @property
    def _open(self) -> Path:
        return self.folder / "open"

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Hold the encodes of this process."""
        run, begun, is_open, ended = getattr(LatentEncoder, self.stage), self._begun, self._open, self._ended

        def held(self: LatentEncoder, work: Any) -> Any:
            begun.touch()
            while not is_open.exists():
                time.sleep(POLL_S)
            try:
                return run(self, work)
            finally:
                ended.touch()

        setattr(LatentEncoder, self.stage, held)
        try:
            yield
        finally:
            self.open()
            setattr(LatentEncoder, self.stage, run)

    def wait(self) -> None:
        """Wait until an encode is held."""
        self._wait_for(self._begun)

    def wait_for_end(self) -> None:
        """Wait until an encode that was held has ended, with a result or not."""
        self._wait_for(self._ended)

    def _wait_for(self, file: Path) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not file.exists():
            assert time.monotonic() < deadline, f"no {self.stage} has {file.name}"
            time.sleep(POLL_S)

    def open(self) -> None:
        """Let the encodes begin."""
        self._open.touch()


if __name__ == "__main__":
    _, folder, stage, *arguments = sys.argv
    sys.argv = [str(PROJECT / "main.py"), *arguments]
    with Gate(Path(folder), stage).holding():
        runpy.run_path(sys.argv[0], run_name="__main__")
