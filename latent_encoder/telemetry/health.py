"""What a worker knows of itself: whether it is alive, and whether it is ready.

Alive means that it gets on by itself: the loop that polls turns, no step of a request takes longer than it may, and no
thread that it needs has ended. Ready means that it answers requests now. What others do to it, a rebalance, a broker that is
away, nothing to do, makes it unready at most: to start it again would not help.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from latent_encoder.telemetry.metrics import READY

# Well above what the longest call to a broker takes (librdkafka's own limit is 60 s).
HEARTBEAT_LIMIT_S = 120.0

OK = "ok"


@dataclass(frozen=True)
class Report:
    """The state of each part: `ok`, or what is wrong with it."""

    parts: dict[str, str]

    @property
    def ok(self) -> bool:
        return all(state == OK for state in self.parts.values())


class Health:
    """Filled in by the threads of a worker, read by whoever asks. Thread-safe."""

    def __init__(self, encode_timeout_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._encode_timeout_s = encode_timeout_s
        self._now = now
        self._last_turn: float | None = None
        self._busy: dict[str, float] = {}
        self._threads: tuple[threading.Thread, ...] = ()
        self._ready = {"model": "not loaded yet", "group": "not joined yet", "broker": "not reached yet"}

    def turn(self) -> None:
        """The loop that polls made a turn."""
        self._last_turn = self._now()

    @contextmanager
    def busy(self, step: str) -> Iterator[None]:
        """Something that takes a while begins, and ends with the context; one at a time of each name."""
        self._busy[step] = self._now()
        try:
            yield
        finally:
            del self._busy[step]

    def needs(self, threads: Iterable[threading.Thread]) -> None:
        """The threads without which no request is answered."""
        self._threads = tuple(threads)

    def ready_if(self, part: str, reason: str | None) -> None:
        """`model`, `group` or `broker` is ready where there is no reason why not."""
        self._ready[part] = reason or OK
        READY.labels(part).set(reason is None)

    def alive(self) -> Report:
        """Whether the worker gets on by itself."""
        return Report({"poll_loop": self._poll_loop(), "steps": self._steps(), "threads": self._dead_threads()})

    def ready(self) -> Report:
        """Whether it answers requests now."""
        return Report(dict(self._ready))

    def _poll_loop(self) -> str:
        if self._last_turn is None:  # while it starts, which is a step
            return OK
        seconds = self._now() - self._last_turn
        return OK if seconds <= HEARTBEAT_LIMIT_S else f"no turn for {seconds:.0f} s"

    def _steps(self) -> str:
        taken = {step: self._now() - since for step, since in list(self._busy.items())}
        hung = [f"{step} takes {seconds:.0f} s" for step, seconds in taken.items() if seconds > self._encode_timeout_s]
        return f"{', '.join(hung)} (ENCODE_TIMEOUT_S={self._encode_timeout_s:g})" if hung else OK

    def _dead_threads(self) -> str:
        dead = [thread.name for thread in self._threads if not thread.is_alive()]
        return f"ended: {', '.join(dead)}" if dead else OK
