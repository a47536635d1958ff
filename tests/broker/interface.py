"""What every broker of the tests has, however it is had."""

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
    """No broker can be had, or one does not start."""


class Broker:
    """A Kafka-protocol broker that answers from its construction until `close`."""

    name: ClassVar[str]
    """What it is, for people."""
    is_apache_kafka: ClassVar[bool] = True
    """Whether all of Kafka can be expected of it, such as transactions; of a given broker, this is taken for granted."""
    bootstrap_servers: str
    """Where it answers, without encryption or a password."""

    def close(self) -> None:
        """End what was started. A broker that was only given is left alone."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class GivenBroker(Broker):
    """A broker that somebody else runs."""

    name = f"the broker of {GIVEN}"

    def __init__(self) -> None:
        self.bootstrap_servers = os.environ[GIVEN]


def wait_for_answer(bootstrap_servers: str, check: Callable[[], None]) -> None:
    """Wait until the broker tells its metadata; `check` raises as soon as there is nothing left to wait for."""
    # A client that finds nobody tells so on the standard error output, which here is what is expected at first.
    admin = AdminClient({"bootstrap.servers": bootstrap_servers, "reconnect.backoff.max.ms": 100, "log_level": 0})
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        check()
        try:
            admin.list_topics(timeout=1)
        except KafkaException as error:
            if time.monotonic() > deadline:
                raise BrokerError(f"the broker at {bootstrap_servers} does not answer: {error}") from error
        else:
            return
