"""librdkafka's properties, built in one place from the settings.

The properties that our guarantees depend on are fixed here. The file that KAFKA_CLIENT_CONFIG names may set every other one:
https://github.com/confluentinc/librdkafka/blob/master/CONFIGURATION.md
"""

from __future__ import annotations

import configparser
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaException, Producer
from confluent_kafka.admin import AdminClient
from pydantic import SecretStr

from config import Settings, SettingsError
from errors import one_line

Properties = dict[str, Any]
Client = TypeVar("Client", Consumer, Producer, AdminClient)

# The reason for each property that the file may not set. The names are librdkafka's, aliases included.
AT_LEAST_ONCE = "an offset would be committed before its request has a response"
IN_ORDER = "responses could be lost or sent twice when the connection breaks"
OWN_SETTING = "there is a setting for it: "
REFUSED = {
    "enable.auto.commit": AT_LEAST_ONCE,
    "auto.commit.enable": AT_LEAST_ONCE,
    "auto.commit.interval.ms": AT_LEAST_ONCE,
    "enable.auto.offset.store": AT_LEAST_ONCE,
    "auto.offset.reset": "requests sent before the first start would be skipped",
    "isolation.level": "requests of aborted transactions would be encoded",
    "enable.idempotence": IN_ORDER,
    "acks": IN_ORDER,
    "request.required.acks": IN_ORDER,
    "retries": IN_ORDER,
    "message.send.max.retries": IN_ORDER,
    "message.timeout.ms": "responses would be dropped while the broker is away",
    "delivery.timeout.ms": "responses would be dropped while the broker is away",
    "delivery.report.only.error": "no response would count as acknowledged",
    "offset.store.method": "offsets belong to the broker",
    "message.max.bytes": "large dead letters would be dropped",
    "partition.assignment.strategy": "a rebalance would take every worker's partitions",
    "enable.partition.eof": "it adds events that are no requests",
    "statistics.interval.ms": "the service watches its connections by it",
    "allow.auto.create.topics": OWN_SETTING + "KAFKA_CREATE_TOPICS",
    "bootstrap.servers": OWN_SETTING + "KAFKA_BOOTSTRAP_SERVERS",
    "metadata.broker.list": OWN_SETTING + "KAFKA_BOOTSTRAP_SERVERS",
    "group.id": OWN_SETTING + "KAFKA_CONSUMER_GROUP",
    "group.protocol": OWN_SETTING + "KAFKA_GROUP_PROTOCOL",
    "transactional.id": OWN_SETTING + "KAFKA_TRANSACTIONAL_ID",
}

CLASSIC_ONLY = {
    "session.timeout.ms": "the broker's group.consumer.session.timeout.ms is in force",
    "heartbeat.interval.ms": "the broker's group.consumer.heartbeat.interval.ms is in force",
    "group.protocol.type": "it belongs to KAFKA_GROUP_PROTOCOL=classic",
}
"""The reason for each property that the file may not set with KAFKA_GROUP_PROTOCOL=consumer."""

LARGEST_MESSAGE = 1_000_000_000
"""Bytes; librdkafka's maximum. The limit of the topic decides whether a record is too large."""

STATISTICS_INTERVAL_MS = 1000
"""Once a second: the longest delay until a broker that went away is noticed."""

DEFAULT_MAX_POLL_INTERVAL_MS = 300_000
"""librdkafka's default."""

SYSLOG_CRITICAL = 2
"""librdkafka's log level that leaves out its message about each attempt to connect."""

SECTION = "properties"
"""The section header that `configparser` demands and a properties file lacks."""


def consumer_properties(settings: Settings) -> Properties:
    """Return the properties of the consumer: commits by hand only, reads from the start, keeps its partitions in a rebalance.

    Raises:
        SettingsError: the file of further properties cannot be used.
    """
    return {
        "queued.max.messages.kbytes": 4096,  # 4 MiB a partition, which librdkafka fetches ahead of KAFKA_PREFETCH
        "fetch.wait.max.ms": 100,  # ms; a resumed partition waits for the fetch that is under way
        **_common(settings),
        "group.id": settings.kafka_consumer_group,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "earliest",
        "isolation.level": "read_committed",
        "partition.assignment.strategy": "cooperative-sticky",
        "allow.auto.create.topics": False,
        "statistics.interval.ms": STATISTICS_INTERVAL_MS,
    }


def member_properties(settings: Settings) -> Properties:
    """Return the properties of a consumer that joins the group: those of a consumer, for the protocol of the settings.

    Raises:
        SettingsError: the file of further properties cannot be used.
    """
    properties = consumer_properties(settings)
    if settings.kafka_group_instance_id:
        properties["group.instance.id"] = settings.kafka_group_instance_id
    if settings.kafka_group_protocol == "consumer":
        _refuse(settings.kafka_client_config, properties, CLASSIC_ONLY, " together with KAFKA_GROUP_PROTOCOL=consumer")
        del properties["partition.assignment.strategy"]  # the broker assigns
        properties["group.protocol"] = "consumer"
    return properties


