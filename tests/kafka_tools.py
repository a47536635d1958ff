"""Tools of the Kafka tests: topics for each test, a sender, readers, and workers as threads or as processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, KafkaError, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from config import Settings
from kafka_handler import KafkaHandler
from latent_encoder.kafka.records import Headers, Incoming
from latent_encoder.kafka.starts import parse_notes
from service import LatentEncoder
from tests.broker import ApacheKafka
from tests.held_encodes import Gate
from tests.helpers import IMAGES, PATIENCE_S, PROJECT, VAE, clean_environment

QUIET: dict[str, Any] = {"log_level": 0}  # brokers go away here on purpose

both_protocols = pytest.mark.parametrize("protocol", ["classic", "consumer"])
"""Runs a test with each group protocol; the value is that of KAFKA_GROUP_PROTOCOL."""


@dataclass
class Topic:
    """A topic that is read from its start, committed transactions only, with the records that were read."""

    name: str
    consumer: Consumer
    partitions: int
    records: list[Incoming] = field(default_factory=list)
    _next: dict[int, int] = field(default_factory=dict)
    """The offset behind the last record that was read of each partition."""
    _at_end: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._assign()

    def read(self, enough: Callable[[list[Incoming]], bool], patience: float = PATIENCE_S) -> list[Incoming]:
        """Return all records so far, as soon as they are enough."""
        deadline = time.monotonic() + patience
        while not enough(self.records):
            assert time.monotonic() < deadline, f"{self.name} has only {len(self.records)} records after {patience} s"
            self._poll()
        return self.records

    def take(self, count: int, patience: float = PATIENCE_S) -> list[Incoming]:
        """Return the first `count` records, in the order of their arrival."""
        return self.read(lambda records: len(records) >= count, patience)[:count]

    def all_within(self, seconds: float) -> list[Incoming]:
        """Return all records that the topic has after `seconds`, however long it takes to read them."""
        time.sleep(seconds)
        self._assign()
        return self.read(lambda _: len(self._at_end) == self.partitions)

    def _assign(self) -> None:
        """Go on behind the records that were read; the leader of each partition tells once more when its end is reached."""
        self._at_end.clear()
        self.consumer.assign([TopicPartition(self.name, n, self._next.get(n, 0)) for n in range(self.partitions)])

    def _poll(self) -> None:
        message = self.consumer.poll(0.2)
        if message is None:
            return
        partition, error = message.partition() or 0, message.error()
        if error is None:
            self.records.append(Incoming.of(message))
            self._next[partition] = (message.offset() or 0) + 1
        elif error.code() == KafkaError._PARTITION_EOF:
            self._at_end.add(partition)


@dataclass(frozen=True)
class Events:
    """The log events of a worker in this process."""

    caplog: pytest.LogCaptureFixture

    def __call__(self, name: str) -> list[dict[str, Any]]:
        """Return the events with that name, with their fields."""
        return [vars(record) for record in self.caplog.records if record.getMessage() == name]


def read_responses(topic: Topic, count: int, patience: float = PATIENCE_S) -> list[dict[str, Any]]:
    """Return the first `count` responses, parsed."""
    return [json.loads(record.value or b"") for record in topic.take(count, patience)]


def request_ids(topic: Topic) -> Counter[str]:
    """Count the responses of each request among the records that were read."""
    return Counter(json.loads(record.value or b"")["request_id"] for record in topic.records)


class Bench:
    """The topics of one test, and everything that a test does with them."""

    def __init__(self, bootstrap_servers: str, folder: Path, partitions: int = 1) -> None:
        self.servers = bootstrap_servers
        self.folder = folder
        self.partitions = partitions
        name = uuid4().hex[:12]
        self.request_topic, self.response_topic, self.dlq_topic = f"{name}-requests", f"{name}-responses", f"{name}-dlq"
        self.group = f"{name}-group"
        self.admin = AdminClient({**QUIET, "bootstrap.servers": bootstrap_servers})
        self._closing: list[Callable[[], object]] = []
        sender = {"linger.ms": 0, "message.max.bytes": 100_000_000}  # bytes; the topic decides
        self._producer = Producer({**QUIET, "bootstrap.servers": bootstrap_servers, **sender})

    def create(self, *names: str, config: Mapping[str, str] | None = None, partitions: int | None = None) -> None:
        """Create the named topics, or the three of the test if none is named."""
        wanted = names or (self.request_topic, self.response_topic, self.dlq_topic)
        new = [NewTopic(name, partitions or self.partitions, 1, config=dict(config or {})) for name in wanted]
        for created in self.admin.create_topics(new).values():
            created.result()

    def settings(self, base: Settings, **changes: Any) -> Settings:
        """Return `base` with the broker, topics, group and folder of this bench."""
        return base.model_copy(
            update={
                "mode": "kafka",
                "kafka_bootstrap_servers": self.servers,
                "kafka_request_topic": self.request_topic,
                "kafka_response_topic": self.response_topic,
                "kafka_dlq_topic": self.dlq_topic,
                "kafka_consumer_group": self.group,
                "output_dir": str(self.folder / "output"),
                "megapixels": 0.01,
                **changes,
            }
        )

    def send(
        self,
        value: Mapping[str, Any] | bytes | None,
        *,
        key: bytes | None = None,
        headers: Headers = (),
        partition: int = -1,
    ) -> tuple[int, int]:
        """Send one record and return its partition and offset; a request without an image gets one."""
        if isinstance(value, Mapping):
            value = json.dumps({"image_path": str(IMAGES / "photo.jpg"), **value}).encode()
        places: list[tuple[int, int]] = []
        self._producer.produce(
            self.request_topic,
            value=value,
            key=key,
            headers=list(headers),
            partition=partition,
            on_delivery=lambda _, message: places.append((message.partition() or 0, message.offset() or 0)),
        )
        assert self._producer.flush(30) == 0
        return places[0]

    def topic(self, name: str) -> Topic:
        """Return a reader of a topic, from the topic's start on, whatever the group has committed."""
        properties = {
            **QUIET,
            "bootstrap.servers": self.servers,
            "group.id": f"{name}-reader",
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
        }
        consumer = Consumer(properties)
        self._closing.append(consumer.close)
        return Topic(name, consumer, self.partitions)

    @property
    def responses(self) -> Topic:
        """A new reader of the responses, from the start on."""
        return self.topic(self.response_topic)

    @property
    def dead_letters(self) -> Topic:
        """A new reader of the dead letters, from the start on."""
        return self.topic(self.dlq_topic)

    def committed(self) -> dict[int, int]:
        """Return the group's committed offset of each partition in which a request is done; beside 0 are notes alone."""
        return {place.partition: place.offset for place in self._offsets() if place.offset > 0}

    def notes(self) -> dict[int, int]:
        """Return the notes of starts beside the group's committed offsets, of all partitions together."""
        return {offset: count for place in self._offsets() for offset, count in parse_notes(place.metadata)[1].items()}

    def _offsets(self) -> list[TopicPartition]:
        wanted = [TopicPartition(self.request_topic, n) for n in range(self.partitions)]
        found = self.admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(self.group, wanted)])[self.group].result()
        return list(found.topic_partitions)

    def wait_for_commit(self, expected: Mapping[int, int], patience: float = PATIENCE_S) -> None:
        """Wait until the group's offsets are these."""
        wait_until(lambda: self.committed() == expected, f"offsets {expected}", patience)

    @contextmanager
    def worker(self, encoder: LatentEncoder, settings: Settings) -> Iterator[Worker]:
        """Run a worker in a thread and stop it at the end; raise its error unless the test has asked for it by `failure`."""
        worker = Worker(KafkaHandler(settings), encoder)
        worker.start()
        try:
            yield worker
        finally:
            worker.handler.stop()
            worker.end()
            if isinstance(worker.outcome, Exception) and not worker.looked_at:
                raise worker.outcome

    def process(self, *arguments: str, **environment: str) -> AbstractContextManager[Process]:
        """Run a worker as a process, and kill it at the end if it is still there."""
        return self._running([PROJECT / "main.py", "--mode", "kafka", *arguments], environment)

    def quick_process(self, **environment: str) -> AbstractContextManager[Process]:
        """Run a worker as a process that takes over claims in a bucket sooner (`quick_claims.py`)."""
        return self._running(["-m", "tests.quick_claims", "--mode", "kafka"], environment)

    def faulty_process(self, **environment: str) -> AbstractContextManager[Process]:
        """Run a worker as a process that some requests kill or hang (`faulty_encodes.py`)."""
        return self._running(["-m", "tests.faulty_encodes", "--mode", "kafka"], environment)

    def held_process(self, gate: Gate, **environment: str) -> AbstractContextManager[Process]:
        """Run a worker as a process whose encodes the gate holds, and kill it at the end if it is still there."""
        return self._running(["-m", "tests.held_encodes", gate.folder, gate.stage, "--mode", "kafka"], environment)

    @contextmanager
    def _running(self, command: Sequence[str | Path], environment: Mapping[str, str]) -> Iterator[Process]:
        process = Process(self, command, environment)
        try:
            yield process
        finally:
            process.kill()

    def gate(self, stage: str = "encode_prepared") -> Gate:
        """Return a closed gate for the encodes of a worker, or for another stage; a test needs at most one."""
        folder = self.folder / "gate"
        folder.mkdir()
        return Gate(folder, stage)

    def close(self) -> None:
        for close in self._closing:
            close()


