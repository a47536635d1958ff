"""Three brokers, three replicas, two of them needed: leaders that die and partitions without enough replicas lose nothing."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from confluent_kafka import KafkaException, Producer
from confluent_kafka.cimpl import NewTopic

from tests.broker import ApacheKafkaCluster
from tests.broker.maven import java_and_maven_are_here
from tests.helpers import IMAGES
from tests.kafka_tools import QUIET, Bench, MakeBench, request_ids, wait_until

pytestmark = pytest.mark.skipif(not java_and_maven_are_here(), reason="needs Java 17 or newer and Maven")

REPLICAS = [[2, 3, 1], [3, 2, 1]]
"""The brokers of each partition; the first is the leader, and the next one that lives takes its place."""


@pytest.fixture(scope="module")
def brokers() -> Iterator[ApacheKafkaCluster]:
    with ApacheKafkaCluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(brokers: ApacheKafkaCluster) -> ApacheKafkaCluster:
    """All three brokers, those started again that an earlier test left dead."""
    for node in brokers.dead:
        brokers.start(node)
    return brokers


def create_replicated(bench: Bench) -> None:
    """Create the three topics with three replicas, two of which a write needs."""
    names = (bench.request_topic, bench.response_topic, bench.dlq_topic)
    new = [NewTopic(name, 2, replica_assignment=REPLICAS, config={"min.insync.replicas": "2"}) for name in names]
    for created in bench.admin.create_topics(new).values():
        created.result()


class Sender(threading.Thread):
    """Requests that are sent all the time, four a second, until the end of the block."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(name="sender", daemon=True)
        self.sent: set[str] = set()
        self._topic = bench.request_topic
        self._producer = Producer({**QUIET, "bootstrap.servers": bench.servers, "enable.idempotence": True})
        self._ended = threading.Event()

    @contextmanager
    def sending(self) -> Iterator[None]:
        self.start()
        try:
            yield
        finally:
            self._ended.set()
            self.join()

    def run(self) -> None:
        while not self._ended.wait(0.25):
            request_id = f"r{len(self.sent)}"
            value = json.dumps({"request_id": request_id, "image_path": str(IMAGES / "photo.jpg")})
            self._producer.produce(self._topic, value, partition=len(self.sent) % 2)
            self.sent.add(request_id)
            self._producer.poll(0)

    def settle(self) -> None:
        """Wait until each request is acknowledged."""
        assert self._producer.flush(60) == 0


@pytest.mark.parametrize(
    ("transactional", "protocol"), [(False, "consumer"), (True, "classic")], ids=["at-least-once", "exactly-once"]
)
def test_leaders_that_die_lose_nothing(
    cluster: ApacheKafkaCluster, make_bench: MakeBench, transactional: bool, protocol: str
) -> None:
    """After two of three brokers are killed and come back, each request has a response, and the worker never ended.

    With one broker dead, others lead its partitions. With two dead, nothing can be written, and requests wait.
    """
    bench = make_bench(partitions=2, create=False, servers=cluster.bootstrap_servers)
    create_replicated(bench)
    responses = bench.responses
    environment = {"KAFKA_GROUP_PROTOCOL": protocol} | ({"KAFKA_TRANSACTIONAL_ID": bench.group} if transactional else {})
    sender = Sender(bench)
    with bench.process(**environment) as worker:
        with sender.sending():
            responses.take(5)
            cluster.kill(2)
            responses.take(len(responses.all_within(0)) + 10)
            wait_until(lambda: holds_all(bench, 1), "the last broker to hold all partitions")
            cluster.kill(3)
            wait_until(lambda: in_sync(bench) == {1}, "the loss of the second broker")
            stored = cluster.stored_bytes(1, bench.response_topic)
            time.sleep(2)
            assert cluster.stored_bytes(1, bench.response_topic) == stored, "responses are written without enough replicas"
            assert worker.popen.poll() is None
            cluster.start(2)
            responses.take(len(responses.all_within(0)) + 10)
            cluster.start(3)
        sender.settle()
        responses.read(lambda _: request_ids(responses).keys() >= sender.sent)
        wait_until(lambda: sum(bench.committed().values()) == len(sender.sent), "all offsets")
        worker.signal(signal.SIGTERM)
        assert worker.end() == 0
    responses.all_within(1)
    assert request_ids(responses).keys() == sender.sent
    assert not transactional or set(request_ids(responses).values()) == {1}
    assert bench.dead_letters.all_within(0.5) == []


def in_sync(bench: Bench) -> set[int]:
    """Return the brokers that hold all acknowledged records of a partition of the test; none if no broker responds in time."""
    brokers = brokers_by_topic(bench)
    return {
        broker for name in (bench.request_topic, bench.response_topic) for each in brokers.get(name, ()) for broker in each
    }


def holds_all(bench: Bench, broker: int) -> bool:
    """Return whether a broker holds all acknowledged records of every partition, also of offsets and transactions."""
    brokers = brokers_by_topic(bench)
    return bool(brokers) and all(broker in each for partitions in brokers.values() for each in partitions)


def brokers_by_topic(bench: Bench) -> dict[str, list[set[int]]]:
    """Return the brokers in sync for each partition of each topic; nothing if no broker responds in time."""
    try:
        topics = bench.admin.list_topics(timeout=10).topics
    except KafkaException:  # a client that was connected to the dead brokers tries these first
        return {}
    return {name: [set(partition.isrs) for partition in topic.partitions.values()] for name, topic in topics.items()}
