"""The pixels of the images that are loaded at the same time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class PixelBudget:
    """A number of pixels that images share while they are loaded, so that several take no more memory than the largest one.

    Thread-safe. Images get their share in the order in which they ask, so that a large one is not passed for ever.
    """

    def __init__(self, pixels: int) -> None:
        self._free = self._all = pixels
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextmanager
    def share(self, pixels: int) -> Iterator[None]:
        """Wait until that many pixels are free, or all if there are fewer, and take them as long as the context lasts."""
        wanted, turn = min(pixels, self._all), object()
        with self._changed:
            self._waiting.append(turn)
            self._changed.wait_for(lambda: self._waiting[0] is turn and self._free >= wanted)
            self._waiting.popleft()
            self._free -= wanted
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += wanted
                self._changed.notify_all()