MakeBench = Callable[..., Bench]


class Worker(threading.Thread):
    """A `KafkaHandler` in a thread; `outcome` is the result of `run`, or its error."""

    def __init__(self, handler: KafkaHandler, encoder: LatentEncoder) -> None:
        super().__init__(name="worker", daemon=True)
        self.handler = handler
        self.outcome: bool | Exception | None = None
        self.looked_at = False
        self._encoder = encoder

    def run(self) -> None:
        try:
            self.outcome = self.handler.run(self._encoder)
        except Exception as exc:
            self.outcome = exc

    def end(self) -> None:
        """Wait until the worker ends."""
        self.join(PATIENCE_S)
        assert not self.is_alive()

    def failure(self) -> Exception:
        """Wait until the worker fails, and return its error."""
        self.end()
        self.looked_at = True
        assert isinstance(self.outcome, Exception)
        return self.outcome


class Process:
    """A worker as a process, with the VAE of the tests; its log lines are JSON in a file."""

    def __init__(self, bench: Bench, command: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        self.log_file = bench.folder / f"worker-{uuid4().hex[:6]}.log"
        variables = {
            "KAFKA_BOOTSTRAP_SERVERS": bench.servers,
            "KAFKA_REQUEST_TOPIC": bench.request_topic,
            "KAFKA_RESPONSE_TOPIC": bench.response_topic,
            "KAFKA_DLQ_TOPIC": bench.dlq_topic,
            "KAFKA_CONSUMER_GROUP": bench.group,
            "OUTPUT_DIR": str(bench.folder / "output"),
            "VAE_MODEL_NAME": VAE,
            "MEGAPIXELS": "0.01",
            "DEVICE": "cpu",
            "HTTP_PORT": "0",
            "PYTHONPATH": str(PROJECT),
            **environment,
        }
        with self.log_file.open("wb") as log:
            self.popen = subprocess.Popen(
                [sys.executable, *command],
                env=clean_environment() | variables,
                cwd=bench.folder,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def log(self) -> list[dict[str, Any]]:
        """Return the log events so far; a line that is not JSON is an event with that text."""
        lines = self.log_file.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) if line.startswith("{") and line.endswith("}") else {"event": line} for line in lines]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the log events with that name."""
        return [event for event in self.log() if event["event"] == name]

    def wait_for(self, event: str, count: int = 1, patience: float = PATIENCE_S) -> None:
        """Wait until the worker has logged the event `count` times."""
        wait_until(lambda: self.popen.poll() is not None or len(self.events(event)) >= count, event, patience)
        assert len(self.events(event)) >= count, self.log_file.read_text()

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def end(self, patience: float = PATIENCE_S) -> int:
        """Wait until the worker ends by itself and return its exit status; it must have printed nothing on standard output."""
        stdout, _ = self.popen.communicate(timeout=patience)
        assert stdout == b""
        return self.popen.returncode

    def kill(self) -> None:
        """Kill the worker with SIGKILL if it still runs."""
        if self.popen.poll() is None:
            os.kill(self.popen.pid, signal.SIGKILL)
        self.popen.communicate()


def wait_until(condition: Callable[[], bool], awaited: str, patience: float = PATIENCE_S, poll_s: float = 0.1) -> None:
    """Wait until the condition holds; `awaited` names it in the error."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"not within {patience} s: {awaited}"
        time.sleep(poll_s)


