"""Calls that other threads leave for the thread that polls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue


class Events:
    """A queue of calls. Every thread may add calls; one thread makes them."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def posted(self, call: Callable[..., None]) -> Callable[..., None]:
        """Return a function that adds the call with its arguments, and returns at once."""
        return lambda *arguments: self._calls.put(partial(call, *arguments))

    def run(self, timeout: float) -> None:
        """Make the calls in the queue; if there are none, wait for one, `timeout` seconds at most."""
        try:
            (self._calls.get(timeout=timeout) if timeout else self._calls.get_nowait())()
            while True:
                self._calls.get_nowait()()
        except Empty:
            pass
