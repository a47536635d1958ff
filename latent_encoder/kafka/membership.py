"""The membership of a worker in its consumer group: that it was joined, and the reasons for which it is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Future

from confluent_kafka import Consumer, KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._group import ConsumerGroupDescription  # `confluent_kafka.admin` exports it without its types

from config import Settings
from errors import KafkaFailed
from latent_encoder.kafka.connection import is_fatal, kafka_failed
from latent_encoder.kafka.properties import admin_properties, make_client
from latent_encoder.kafka.timers import Timers

LOOK_AFTER_S = 5.0
"""Wait between two looks at the members of the group. A worker joins within a second of reaching the coordinator."""

LOOKS = 3
"""Looks at the members, one after the other, that miss this worker before it stops: a broker that has just come back may list
its groups before the worker has joined again."""

NEEDS = "KAFKA_GROUP_PROTOCOL=consumer needs Apache Kafka 4.0 or newer with that protocol on; for other brokers, set classic."


def refused_membership(error: KafkaError, settings: Settings) -> KafkaFailed:
    """Return the exception for an error of the consumer that stops the worker, with the next step if it is known."""
    place = f"topic {settings.kafka_request_topic} in group {settings.kafka_consumer_group}"
    failure = kafka_failed(f"Cannot consume {place}", error)
    text = error.str()
    if settings.kafka_group_protocol == "consumer" and "API version not supported" in text:
        return KafkaFailed(f"{failure} {NEEDS}")
    if "instance ID" in text or "group.instance.id" in text:
        return KafkaFailed(
            f"{failure} Another worker has the same KAFKA_GROUP_INSTANCE_ID, or had it and was killed less than a session "
            "timeout ago. Give each worker an id of its own, or start this one again later."
        )
    return failure


class Membership:
    """The check that a worker has joined its group by the consumer protocol.

    If the broker does not know that protocol, librdkafka waits without an error and without a log line.
    """

    def __init__(self, settings: Settings, consumer: Consumer, timers: Timers, failed: Callable[[KafkaFailed], None]) -> None:
        """`failed` is called if the worker is no member of its group."""
        self._settings = settings
        self._consumer = consumer
        self._timers = timers
        self._failed = failed
        self._missed = 0

    def confirm(self) -> None:
        """Begin to look for the worker among the members of its group, until it is there."""
        if self._settings.kafka_group_protocol == "consumer":
            self._admin = make_client(AdminClient, admin_properties(self._settings), self._settings)
            # Varied, because a look has all members in it, and many workers may have been started together.
            self._timers.after(LOOK_AFTER_S * random.uniform(1, 2), self._ask)  # noqa: S311  # nothing secret

    def _ask(self) -> None:
        if self._consumer.assignment():
            return
        group = self._settings.kafka_consumer_group
        described = self._admin.describe_consumer_groups([group], request_timeout=LOOK_AFTER_S)[group]
        self._timers.after(LOOK_AFTER_S, lambda: self._look(described))

    def _look(self, described: Future[ConsumerGroupDescription]) -> None:
        """Stop the worker if too many looks missed it, or if it may not look; a broker that is away does not count."""
        try:
            members = described.result(timeout=0).members
        except TimeoutError:
            self._missed = 0
        except KafkaException as exc:
            if is_fatal(exc.args[0]):
                self._failed(refused_membership(exc.args[0], self._settings))
                return
            self._missed = 0
        else:
            if self._consumer.memberid() in {member.member_id for member in members}:
                return
            self._missed += 1
        if self._missed < LOOKS:
            self._ask()
            return
        group = self._settings.kafka_consumer_group
        self._failed(KafkaFailed(f"The broker did not take this worker into the group {group}. {NEEDS}"))
