"""The three topics: waiting until they exist, and creating them if KAFKA_CREATE_TOPICS is set."""

from __future__ import annotations

from collections.abc import Collection

from confluent_kafka import Consumer, KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic  # `confluent_kafka.admin` exports it without its types

from config import Settings
from errors import KafkaFailed
from latent_encoder.kafka.connection import BrokerState, kafka_failed
from latent_encoder.kafka.properties import admin_properties, make_client
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder.kafka")

DLQ_CONFIG = {"max.message.bytes": "10485760", "retention.ms": "-1"}
"""Limits of the dead-letter topic. 10 MiB: a dead letter is a request of any size with its headers. No retention limit: it
stays until a person looked at it."""

BROKER_DEFAULT = -1
"""The replication factor that stands for the broker's own default."""

LIST_TIMEOUT_S = 1.0
"""Timeout of asking for the topics: the longest delay until a stop is noticed."""

CREATE_TIMEOUT_S = 10
"""Timeout of creating them: a broker that is starting takes some seconds."""

UNREACHABLE = {KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError.REQUEST_TIMED_OUT, KafkaError.NOT_CONTROLLER}
"""Errors of a broker that may be reachable at the next attempt."""


def topics_of(settings: Settings) -> tuple[str, str, str]:
    """Return the topics of requests, responses and dead letters."""
    return (settings.kafka_request_topic, settings.kafka_response_topic, settings.kafka_dlq_topic)


class TopicWatch:
    """The search for the three topics; a change of the missing ones is logged once."""

    def __init__(self, settings: Settings, consumer: Consumer, broker: BrokerState) -> None:
        self._settings = settings
        self._consumer = consumer
        self._broker = broker
        self.missing: frozenset[str] = frozenset()
        """The topics that the broker lacked when it was asked last."""

    def all_exist(self) -> bool:
        """Ask the broker for the topics, and create missing ones if that is wanted; return False if it is away.

        Raises:
            KafkaFailed: the broker refuses to create a topic, or to show one.
        """
        try:
            existing = self._consumer.list_topics(timeout=LIST_TIMEOUT_S).topics.keys()
            self._broker.observed(up=True)
            missing = frozenset(topics_of(self._settings)) - existing
            self._refuse_hidden(missing)
            if missing and self._settings.kafka_create_topics:
                create_topics(self._settings, missing)
                missing = frozenset()
        except KafkaException:
            self._broker.observed(up=False)
            return False
        if missing and missing != self.missing:
            log.warning("waiting for topics: create them, or set KAFKA_CREATE_TOPICS=true", missing=sorted(missing))
        self.missing = missing
        return not missing

    def _refuse_hidden(self, missing: Collection[str]) -> None:
        """Raise KafkaFailed if one of these topics is missing because this user may not see it.

        The broker leaves such topics out of a list; asked for one by name, it reports the reason.
        """
        for name in sorted(missing):
            error = self._consumer.list_topics(name, timeout=LIST_TIMEOUT_S).topics[name].error
            if error is not None and error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
                raise kafka_failed(f"Topic {name} may not be used by this user", error)


def create_topics(settings: Settings, names: Collection[str]) -> None:
    """Create these of the three topics, with the settings' count of partitions and replicas.

    Raises:
        KafkaFailed: the broker refuses; it demands rights, or has too few brokers for that many replicas.
        KafkaException: the broker cannot be reached.
    """
    admin = make_client(AdminClient, admin_properties(settings), settings)
    replication = BROKER_DEFAULT if settings.kafka_topic_replication is None else settings.kafka_topic_replication
    new = [
        NewTopic(
            name,
            num_partitions=settings.kafka_topic_partitions,
            replication_factor=replication,
            config=DLQ_CONFIG if name == settings.kafka_dlq_topic else {},
        )
        for name in names
    ]
    for name, result in admin.create_topics(new, request_timeout=CREATE_TIMEOUT_S).items():
        try:
            result.result()
        except KafkaException as exc:
            error: KafkaError = exc.args[0]
            if error.code() == KafkaError.TOPIC_ALREADY_EXISTS:
                continue  # another worker was faster
            if error.code() in UNREACHABLE:
                raise
            raise KafkaFailed(f"Topic {name} cannot be created: {error.str()}") from exc
        log.info("topic created", topic=name, partitions=settings.kafka_topic_partitions)
