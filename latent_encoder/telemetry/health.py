"""The health of a worker: it is alive, and it is ready.

Alive means that the worker makes progress: the loop that polls turns, no step of a request takes longer than it may, every
thread that it needs runs, and requests that wait are fetched. Ready means that it responds to requests now. External causes (a
rebalance, a broker that is away, no requests) make a worker unready at most, because restarting it would not help.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from latent_encoder.telemetry.metrics import READY

HEARTBEAT_LIMIT_S = 120.0
"""Longest time between two turns of the loop: twice the longest call to a broker (librdkafka's own limit is 60 s)."""

OK = "ok"


@dataclass(frozen=True)
class HealthReport:
    """The state of each part: `ok`, or its fault."""

    parts: dict[str, str]

    @property
    def ok(self) -> bool:
        return not self.faults

    @property
    def faults(self) -> dict[str, str]:
        """The parts that are not ok, with the reasons."""
        return {part: state for part, state in self.parts.items() if state != OK}


class Health:
    """The facts about a worker, set by its threads and read by anyone. Thread-safe."""

    def __init__(self, encode_timeout_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._encode_timeout_s = encode_timeout_s
        self._now = now
        self._last_turn: float | None = None
        self._busy: dict[str, float] = {}
        self._threads: tuple[threading.Thread, ...] = ()
        self._stalled: str | None = None
        self._ready = {"model": "not loaded yet", "group": "not joined yet", "broker": "not reached yet"}

    def turn(self) -> None:
        """Note a turn of the loop that polls."""
        self._last_turn = self._now()

    @contextmanager
    def busy(self, step: str) -> Iterator[None]:
        """Note that a step lasts as long as the context. At most one step of each name runs at a time."""
        self._busy[step] = self._now()
        try:
            yield
        finally:
            del self._busy[step]

    def needs(self, threads: Iterable[threading.Thread]) -> None:
        """Add threads without which no request gets a response."""
        self._threads += tuple(threads)

    def stalled(self, reason: str | None) -> None:
        """Set the reason why nothing is fetched, though it could be; None if that is not so."""
        self._stalled = reason

    def ready_if(self, part: str, reason: str | None) -> None:
        """Set a part, for example `model`, to ready, or to the reason why it is not."""
        self._ready[part] = reason or OK
        READY.labels(part).set(reason is None)

    @property
    def hangs(self) -> bool:
        """A step takes longer than it may."""
        return self._steps() != OK

    def alive(self) -> HealthReport:
        """Report whether the worker makes progress."""
        return HealthReport(
            {
                "poll_loop": self._poll_loop(),
                "steps": self._steps(),
                "threads": self._dead_threads(),
                "fetch": self._stalled or OK,
            }
        )

    def ready(self) -> HealthReport:
        """Report whether the worker responds to requests now."""
        return HealthReport(dict(self._ready))

    def _poll_loop(self) -> str:
        if self._last_turn is None:  # the worker is starting, which is a step
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
