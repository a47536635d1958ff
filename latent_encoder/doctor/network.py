"""Checks of what Kafka mode needs: brokers, topics, and the HTTP port."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from config import Settings, SettingsError
from errors import KafkaFailed
from latent_encoder.doctor.check import Check, Installation, State, cross_of, tick, warning
from latent_encoder.kafka.connection import BrokerState
from latent_encoder.kafka.properties import admin_properties, make_client
from latent_encoder.kafka.topics import topics_of
from latent_encoder.telemetry.http_server import ask

BROKER_TIMEOUT_S = 5.0

Topics = dict[str, Any]


def check_kafka(installation: Installation) -> Iterator[Check]:
    """Whether a broker answers, and has the topics. What is wrong is a cross only where somebody named the brokers."""
    settings = installation.settings
    named = installation.is_set("kafka_bootstrap_servers")
    try:
        topics = _topics_there(settings)
    except SettingsError as exc:
        yield cross_of("kafka broker", exc, "Mend the setting.")
    except KafkaFailed as exc:
        advice = "Start the broker, or set KAFKA_BOOTSTRAP_SERVERS and KAFKA_SECURITY_PROTOCOL to what it has."
        if not named:
            advice = "Only Kafka mode needs it: set KAFKA_BOOTSTRAP_SERVERS there."
        yield Check("kafka broker", _fault(named=named), str(exc), advice)
    else:
        yield tick("kafka broker", f"{settings.kafka_bootstrap_servers} answers")
        for name in topics_of(settings):
            yield _topic(name, topics, settings, named=named)


def check_http_port(installation: Installation) -> Iterator[Check]:
    """Whether HTTP_PORT can be listened on, or a worker answers there already."""
    settings = installation.settings
    place = f"HTTP_PORT={settings.http_port} of HTTP_HOST={settings.http_host}"
    if not settings.http_port:
        yield tick("http port", "turned off (HTTP_PORT=0)")
        return
    try:
        family = socket.AF_INET6 if ":" in settings.http_host else socket.AF_INET
        socket.create_server((settings.http_host, settings.http_port), family=family).close()
    except OSError as exc:
        yield _taken(installation, place, exc.strerror or str(exc))
    else:
        yield tick("http port", f"{place} is free")


def _fault(*, named: bool) -> State:
    return State.CROSS if named else State.WARNING


def _topics_there(settings: Settings) -> Topics:
    """What the broker says of its topics, by name.

    Raises:
        SettingsError: there can be no client with these settings.
        KafkaFailed: no broker answers, or it refuses this client.
    """
    connection = BrokerState(settings.kafka_bootstrap_servers)
    admin = make_client(AdminClient, {**admin_properties(settings), "error_cb": connection.on_error}, settings)
    try:
        return dict(admin.list_topics(timeout=BROKER_TIMEOUT_S).topics)
    except KafkaException as exc:
        admin.poll(0)  # lets `on_error` have what was wrong, of which this exception tells nothing
        connection.check()
        raise KafkaFailed(str(connection.fault)) from exc


def _topic(name: str, topics: Topics, settings: Settings, *, named: bool) -> Check:
    if name in topics:
        return tick("kafka topic", f"{name} has {len(topics[name].partitions)} partitions")
    if settings.kafka_create_topics:
        return tick("kafka topic", f"{name} is not there and will be created (KAFKA_CREATE_TOPICS)")
    advice = "Create it, or set KAFKA_CREATE_TOPICS=true; until then a worker waits for it."
    return Check("kafka topic", _fault(named=named), f"{name} is not there", advice)


def _taken(installation: Installation, place: str, reason: str) -> Check:
    """What to say of a port that cannot be listened on."""
    try:
        answer, alive = ask(installation.settings)
    except (OSError, ValueError):
        state = _fault(named=installation.is_set("kafka_bootstrap_servers"))
        return Check("http port", state, f"{place} cannot be listened on ({reason})", "Set HTTP_PORT to a free port, or to 0.")
    found = f"a worker answers on {place}: {'alive' if alive else 'not alive'}, {'ready' if answer['ready'] else 'not ready'}"
    if alive:
        return tick("http port", found)
    return warning("http port", found, "python main.py --mode health says which part of it is not.")
