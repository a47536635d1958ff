"""A setting of the whole process that threads change for a while: the first one sets it, and the last one restores it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Generic, TypeVar

V = TypeVar("V")


class SharedContext(Generic[V]):
    """A context that several threads may be in at the same time. It is entered and left once for all of them. Thread-safe."""

    def __init__(self, make: Callable[[V], AbstractContextManager[object]]) -> None:
        """`make` returns the context that sets the process to a value and restores it."""
        self._make = make
        self._changed = threading.Condition()
        self._users = 0

    @contextmanager
    def entered(self, value: V) -> Iterator[None]:
        """Keep the process set to the value. Threads with the same value share it; one with another value waits for them."""
        with self._changed:
            self._changed.wait_for(lambda: self._users == 0 or self._value == value)
            if self._users == 0:
                self._context = self._make(value)
                self._context.__enter__()
                self._value = value
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                if self._users == 0:
                    self._context.__exit__(None, None, None)
                    self._changed.notify_all()
