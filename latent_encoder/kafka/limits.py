"""The size limits of the three topics, compared once at the start: a dead letter is larger than its request."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, ConfigResource  # type: ignore[attr-defined]  # exported without `__all__`

from config import Settings
from errors import LatentEncoderError, one_line
from latent_encoder.kafka.properties import admin_properties, make_client
from latent_encoder.kafka.topics import topics_of
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder.kafka")

ASK_TIMEOUT_S = 30.0
"""Timeout of asking for the limits. Nothing waits for it, and a broker that is starting takes some seconds."""

DEAD_LETTER_HEADERS = 16_384
"""Bytes that the headers of a dead letter may add to its record: the longest error message has a path of 4 KiB and a list of
names of 5 KB."""

LARGEST_RESPONSE = 32_768
"""Bytes of a response without the headers of its request: four paths of 4 KiB, and metadata of 3 kB."""

BATCH_BYTES = 512
"""Bytes that a record's place in its batch, and its key, may add to a request of KAFKA_MAX_MESSAGE_BYTES."""


def report_limits(settings: Settings) -> None:
    """Ask for the limits and log a warning if they do not fit together, in a thread of its own.

    A broker that refuses to show them is left alone: reading them takes the right DescribeConfigs, and nothing else needs it.
    """
    threading.Thread(target=_report, args=(settings,), name="limits", daemon=True).start()


def _report(settings: Settings) -> None:
    try:
        faults = faults_of(topic_limits(settings), settings)
    except (KafkaException, LatentEncoderError, TimeoutError) as exc:
        log.debug("limits of the topics are not known", reason=one_line(exc))
    else:
        if faults:
            log.warning("topics have limits that do not fit together", faults=faults)


def topic_limits(settings: Settings) -> dict[str, int]:
    """Return `max.message.bytes` of each topic.

    Raises:
        KafkaException, TimeoutError: the broker cannot be reached, or does not show them.
        SettingsError: librdkafka refuses a property.
    """
    admin = make_client(AdminClient, admin_properties(settings), settings)
    resources = [ConfigResource(ConfigResource.Type.TOPIC, topic) for topic in topics_of(settings)]
    results = admin.describe_configs(resources, request_timeout=ASK_TIMEOUT_S)
    return {
        resource.name: int(result.result(ASK_TIMEOUT_S)["max.message.bytes"].value) for resource, result in results.items()
    }


def faults_of(limits: Mapping[str, int], settings: Settings) -> list[str]:
    """Return each way in which the limits of the topics, in bytes, do not fit together or to KAFKA_MAX_MESSAGE_BYTES."""
    requests, responses, letters = topics_of(settings)
    faults = []
    if limits[letters] < limits[requests] + DEAD_LETTER_HEADERS:
        faults.append(
            f"{letters} takes {limits[letters]} bytes and {requests} {limits[requests]}: the largest dead letters lose their "
            f"value; raise max.message.bytes of {letters} to {limits[requests] + DEAD_LETTER_HEADERS} or more"
        )
    if limits[responses] < LARGEST_RESPONSE:
        faults.append(
            f"{responses} takes {limits[responses]} bytes, and a response may have {LARGEST_RESPONSE}: "
            f"raise its max.message.bytes, or requests become dead letters"
        )
    if settings.kafka_max_message_bytes > limits[requests] + BATCH_BYTES:
        faults.append(
            f"KAFKA_MAX_MESSAGE_BYTES={settings.kafka_max_message_bytes}, and {requests} takes {limits[requests]} bytes: "
            f"larger requests never get here"
        )
    return faults
