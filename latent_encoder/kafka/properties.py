"""librdkafka's properties, built in one place from the settings.

The properties that our guarantees depend on are fixed here. The file that KAFKA_CLIENT_CONFIG names may set every other one:
https://github.com/confluentinc/librdkafka/blob/master/CONFIGURATION.md
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaException, Producer
from confluent_kafka.admin import AdminClient
from pydantic import SecretStr

from config import Settings, SettingsError
from errors import one_line
from latent_encoder.kafka.property_file import ALIASES, is_secret, read_property_file
from latent_encoder.masking import HIDDEN, keep_secret

Properties = dict[str, Any]
Client = TypeVar("Client", Consumer, Producer, AdminClient)

# The reason for each property that the file may not set. The names are librdkafka's, aliases included.
AT_LEAST_ONCE = "an offset would be committed before its request has a response"
IN_ORDER = "responses could be lost or sent twice when the connection breaks"
OWN_SETTING = "there is a setting for it: "
NO_TEXT = "the client takes an object of Python for it, not text"
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
    "default.topic.config": NO_TEXT,
    "error_cb": NO_TEXT,
    "logger": NO_TEXT,
    "oauth_cb": NO_TEXT,
    "on_commit": NO_TEXT,
    "on_delivery": NO_TEXT,
    "stats_cb": NO_TEXT,
    "throttle_cb": NO_TEXT,
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

SMALL_FETCHES: Properties = {"queued.max.messages.kbytes": 64, "max.partition.fetch.bytes": 65_536}
"""64 KiB of requests, about 160, are fetched ahead of KAFKA_PREFETCH. librdkafka drops them if their partition is paused. With
slow encodes and a backlog that is once for each image. A larger record still comes, alone."""

DEFAULT_MAX_POLL_INTERVAL_MS = 300_000
"""librdkafka's default."""

REFRESH_MS = 1000
"""Milliseconds between two looks of a transactional producer at the broker. After a lost connection,
`send_offsets_to_transaction` of librdkafka 2.16 waits for one that something else makes, whatever its own timeout is; by
default that takes up to five minutes."""

SYSLOG_CRITICAL = 2
"""librdkafka's log level that leaves out its message about each attempt to connect."""

ACCESS = ("sasl.", "ssl.", "security.")
"""The beginnings of the properties among which a secret may be put in the wrong place."""

SHORTEST_MASKED = 5
"""Characters of a value that an error of librdkafka must not show. Shorter ones are words of the errors, such as `true`."""

SEEN_OF_VALUE = 60
"""Characters of a value to look for in an error of librdkafka, which has room for some hundred."""

INVALID_VALUE = re.compile(r'(?<=Invalid value )"[^"]*("|\Z) ?|(?<=Invalid value) (for .*?"): .*', re.DOTALL)
"""The value in librdkafka's two messages about an invalid one: `Invalid value "rar" for …`, `Invalid value for …: rar`."""


def consumer_properties(settings: Settings, fetches: Properties | None = None) -> Properties:
    """Return the properties of the consumer: commits by hand only, reads from the start, keeps its partitions in a rebalance.

    `fetches` are the sizes of its fetches, which the file may change.

    Raises:
        SettingsError: the file of further properties cannot be used.
    """
    return {
        "queued.max.messages.kbytes": 4096,  # for tools, which read a topic without pauses
        **(fetches or {}),
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
    properties = consumer_properties(settings, SMALL_FETCHES)
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
    transaction = {"transactional.id": transactional_id, "topic.metadata.refresh.interval.ms": REFRESH_MS}
    return {
        "partitioner": "murmur2_random",  # the partitioner of Java's producers, so the same key gets the same partition
        "linger.ms": 0,
        **_common(settings),
        "enable.idempotence": True,
        "acks": "all",
        "message.max.bytes": LARGEST_MESSAGE,
        # 0 is no limit: without a transaction, a response waits for the broker as long as that takes.
        **(transaction if transactional_id else {"message.timeout.ms": 0}),
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
    except Exception as exc:
        # Not `from exc`: its text has the value. `SystemError` and others come from values that the client does not expect.
        raise SettingsError(f"Kafka client: {_refusal(exc, properties, settings)}") from None


def _refusal(exc: Exception, properties: Properties, settings: Settings) -> str:
    """Return librdkafka's reason on one line: without values that may be secrets, and with the line that it is about."""
    reason = exc.args[0].str() if isinstance(exc, KafkaException) else str(exc.__cause__ or exc)
    in_file = read_property_file(settings.kafka_client_config) if settings.kafka_client_config else {}
    about = [f"{name}, line {found.line}" for name, found in in_file.items() if _is_about(reason, name, found.value)]
    place = f" ({'; '.join(about)} of KAFKA_CLIENT_CONFIG={settings.kafka_client_config})" if about else ""
    hidden = {str(value) for name, value in properties.items() if name.startswith(ACCESS) or is_secret(name)}
    shown = INVALID_VALUE.sub(lambda found: f" {found[2]}" if found[2] else "", reason)
    for value in sorted({*hidden, *(found.value for found in in_file.values())}, key=len, reverse=True):
        if len(value) >= SHORTEST_MASKED and value not in properties:
            shown = shown.replace(value, HIDDEN)
    return one_line(ValueError(shown)) + place


def _is_about(reason: str, name: str, value: str) -> bool:
    """Return whether a reason of librdkafka names a property, or has its value; librdkafka cuts long values."""
    named = re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", reason)
    return named is not None or (len(value) >= SHORTEST_MASKED and value[:SEEN_OF_VALUE] in reason)


def overridden_properties(settings: Settings) -> list[str]:
    """Return the properties in the file that a setting overrides with another value."""
    in_file, given = _from_file(settings.kafka_client_config), _from_settings(settings)
    return [name for name, value in in_file.items() if given.get(ALIASES.get(name, name), value) != value]


def _common(settings: Settings) -> Properties:
    # The worker logs once that its broker is away. librdkafka would log it at every attempt to connect.
    quiet = {} if settings.log_level == "DEBUG" else {"log_level": SYSLOG_CRITICAL}
    given = _from_settings(settings)
    further = {
        name: value for name, value in _from_file(settings.kafka_client_config).items() if ALIASES.get(name, name) not in given
    }
    return {"client.id": "latent-encoder", **quiet, **further, **given}


def _from_settings(settings: Settings) -> Properties:
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
    return {name: _plain(value) for name, value in named.items() if value is not None}


def _plain(value: str | Path | SecretStr) -> str:
    if not isinstance(value, SecretStr):
        return str(value)
    keep_secret(value.get_secret_value())  # settings that were copied with a change did not keep it
    return value.get_secret_value()


def _from_file(path: Path | None) -> Properties:
    """Return the properties of the file, all of them texts."""
    if path is None:
        return {}
    properties = {name: found.value for name, found in read_property_file(path).items()}
    _refuse(path, properties, REFUSED)
    return properties


def _refuse(path: Path | None, names: Iterable[str], reasons: Mapping[str, str], condition: str = "") -> None:
    refused = ", ".join(f"{name} ({reasons[name]})" for name in names if name in reasons)
    if refused:
        raise SettingsError(f"KAFKA_CLIENT_CONFIG: {path} may not set {refused}{condition}. Remove it from the file.")
