"""The processes of the GPU check, each with one side on one tree, as objects that run commands."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.encode_report import progress
from config import VARIABLES

PROJECT = Path(__file__).resolve().parent.parent
COMFYUI, OURS, DIFFUSERS = "ComfyUI", "ours", "diffusers"


class PeerFailed(Exception):
    """A side cannot do what it was told; the text has the reason."""


class Peer:
    """A process of one side. It starts at once, and is waited for at its first command."""

    def __init__(self, side: str, release: str, arguments: list[str], folder: Path) -> None:
        """`arguments` are those of `gpu_check_process.py` after the side."""
        self.side, self.release = side, release
        self._errors = tempfile.TemporaryFile("w+", dir=folder, encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(  # noqa: S603  # nothing here comes from outside
            [sys.executable, str(PROJECT / "benchmarks" / "gpu_check_process.py"), side, *arguments],
            cwd=folder,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.facts: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """The name in tables."""
        return f"ComfyUI {self.release}" if self.side == COMFYUI else self.side

    def wait(self, timeout_s: float) -> dict[str, Any]:
        """Wait until the side is loaded, and return the facts about its device.

        Raises:
            PeerFailed: it ended, or took longer than the time limit.
        """
        if not self.facts:
            self.facts = self._result(timeout_s)
        return self.facts

    def run(self, command: str, timeout_s: float, **options: Any) -> Any:
        """Run a command and return its result.

        Raises:
            PeerFailed: the command failed, the process ended, or it took longer than the time limit, which ends it.
        """
        progress(f"{self.name}: {command} {options.get('precision') or options.get('kind') or ''}")
        start = time.monotonic()
        self.wait(timeout_s)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, **options}) + "\n")
            self._process.stdin.flush()
        except OSError as exc:
            raise PeerFailed(self._end()) from exc
        result = self._result(max(1.0, timeout_s - (time.monotonic() - start)))
        if isinstance(result, dict) and "error" in result:
            raise PeerFailed(result["error"])
        return result

    def _result(self, timeout_s: float) -> Any:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            self._process.kill()
            raise PeerFailed(f"not done after {timeout_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise PeerFailed(self._end())
        return json.loads(line)

    def _end(self) -> str:
        """Return how the process ended, with the last line that it wrote."""
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or [""]
        return f"its process ended with status {status}: {lines[-1][:300]}"

    def close(self) -> None:
        """End the process and wait for it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            stream.close()


def environment() -> dict[str, str]:
    """Return the environment without the service's settings."""
    settings = {name.upper() for name in VARIABLES}
    return {name: value for name, value in os.environ.items() if name not in settings}
