"""The interface of every broker of the tests, and the broker that somebody else runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from types import TracebackType
from typing import ClassVar, Self

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

GIVEN = "KAFKA_TEST_BOOTSTRAP_SERVERS"
START_TIMEOUT = 240


class BrokerError(Exception):
    """No broker can run here, or one does not start."""


class Broker:
    """A Kafka-protocol broker that responds from its construction until `close`."""

    name: ClassVar[str]
    """Its name for people."""
    is_apache_kafka: ClassVar[bool] = True
    """True if it has all features of Kafka, for example transactions; a given broker is assumed to have them."""
    bootstrap_servers: str
    """Address for clients without encryption or a password."""

    def close(self) -> None:
        """Stop the broker if this object started it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class GivenBroker(Broker):
    """A broker that somebody else runs."""

    name = f"the broker of {GIVEN}"

    def __init__(self) -> None:
        self.bootstrap_servers = os.environ[GIVEN]


def wait_for_response(bootstrap_servers: str, check: Callable[[], None]) -> None:
    """Wait until the broker returns its metadata.

    `check` raises if the broker has ended.

    Raises:
        BrokerError: the broker did not respond within START_TIMEOUT seconds.
    """
    # Log level 0: a client logs each failed connection to standard error, and the first ones are expected to fail.
    admin = AdminClient({"bootstrap.servers": bootstrap_servers, "reconnect.backoff.max.ms": 100, "log_level": 0})
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        check()
        try:
            admin.list_topics(timeout=1)
        except KafkaException as error:
            if time.monotonic() > deadline:
                raise BrokerError(f"the broker at {bootstrap_servers} does not respond: {error}") from error
        else:
            return
