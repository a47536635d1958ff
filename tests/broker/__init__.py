"""A Kafka-protocol broker for the tests, the best that the machine offers."""

from __future__ import annotations

import os

from tests.broker.apache_kafka import ApacheKafka
from tests.broker.cluster import ApacheKafkaCluster
from tests.broker.docker_engine import DockerKafka, docker_answers
from tests.broker.interface import GIVEN, Broker, BrokerError, GivenBroker
from tests.broker.maven import java_and_maven_are_here
from tests.broker.tansu import Tansu

__all__ = [
    "ApacheKafka",
    "ApacheKafkaCluster",
    "Broker",
    "BrokerError",
    "DockerKafka",
    "GivenBroker",
    "Tansu",
    "choose",
    "choose_local",
]


def choose() -> type[GivenBroker] | type[DockerKafka] | type[ApacheKafka] | type[Tansu]:
    """Return the class of the best broker that can run here; calling it starts a broker."""
    if os.environ.get(GIVEN):
        return GivenBroker
    return DockerKafka if docker_answers() else choose_local()


def choose_local() -> type[ApacheKafka] | type[Tansu]:
    """Return the class of the best broker that can run here without Docker."""
    return ApacheKafka if java_and_maven_are_here() else Tansu
