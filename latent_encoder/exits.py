"""The end of the process: exit statuses, stopping on signals, and cleanups that also run if the process ends at once."""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Callable
from typing import NoReturn

EXIT_ERROR_RESPONSE = 1
"""An error response, a replayed record that was refused, a worker that is not alive, a failed check of doctor or inspect."""
EXIT_WRONG_USAGE = 2
"""Wrong usage, or a setting that cannot be used."""
EXIT_SERVICE_FAILED = 3
"""The service cannot start or go on, standard output takes no response, or work was unfinished at the end of a shutdown."""
SIGNAL_BASE = 128
"""Added to a signal's number, as shells do, for the status of a process that the signal ended."""
EXIT_INTERRUPTED = SIGNAL_BASE + signal.SIGINT

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

LOOK_FOR_SIGNALS_S = 0.2
"""Seconds after which the main thread looks up from a wait, and runs the handlers of signals. The system may hand a signal to
another thread; Python then only notes it for the main thread, and nothing ends a wait that has no time-out."""

Cleanup = Callable[[], None]

_cleanups: list[Cleanup] = []


def on_exit(cleanup: Cleanup) -> None:
    """Call `cleanup` when the process ends, unless a signal kills it."""
    _cleanups.append(cleanup)
    atexit.register(cleanup)


def not_on_exit(cleanup: Cleanup) -> None:
    """Remove a cleanup that was given to `on_exit`."""
    _cleanups.remove(cleanup)
    atexit.unregister(cleanup)


def end_at_once(status: int) -> NoReturn:
    """End the process without waiting for its threads: an encode cannot be interrupted."""
    try:
        for cleanup in tuple(_cleanups):
            cleanup()
    finally:
        os._exit(status)


def end_by_signal(number: int) -> NoReturn:
    """End the process at once, with the status of a process that this signal ended."""
    end_at_once(SIGNAL_BASE + number)


def wait_heeding_signals(arrived: Callable[[float], object]) -> None:
    """Wait until `arrived`, which gets a time-out in seconds, returns something true. For the main thread."""
    while not arrived(LOOK_FOR_SIGNALS_S):
        pass


def stop_on_signals(first: Callable[[int], None], second: Callable[[int], None]) -> Callable[[], None]:
    """Call `first` with the number of the first SIGTERM or SIGINT, and `second` with that of each later one.

    Both are called in signal handlers. Return a function that restores the handlers in force before.
    """
    handlers = iter([first])

    def on_signal(number: int, _frame: object) -> None:
        next(handlers, second)(number)

    before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    return restore
