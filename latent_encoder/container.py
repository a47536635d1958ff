"""The limits of the container that this process runs in."""

from __future__ import annotations

import math
from pathlib import Path

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""The container's memory limit in bytes, or `max`: docs.kernel.org/admin-guide/cgroup-v2.html."""


def memory_limit(file: Path = CGROUP_LIMIT) -> float:
    """Return the memory limit of the container's control group in bytes; infinity if there is none."""
    text = file.read_text().strip() if file.exists() else "max"
    return math.inf if text == "max" else float(text)
