"""Apache Kafka in a container."""

from __future__ import annotations

import contextlib
import gc
import warnings

from docker.errors import DockerException
from testcontainers.core.container import DockerContainer
from testcontainers.core.docker_client import DockerClient
from testcontainers.core.wait_strategies import LogMessageWaitStrategy

from tests.broker.interface import START_TIMEOUT, Broker
from tests.broker.ports import free_ports
from tests.broker.properties import listeners, single_node

IMAGE = "apache/kafka:4.3.1"
PORT = 9092
CONTROLLER_PORT = 9093


def docker_answers() -> bool:
    """Return whether a Docker engine responds; its command alone is not enough."""
    responds = False
    with warnings.catch_warnings():
        # A client that finds no engine leaves its socket to the garbage collector, whose warning would fail an unrelated test.
        warnings.simplefilter("ignore", ResourceWarning)
        with contextlib.suppress(DockerException), contextlib.closing(DockerClient().client) as client:
            responds = bool(client.ping())
        gc.collect()
    return responds


class DockerKafka(Broker):
    """Apache Kafka in a container, which is removed even if this process is killed."""

    name = f"{IMAGE} (Docker)"

    def __init__(self) -> None:
        self._container = DockerContainer(IMAGE)
        # Kafka must know the address of its clients before it starts, so Docker cannot choose the port.
        (port,) = free_ports(1)
        self.bootstrap_servers = f"{self._container.get_container_host_ip()}:{port}"
        properties = single_node() | listeners(
            "",
            {"PLAINTEXT": PORT, "CONTROLLER": CONTROLLER_PORT},
            {"PLAINTEXT": self.bootstrap_servers},
        )
        for key, value in properties.items():
            self._container.with_env(f"KAFKA_{key.upper().replace('.', '_')}", value)
        self._container.with_bind_ports(PORT, port)
        self._container.waiting_for(LogMessageWaitStrategy("Kafka Server started").with_startup_timeout(START_TIMEOUT))
        self._container.start()

    def close(self) -> None:
        """Remove the container."""
        self._container.stop()
