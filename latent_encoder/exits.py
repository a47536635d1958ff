"""What is done when the process ends, also if it ends at once."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from typing import NoReturn

Cleanup = Callable[[], None]

_cleanups: list[Cleanup] = []


def on_exit(cleanup: Cleanup) -> None:
    """Call `cleanup` when the process ends, unless a signal kills it."""
    _cleanups.append(cleanup)
    atexit.register(cleanup)


def not_on_exit(cleanup: Cleanup) -> None:
    """Forget a cleanup that was given to `on_exit`."""
    _cleanups.remove(cleanup)
    atexit.unregister(cleanup)


def end_at_once(status: int) -> NoReturn:
    """End the process without waiting for its threads: an encode cannot be interrupted."""
    try:
        for cleanup in tuple(_cleanups):
            cleanup()
    finally:
        os._exit(status)
