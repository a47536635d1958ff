"""Whether to write in colours: on a terminal, but for https://no-color.org and its counterpart FORCE_COLOR."""

from __future__ import annotations

import os
from typing import TextIO


def forced() -> bool | None:
    """What the environment says, or None where it leaves it to the stream. NO_COLOR wins."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return True if os.environ.get("FORCE_COLOR") else None


def wanted(stream: TextIO) -> bool:
    """Whether what goes to `stream` may have colours."""
    choice = forced()
    return stream.isatty() if choice is None else choice
