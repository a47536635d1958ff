"""The state of the connection to the brokers, and the errors of a broker that stop a worker."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from confluent_kafka import KafkaError

from errors import KafkaFailed
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder.kafka")

FATAL = {
    KafkaError._AUTHENTICATION,  # librdkafka's own codes begin with an underscore
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError.UNSUPPORTED_SASL_MECHANISM,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    KafkaError.FENCED_INSTANCE_ID,
    KafkaError._FENCED,
}
"""Errors that retrying cannot fix."""


def is_fatal(error: KafkaError) -> bool:
    """Return whether the worker has to stop: access is refused, or another worker took its place.

    A consumer reports its fatal errors with the code `_FATAL`, and `fatal()` false.
    """
    return bool(error.fatal()) or error.code() == KafkaError._FATAL or error.code() in FATAL


def kafka_failed(fact: str, error: KafkaError) -> KafkaFailed:
    """Return the exception for an error that stops a worker; `fact` begins its message and has no full stop."""
    return KafkaFailed(f"{fact}: {error.str()} ({error.name()}).")


class BrokerState:
    """The reachability of the brokers, logged once when it changes."""

    def __init__(self, servers: str) -> None:
        self._servers = servers
        self._reason = "no connection"
        self._observed: bool | None = None
        self._last_statistics = True
        self._up: bool | None = None
        self._since = 0.0
        self.fatal: KafkaFailed | None = None
        """The error that stops the worker, if one came in."""

    @property
    def up(self) -> bool:
        return self._up is True

    @property
    def fault(self) -> str | None:
        """The reason why no broker can be reached; None if one can."""
        return None if self.up else f"{self._servers} cannot be reached ({self._reason})"

    def up_for(self, now: float, seconds: float) -> bool:
        """Return whether a broker has been reachable for that many seconds; `now` is a time of the monotonic clock."""
        return self.up and now - self._since >= seconds

    def check(self) -> None:
        """Raise the error that stops the worker, if one came in."""
        if self.fatal is not None:
            raise self.fatal

    def on_error(self, error: KafkaError) -> None:
        """Take an error of a client (its `error_cb`): a connection failed, or access is refused."""
        if error.code() in FATAL:
            self.fatal = self.fatal or kafka_failed(f"The broker at {self._servers} refuses this service", error)
        elif error.code() != KafkaError._ALL_BROKERS_DOWN:  # it gives no reason
            self._reason = error.str()

    def on_statistics(self, brokers: Mapping[str, Any]) -> None:
        """Take the `brokers` of the consumer's statistics, which come every second."""
        up = any(broker["state"] == "UP" for broker in brokers.values())
        if up or not self._last_statistics:  # a single report may be older than the connection
            self.observed(up=up)
        self._last_statistics = up

    def observed(self, *, up: bool) -> None:
        """Note that a broker was reached, or that none was."""
        self._observed = up

    def settle(self) -> None:
        """Log a change. Call it after a poll: the reason comes in by a callback of its own."""
        if self._observed == self._up:
            return
        if not self._observed:
            log.warning("broker is away, waiting for it", servers=self._servers, reason=self._reason)
        elif self._up is False:
            log.info("broker is back", servers=self._servers)
        self._up = self._observed
        self._since = time.monotonic()
