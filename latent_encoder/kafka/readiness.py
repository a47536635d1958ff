"""The readiness of a worker: it can respond to requests now, or the reason why it cannot."""

from __future__ import annotations

from latent_encoder.kafka.connection import BrokerState
from latent_encoder.telemetry.health import Health
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder.kafka")


class Readiness:
    """The parts `broker` and `group` of the worker's health; a change of the whole is logged once."""

    def __init__(self, health: Health, broker: BrokerState, group: str) -> None:
        self._health = health
        self._broker = broker
        self._group = group
        self._ready = False
        self.group_fault: str | None = "not joined yet"
        """The reason why the worker gets no requests from its group; None if it gets them."""

    def update(self) -> None:
        """Tell the health about both parts. Call it after a poll, whose callbacks have the news."""
        self._broker.settle()
        self._health.ready_if("broker", self._broker.fault)
        self._health.ready_if("group", self.group_fault)
        ready = self._health.ready().ok
        if ready != self._ready:
            log.info("ready" if ready else "not ready", group=self._group)
            self._ready = ready
