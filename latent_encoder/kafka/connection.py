"""Whether a broker can be reached, and which of its errors end the service."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from confluent_kafka import KafkaError

from errors import KafkaFailed
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder.kafka")

# What waiting does not mend.
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


def is_fatal(error: KafkaError) -> bool:
    """Whether the service has to end: access is refused, or another one took this one's place."""
    return bool(error.fatal()) or error.code() in FATAL


def failure(what: str, error: KafkaError) -> KafkaFailed:
    """The exception for an error that ends the service."""
    return KafkaFailed(f"{what}: {error.str()} ({error.name()}).")


class Connection:
    """Follows the connection to the brokers, and says once when it is lost or there again."""

    def __init__(self, servers: str) -> None:
        self._servers = servers
        self._reason = "no connection"
        self._observed: bool | None = None
        self._last_statistics = True
        self._up: bool | None = None
        self._since = 0.0
        self.fatal: KafkaFailed | None = None
        """Set when an error came in that ends the service."""

    @property
    def up(self) -> bool:
        return self._up is True

    @property
    def fault(self) -> str | None:
        """Why no broker can be reached; None where one is."""
        return None if self.up else f"{self._servers} cannot be reached ({self._reason})"

    def up_for(self, now: float, seconds: float) -> bool:
        """Whether it has been there for so long; `now` is the monotonic clock's."""
        return self.up and now - self._since >= seconds

    def check(self) -> None:
        """Raise what ends the service, if it came in."""
        if self.fatal is not None:
            raise self.fatal

    def on_error(self, error: KafkaError) -> None:
        """The clients' `error_cb`: why a connection failed, or that access is refused."""
        if error.code() in FATAL:
            self.fatal = self.fatal or failure(f"The broker at {self._servers} refuses this service", error)
        elif error.code() != KafkaError._ALL_BROKERS_DOWN:  # says nothing about why
            self._reason = error.str()

    def on_statistics(self, brokers: Mapping[str, Any]) -> None:
        """The `brokers` of the consumer's statistics, every second."""
        up = any(broker["state"] == "UP" for broker in brokers.values())
        if up or not self._last_statistics:  # one alone may be older than the connection
            self.observed(up=up)
        self._last_statistics = up

    def observed(self, *, up: bool) -> None:
        """A broker was reached, or none was."""
        self._observed = up

    def settle(self) -> None:
        """Say what changed. Called after a poll, so that the reason is known, which comes in by a callback of its own."""
        if self._observed == self._up:
            return
        if not self._observed:
            log.warning("broker is away, waiting for it", servers=self._servers, reason=self._reason)
        elif self._up is False:
            log.info("broker is back", servers=self._servers)
        self._up = self._observed
        self._since = time.monotonic()
