"""A process, a broker's or a worker's, that never outlives the process that started it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from tests.broker.interface import BrokerError

SUPERVISOR = Path(__file__).with_name("supervisor.py")
STOP_TIMEOUT = 30
LOG_TAIL = 3000


class Process:
    """A command whose output goes to the end of a file."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> None:
        """Start the command, by default with the environment and the working folder of this process."""
        self.log = log
        with log.open("ab") as output:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", SUPERVISOR, *command],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,
                start_new_session=True,  # Ctrl-C reaches only this process, which stops the broker when nothing needs it
            )

    @property
    def status(self) -> int | None:
        """Exit status of the command; None while it runs."""
        return self._supervisor.poll()

    def check(self) -> None:
        """Raise BrokerError with the end of its log if the process has ended."""
        if self._supervisor.poll() is not None:
            log = self.log.read_text(errors="replace")
            faults = "".join(line for line in log.splitlines(keepends=True) if "ERROR" in line or "Exception" in line)
            told = f"{faults[:LOG_TAIL]}...\n{log[-LOG_TAIL:]}" if faults else log[-LOG_TAIL:]
            raise BrokerError(f"the broker has ended with status {self._supervisor.returncode}:\n{told}")

    def stop(self) -> None:
        """Ask the process to end and wait for it; kill it if that takes longer than STOP_TIMEOUT seconds."""
        assert self._supervisor.stdin
        with self._supervisor:
            with contextlib.suppress(BrokenPipeError):  # it has ended by itself
                self._supervisor.stdin.write(b".")
            self._supervisor.wait(STOP_TIMEOUT)

    def freeze(self) -> None:
        """Suspend the process, with its connections open, until it is killed."""
        for command in psutil.Process(self._supervisor.pid).children():
            command.suspend()

    def kill(self) -> None:
        """Kill the process."""
        assert self._supervisor.stdin
        self._supervisor.stdin.close()
        self._supervisor.wait()
