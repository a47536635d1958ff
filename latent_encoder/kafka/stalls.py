"""The watchdog of the consumer: a worker with room that gets nothing from a partition with unread records has a fault."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

from latent_encoder.kafka.jobs import Partition
from latent_encoder.kafka.positions import Reading

NOT_ALIVE_FACTOR = 5
"""Multiple of KAFKA_STALL_TIMEOUT_S after which the worker should be restarted. By then a consumer that recovers by itself has
done so, for example after a change of leaders."""


class Watchdog:
    """The time for which each partition has unread records and hands out none, while the worker could take some.

    Time in which the worker is full, paused or without a broker does not count.
    """

    def __init__(self, timeout_s: float, now: Callable[[], float] = time.monotonic) -> None:
        """`timeout_s` is KAFKA_STALL_TIMEOUT_S; `now` returns seconds of a clock that never goes back."""
        self._timeout_s = timeout_s
        self._now = now
        self._turned_at: float | None = None
        self._counts = False
        self._waited_s = 0.0
        """Time with room so far."""
        self._unread: dict[Partition, tuple[int, float]] = {}
        """The position of each partition with unread records, and `_waited_s` when it got there."""

    def turn(self, *, may_fetch: bool) -> None:
        """Begin a turn of the loop, during which the worker can take records or not."""
        now = self._now()
        if self._counts and self._turned_at is not None:
            self._waited_s += now - self._turned_at
        self._turned_at, self._counts = now, may_fetch

    def observe(self, readings: Mapping[Partition, Reading], paused: Collection[Partition]) -> None:
        """Take the present positions of the worker's partitions; those that are paused on purpose do not count."""
        before = self._unread
        self._unread = {}
        for place, reading in readings.items():
            if reading.unread and place not in paused:
                moved = place not in before or before[place][0] != reading.position
                self._unread[place] = (reading.position, self._waited_s) if moved else before[place]

    @property
    def fault(self) -> str | None:
        """The reason why the worker is not ready, with the partitions that stand still; None if all is well."""
        return self._longer_than(self._timeout_s)

    @property
    def hung(self) -> str | None:
        """The reason why the worker should be restarted; None if all is well."""
        return self._longer_than(NOT_ALIVE_FACTOR * self._timeout_s)

    def _longer_than(self, seconds: float) -> str | None:
        stalled = {place: self._waited_s - since for place, (_, since) in self._unread.items()}
        places = sorted(place for place, waited in stalled.items() if waited >= seconds)
        if not places:
            return None
        names = ", ".join(f"{topic} [{number}]" for topic, number in places)
        return f"nothing comes from {names} for {max(stalled.values()):.0f} s, though records wait there"
