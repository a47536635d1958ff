"""A lasting process for one side on one ComfyUI tree, so that several releases can take turns."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.encode_processes import Bench, outcome
from benchmarks.encode_report import progress
from benchmarks.encode_trees import Tree, TreeFailed
from latent_encoder.process_memory import peak_bytes
from tests.helpers import PROJECT, clean_environment


class Peer:
    """A process that has loaded a VAE on a tree for one side, and encodes on request. It is a context manager."""

    def __init__(self, bench: Bench, tree: Tree, side: str, vae: str) -> None:
        """Start the process and wait until the VAE is loaded.

        Raises:
            TreeFailed: the process ended before that, or took longer than the time limit.
        """
        progress(f"loading {vae} on ComfyUI {tree.release} for {side}")
        self.tree, self.side = tree, side
        self._timeout_s = bench.timeout_s
        self._errors = tempfile.TemporaryFile("w+", dir=bench.folder, encoding="utf-8", errors="replace")  # noqa: SIM115
        script = PROJECT / "benchmarks" / "encode_release_process.py"
        self._process = subprocess.Popen(  # noqa: S603  # nothing here comes from outside
            [sys.executable, str(script), side, str(tree.path), str(bench.model_dir), vae],
            cwd=bench.folder,
            env=clean_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self.encoder = str(self._result())
        except TreeFailed:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def peak_bytes(self) -> int:
        """The peak of the process's resident memory so far."""
        return peak_bytes(self.pid)

    def encode(self, pixels_file: Path, latent_file: Path) -> float:
        """Encode the pixels of a file `[1, height, width, 3]`, write the latent, and return the seconds of the encode alone.

        Raises:
            TreeFailed: the process ended meanwhile, or took longer than the time limit.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(pixels_file), str(latent_file)]) + "\n")
        self._process.stdin.flush()
        return float(self._result())

    def _result(self) -> Any:
        assert self._process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self._timeout_s, end)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            raise TreeFailed(self.tree, self.side, outcome(status, self._errors.read(), timed_out=late.is_set()))
        return json.loads(line)

    def close(self) -> None:
        """End the process and wait for it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
