"""The state of the connection to the brokers, and the errors of a broker that stop a worker."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from confluent_kafka import KafkaError

from errors import KafkaFailed
from latent_encoder.kafka.logins import LOGIN_REFUSED, Login
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder.kafka")

FATAL = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    KafkaError.FENCED_INSTANCE_ID,
    KafkaError._FENCED,  # librdkafka's own codes begin with an underscore
}
"""Errors that retrying cannot fix. A refused login is none of them: `BrokerState` decides when it is final."""


def is_fatal(error: KafkaError) -> bool:
    """Return whether the worker has to stop: access is refused, another worker took its place, or its client gave up."""
    return bool(error.fatal()) or error.code() == KafkaError._FATAL or error.code() in FATAL


def kafka_failed(fact: str, error: KafkaError) -> KafkaFailed:
    """Return the exception for an error that stops a worker; `fact` begins its message and has no full stop."""
    return KafkaFailed(f"{fact}: {error.str()} ({error.name()}).")


class BrokerState:
    """The reachability of the brokers, logged once when it changes, and the logins that they refuse."""

    def __init__(self, servers: str, auth_timeout_s: float = 0.0, now: Callable[[], float] = time.monotonic) -> None:
        """`auth_timeout_s` is the time for which logins may be refused once a broker was reached."""
        self._servers = servers
        self._auth_timeout_s = auth_timeout_s
        self._now = now
        self._reason = "no connection"
        self._observed: bool | None = None
        self._last_statistics = True
        self._up: bool | None = None
        self._since = 0.0
        self._reached = False
        self._consumer = Login(now)
        self._producer = Login(now)
        self.fatal: KafkaFailed | None = None
        """The error that stops the worker, if one came in."""

    @property
    def up(self) -> bool:
        return self._up is True

    @property
    def fault(self) -> str | None:
        """The reason why no broker can be reached or accepts a producer; None if all is well."""
        if not self.up:
            return f"{self._servers} cannot be reached ({self._reason})"
        refusal = self._producer.refusal
        return None if refusal is None else f"{self._servers} refuses the producer ({refusal.str()})"

    def up_for(self, now: float, seconds: float) -> bool:
        """Return whether a broker has been reachable for that many seconds; `now` is a time of the monotonic clock."""
        return self.up and now - self._since >= seconds

    def check(self) -> None:
        """Raise the error that stops the worker, if one came in or a login has been refused for too long."""
        for login in (self._consumer, self._producer):
            if login.refusal is not None and login.refused_for >= self._auth_timeout_s:
                self._refused(login.refusal)
        if self.fatal is not None:
            raise self.fatal

    def on_error(self, error: KafkaError) -> None:
        """Take an error of the consumer (its `error_cb`): a connection failed, or access is refused."""
        self._on_error(error, self._consumer)

    def on_producer_error(self, error: KafkaError) -> None:
        """Take an error of the producer (its `error_cb`)."""
        self._on_error(error, self._producer)

    def _on_error(self, error: KafkaError, login: Login) -> None:
        code = error.code()
        if code != KafkaError._ALL_BROKERS_DOWN:  # it gives no reason
            self._reason = error.str()
        if code in LOGIN_REFUSED and self._reached and self._auth_timeout_s:
            first = not (self._consumer.recent or self._producer.recent)
            login.refused(error)
            if first:
                log.warning(
                    "login refused, waiting for it", servers=self._servers, reason=error.str(), error_code=error.name()
                )
        elif code in LOGIN_REFUSED or is_fatal(error):
            self._refused(error)

    def _refused(self, error: KafkaError) -> None:
        self.fatal = self.fatal or kafka_failed(f"The broker at {self._servers} refuses this service", error)

    def on_statistics(self, brokers: Mapping[str, Any]) -> None:
        """Take the `brokers` of the consumer's statistics, which come every second."""
        up = _any_up(brokers)
        if up or not self._last_statistics:  # a single report may be older than the connection
            self.observed(up=up)
        self._last_statistics = up

    def on_producer_statistics(self, statistics: str) -> None:
        """Take the producer's statistics (its `stats_cb`), which come every second."""
        if _any_up(json.loads(statistics)["brokers"]):
            self._producer.accepted()

    def observed(self, *, up: bool) -> None:
        """Note that a broker was reached, or that none was."""
        self._observed = up
        if up:
            self._reached = True
            self._consumer.accepted()

    def settle(self) -> None:
        """Log a change. Call it after a poll: the reason comes in by a callback of its own."""
        if self._observed == self._up:
            return
        if not self._observed:
            log.warning("broker is away, waiting for it", servers=self._servers, reason=self._reason)
        elif self._up is False:
            log.info("broker is back", servers=self._servers)
        self._up = self._observed
        self._since = self._now()


def _any_up(brokers: Mapping[str, Any]) -> bool:
    return any(broker["state"] == "UP" for broker in brokers.values())
