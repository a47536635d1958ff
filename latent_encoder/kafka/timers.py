"""Calls that are due at a later time, made by the thread that polls."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable


class Timers:
    """Calls and the times at which they are due. For one thread."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """`now` returns seconds of a clock that never goes back."""
        self._now = now
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()  # calls that are due at the same time keep their order

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Have `run_due` make this call once, not before that many seconds have passed."""
        heapq.heappush(self._calls, (self._now() + seconds, next(self._numbers), call))

    def run_due(self) -> None:
        """Make the calls that are due, the earliest first."""
        while self._calls and self._calls[0][0] <= self._now():
            heapq.heappop(self._calls)[2]()
