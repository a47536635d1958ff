"""The readiness of a worker: it can respond to requests now, or the reason why it cannot."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from latent_encoder.kafka.connection import BrokerState
from latent_encoder.kafka.jobs import RecordJob
from latent_encoder.telemetry.health import Health
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder.kafka")

UNACKNOWLEDGED_S = 10.0
"""Longest time for a response to be acknowledged by a worker that is ready. A broker takes milliseconds, and a change of
leaders some seconds."""

Fault = Callable[[], str | None]
"""A function that returns the reason why a part is not ready, or None if it is."""


class Readiness:
    """The parts of a worker's health that are about Kafka; a change of the whole is logged once."""

    def __init__(self, health: Health, broker: BrokerState, group: str) -> None:
        self._health = health
        self._broker = broker
        self._group = group
        self._ready = False
        self.group_fault: str | None = "not joined yet"
        """The reason why the worker gets no requests from its group; None if it gets them."""
        self._parts: dict[str, Fault] = {"broker": lambda: broker.fault, "group": lambda: self.group_fault}

    def add(self, part: str, fault: Fault) -> None:
        """Add a part that has to be ready too."""
        self._parts[part] = fault
        self._health.ready_if(part, fault())

    def update(self) -> None:
        """Report all parts to the health. Call it after a poll, whose callbacks have the news."""
        self._broker.settle()
        for part, fault in self._parts.items():
            self._health.ready_if(part, fault())
        report = self._health.ready()
        if report.ok != self._ready:
            if report.ok:
                log.info("ready", group=self._group)
            else:
                log.info("not ready", group=self._group, faults=report.faults)
            self._ready = report.ok


class Acknowledgements:
    """The responses that wait for the broker, each since it was published first."""

    def __init__(self, ack_timeout_s: float, now: Callable[[], float] = time.monotonic) -> None:
        """`ack_timeout_s` is KAFKA_ACK_TIMEOUT_S; `now` returns seconds of a clock that never goes back."""
        self._longest_s = min(UNACKNOWLEDGED_S, ack_timeout_s)
        self._now = now
        self._since: dict[int, float] = {}

    def fault(self, published: Iterable[RecordJob]) -> str | None:
        """Return the reason why the worker is not ready, if one of these jobs has waited for too long.

        A job keeps its time if it is published again, for example because its topic is gone or its transaction was aborted.
        """
        before = self._since
        self._since = {id(job): before.get(id(job), self._now()) for job in published}
        oldest = self._now() - min(self._since.values(), default=self._now())
        return f"a response is not acknowledged for {oldest:.0f} s" if oldest > self._longest_s else None