def producer_properties(settings: Settings, *, transactional: bool = True) -> Properties:
    """Return the properties of the producer: idempotent, acknowledged by all replicas, never giving up by itself.

    Tools that produce beside a worker pass `transactional=False`: with the worker's transactional id they would stop it.

    Raises:
        SettingsError: the file of further properties cannot be used.
    """
    transactional_id = settings.kafka_transactional_id if transactional else None
    return {
        "partitioner": "murmur2_random",  # the partitioner of Java's producers, so the same key gets the same partition
        "linger.ms": 0,
        **_common(settings),
        "enable.idempotence": True,
        "acks": "all",
        "message.max.bytes": LARGEST_MESSAGE,
        # 0 is no limit: without a transaction, a response waits for the broker as long as that takes.
        **({"transactional.id": transactional_id} if transactional_id else {"message.timeout.ms": 0}),
    }


def admin_properties(settings: Settings) -> Properties:
    """Return the properties of the client that looks for topics and creates them.

    Raises:
        SettingsError: the file of further properties cannot be used.
    """
    return _common(settings)


def poll_interval_s(properties: Properties) -> float:
    """Return the seconds between two polls after which the group takes a consumer's partitions away."""
    return float(properties.get("max.poll.interval.ms", DEFAULT_MAX_POLL_INTERVAL_MS)) / 1000


def make_client(kind: Callable[..., Client], properties: Properties, settings: Settings) -> Client:
    """Return a client of that kind, which logs to the logger `librdkafka`.

    Raises:
        SettingsError: librdkafka refuses a property. The message names the property and holds no secret.
    """
    try:
        return kind(properties, logger=logging.getLogger("librdkafka"))
    except (KafkaException, ValueError, TypeError) as exc:
        text = one_line(exc.args[0].str() if isinstance(exc, KafkaException) else exc)
        for secret in (settings.kafka_sasl_password, settings.kafka_ssl_key_password):
            text = text.replace(secret.get_secret_value(), "***") if secret else text
        raise SettingsError(f"Kafka client: {text}") from exc


def _common(settings: Settings) -> Properties:
    named = {
        "bootstrap.servers": settings.kafka_bootstrap_servers,
        "security.protocol": settings.kafka_security_protocol,
        "sasl.mechanism": settings.kafka_sasl_mechanism,
        "sasl.username": settings.kafka_sasl_username,
        "sasl.password": settings.kafka_sasl_password,
        "ssl.ca.location": settings.kafka_ssl_ca_location,
        "ssl.certificate.location": settings.kafka_ssl_certificate_location,
        "ssl.key.location": settings.kafka_ssl_key_location,
        "ssl.key.password": settings.kafka_ssl_key_password,
    }
    given = {name: _plain(value) for name, value in named.items() if value is not None}
    # The worker logs once that its broker is away. librdkafka would log it at every attempt to connect.
    quiet = {} if settings.log_level == "DEBUG" else {"log_level": SYSLOG_CRITICAL}
    return {"client.id": "latent-encoder", **quiet, **_from_file(settings.kafka_client_config), **given}


def _plain(value: str | Path | SecretStr) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def _from_file(path: Path | None) -> Properties:
    """Read a file of `name=value` lines, in which lines that start with `#` are comments."""
    if path is None:
        return {}
    parser = configparser.ConfigParser(
        delimiters=("=",), comment_prefixes=("#",), interpolation=None, default_section=SECTION, empty_lines_in_values=False
    )
    parser.optionxform = str  # type: ignore[assignment]  # by default names are changed to lower case
    try:
        parser.read_string(f"[{SECTION}]\n{path.read_text(encoding='utf-8')}", str(path))
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f"KAFKA_CLIENT_CONFIG: {path} cannot be read ({one_line(exc)}).") from exc
    except configparser.Error as exc:
        raise SettingsError(f"KAFKA_CLIENT_CONFIG: {path} is not a file of name=value lines.") from exc
    properties = dict(parser.defaults())
    _refuse(path, properties, REFUSED)
    return properties


def _refuse(path: Path | None, names: Iterable[str], reasons: Mapping[str, str], condition: str = "") -> None:
    refused = ", ".join(f"{name} ({reasons[name]})" for name in names if name in reasons)
    if refused:
        raise SettingsError(f"KAFKA_CLIENT_CONFIG: {path} may not set {refused}{condition}. Remove it from the file.")
