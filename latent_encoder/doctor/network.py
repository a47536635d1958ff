"""Checks for Kafka mode: brokers, topics, and the HTTP port."""

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
"""Far more than a broker takes to respond; docs/command-line.md has this number."""

Topics = dict[str, Any]


def check_kafka(installation: Installation) -> Iterator[Check]:
    """Check that a broker responds and has the topics. Faults are crosses if KAFKA_BOOTSTRAP_SERVERS is set, else warnings."""
    settings = installation.settings
    named = installation.is_set("kafka_bootstrap_servers")
    try:
        topics = _topics_there(settings)
    except SettingsError as exc:
        yield cross_of("kafka broker", exc, "Fix the setting.")
    except KafkaFailed as exc:
        advice = "Start the broker, or set KAFKA_BOOTSTRAP_SERVERS and KAFKA_SECURITY_PROTOCOL to those of the broker."
        if not named:
            advice = "Only Kafka mode needs it: set KAFKA_BOOTSTRAP_SERVERS there."
        yield Check("kafka broker", _fault(named=named), str(exc), advice)
    else:
        yield tick("kafka broker", f"{settings.kafka_bootstrap_servers} responds")
        for name in topics_of(settings):
            yield _topic(name, topics, settings, named=named)


def check_http_port(installation: Installation) -> Iterator[Check]:
    """Check that HTTP_PORT is free, or that a worker responds on it."""
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
    """Return the broker's metadata of its topics, by name.

    Raises:
        SettingsError: no client can be made with these settings.
        KafkaFailed: no broker responds, or it refuses this client.
    """
    connection = BrokerState(settings.kafka_bootstrap_servers)
    admin = make_client(AdminClient, {**admin_properties(settings), "error_cb": connection.on_error}, settings)
    try:
        return dict(admin.list_topics(timeout=BROKER_TIMEOUT_S).topics)
    except KafkaException as exc:
        admin.poll(0)  # calls `on_error` with the reason, which this exception lacks
        connection.check()
        raise KafkaFailed(str(connection.fault)) from exc


def _topic(name: str, topics: Topics, settings: Settings, *, named: bool) -> Check:
    """Report whether a topic exists or will be created."""
    if name in topics:
        return tick("kafka topic", f"{name} has {len(topics[name].partitions)} partitions")
    if settings.kafka_create_topics:
        return tick("kafka topic", f"{name} does not exist and will be created (KAFKA_CREATE_TOPICS)")
    advice = "Create it, or set KAFKA_CREATE_TOPICS=true; until then a worker waits for it."
    return Check("kafka topic", _fault(named=named), f"{name} does not exist", advice)


def _taken(installation: Installation, place: str, reason: str) -> Check:
    """Return the check of a port that is taken: a tick if a worker that is alive has it."""
    try:
        response, alive = ask(installation.settings)
    except (OSError, ValueError):
        state = _fault(named=installation.is_set("kafka_bootstrap_servers"))
        return Check("http port", state, f"{place} cannot be listened on ({reason})", "Set HTTP_PORT to a free port, or to 0.")
    found = (
        f"a worker responds on {place}: {'alive' if alive else 'not alive'}, {'ready' if response['ready'] else 'not ready'}"
    )
    if alive:
        return tick("http port", found)
    return warning("http port", found, "Run python main.py health to see which part of it is not alive.")
