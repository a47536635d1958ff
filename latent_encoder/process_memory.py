"""The memory of a process that is still running."""

from __future__ import annotations

import re
from pathlib import Path

KIB = 1024  # bytes; the kB of /proc


def peak_bytes(pid: int) -> int:
    """Return the most resident memory that a process has had since it began to run its program (Linux only).

    Unlike `ru_maxrss`, it does not begin with the peak of the process that started it.

    Raises:
        OSError: the process has ended, or the system has no `/proc`.
    """
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    if found is None:  # a zombie: the process has ended and has no memory any more
        raise ProcessLookupError(f"process {pid} has ended")
    return int(found[1]) * KIB
