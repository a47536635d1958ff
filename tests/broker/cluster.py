"""Three real Apache Kafka brokers on this machine, which a test may kill and start again one by one."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.broker.apache_kafka import CLUSTER_ID, JAVA
from tests.broker.interface import Broker, BrokerError, wait_for_response
from tests.broker.maven import class_path, kafka_version
from tests.broker.ports import free_ports, require_free
from tests.broker.process import Process
from tests.broker.properties import cluster_node

SIZE = 3
CONTROLLER = 1


class ApacheKafkaCluster(Broker):
    """Brokers 1, 2 and 3. Topics have three replicas and need two of them in sync.

    Broker 1 is the only controller. It has to stay up: with a controller in each broker, two dead brokers would leave the
    cluster without a majority of controllers.
    """

    name = f"three brokers of Apache Kafka {kafka_version()}"

    def __init__(self) -> None:
        """Start all brokers at the same time."""
        *ports, controller_port = free_ports(SIZE + 1)
        self._ports = {node: [port] for node, port in enumerate(ports, start=1)}
        self.bootstrap_servers = ",".join(f"127.0.0.1:{port}" for port in ports)
        self._ports[CONTROLLER].append(controller_port)
        self._class_path = class_path()
        self._folder = Path(tempfile.mkdtemp(prefix="latent-encoder-kafka-"))
        self._processes: dict[int, Process] = {}
        try:
            self._format()
            for node in self._ports:
                self._launch(node)
            for node in self._ports:
                self._wait(node)
        except BaseException:
            self.close()
            raise

    @property
    def dead(self) -> list[int]:
        """The brokers that do not run."""
        return [node for node in self._ports if node not in self._processes]

    def start(self, node: int) -> None:
        """Start a broker again with its data, and wait until it responds."""
        self._launch(node)
        self._wait(node)

    def stop(self, node: int) -> None:
        """Shut a broker down in good order: others take its partitions over first."""
        self._processes.pop(node).stop()

    def kill(self, node: int) -> None:
        """Kill a broker; its data stays as it is."""
        self._processes.pop(node).kill()

    def stored_bytes(self, node: int, topic: str) -> int:
        """Return how much of a topic's records a broker has stored.

        Readers cannot tell: they see only what as many brokers have as `min.insync.replicas` says.
        """
        return sum(file.stat().st_size for file in self._data(node).glob(f"{topic}-*/*.log"))

    def close(self) -> None:
        """Kill all brokers and delete their data."""
        for node in list(self._processes):
            self.kill(node)
        shutil.rmtree(self._folder)

    def _launch(self, node: int) -> None:
        require_free(self._ports[node])
        command = self._java("kafka.Kafka", str(self._properties(node)))
        self._processes[node] = Process(command, self._folder / f"{node}.log")

    def _wait(self, node: int) -> None:
        wait_for_response(f"127.0.0.1:{self._ports[node][0]}", self._processes[node].check)

    def _properties(self, node: int) -> Path:
        return self._folder / f"{node}.properties"

    def _data(self, node: int) -> Path:
        return self._folder / f"data-{node}"

    def _java(self, main_class: str, *arguments: str) -> list[str]:
        return [*JAVA, "-Xmx256m", "-cp", self._class_path, main_class, *arguments]

    def _format(self) -> None:
        """Write the properties and the data folder that each broker starts from."""
        controller = f"{CONTROLLER}@127.0.0.1:{self._ports[CONTROLLER][1]}"
        running = []
        for node, ports in self._ports.items():
            properties = cluster_node(node, ports, controller) | {"log.dirs": str(self._data(node))}
            self._properties(node).write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
            command = self._java("kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(self._properties(node)))
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        for process in running:
            output, _ = process.communicate()
            if process.returncode != 0:
                raise BrokerError(f"Apache Kafka cannot prepare its data:\n{output}")