def client_config(folder: Path, **properties: object) -> Path:
    """Write a file of librdkafka properties; an underscore in a name stands for a dot."""
    file = folder / f"{uuid4().hex[:6]}.properties"
    file.write_text("".join(f"{name.replace('_', '.')}={value}\n" for name, value in properties.items()))
    return file


def as_environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as the environment of a process."""
    return {name.upper(): str(value) for name, value in settings.items()}


def sasl_settings(broker: ApacheKafka, password: str | None = None) -> dict[str, Any]:
    """Return the settings for the listener with passwords."""
    return {
        "kafka_bootstrap_servers": broker.secure_bootstrap_servers,
        "kafka_security_protocol": "SASL_SSL",
        "kafka_sasl_mechanism": "SCRAM-SHA-512",
        "kafka_sasl_username": broker.username,
        "kafka_sasl_password": password or broker.password,
        "kafka_ssl_ca_location": str(broker.ca_file),
    }


def quick_failover(folder: Path, protocol: str = "classic") -> dict[str, str]:
    """Return the environment of a worker whose group notices within seconds that it has died.

    In the protocol `consumer` the broker has the session timeout: 3 s for the brokers that are started here.
    """
    if protocol == "consumer":
        return {"KAFKA_GROUP_PROTOCOL": protocol}
    return {"KAFKA_CLIENT_CONFIG": str(client_config(folder, session_timeout_ms=2000, heartbeat_interval_ms=500))}
