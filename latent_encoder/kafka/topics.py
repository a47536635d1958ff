"""The three topics: looked for, and created where that is wanted."""

from __future__ import annotations

from collections.abc import Collection

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic  # what `confluent_kafka.admin` hands on, with its types

from config import Settings
from errors import KafkaFailed
from latent_encoder.kafka.properties import admin_properties, make_client
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder.kafka")

# A dead letter is the request and its headers, and stays until somebody looked at it.
DLQ_CONFIG = {"max.message.bytes": "10485760", "retention.ms": "-1"}
BROKER_DEFAULT = -1
UNREACHABLE = {KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError.REQUEST_TIMED_OUT, KafkaError.NOT_CONTROLLER}


def topics_of(settings: Settings) -> tuple[str, str, str]:
    """Requests, responses, dead letters."""
    return (settings.kafka_request_topic, settings.kafka_response_topic, settings.kafka_dlq_topic)


def create_topics(settings: Settings, names: Collection[str]) -> None:
    """Create these of the three topics, with the partitions and replicas that the settings say.

    Raises:
        KafkaFailed: the broker refuses, for want of rights or of brokers for that many replicas.
        KafkaException: it cannot be reached.
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
    for name, result in admin.create_topics(new, request_timeout=10).items():
        try:
            result.result()
        except KafkaException as exc:
            error: KafkaError = exc.args[0]
            if error.code() == KafkaError.TOPIC_ALREADY_EXISTS:
                continue  # another worker was quicker
            if error.code() in UNREACHABLE:
                raise
            raise KafkaFailed(f"Topic {name} cannot be created: {error.str()}") from exc
        log.info("topic created", topic=name, partitions=settings.kafka_topic_partitions)
