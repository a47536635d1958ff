"""Calls of a worker to the broker, measured one by one: looks at the topics, fetches, commits."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread
from typing import Any
from uuid import uuid4

import psutil
from confluent_kafka import Consumer, IsolationLevel, KafkaException, Producer, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from config import Settings
from latent_encoder.kafka.clients import PAUSE_AFTER_S
from latent_encoder.kafka.properties import consumer_properties, member_properties
from latent_encoder.kafka.starts import format_notes
from latent_encoder.kafka.topics import EARLIEST, LATEST
from tests.broker import Broker
from tests.kafka_tools import QUIET

REQUEST_BYTES = 400  # of a record: two URLs of S3, an id, and a few options
BATCHES = {"linger.ms": 50, "batch.size": 16_384}  # bytes: the default of Java's producers; a fetch returns whole batches
RECORDS = 20_000  # in the partition that is read, 8 MB: more than librdkafka takes ahead
IMAGES = 10  # encodes of which each is longer than the pause
ENCODE_S = 3.6  # longer than PAUSE_AFTER_S, so that the worker pauses
OWN_PARTITIONS = 2  # of a worker
SECONDS = 5.0
LEADERS_S = 60.0  # longest time until the partitions of a new topic have their leaders


@dataclass
class Traffic:
    """The statistics of a client: bytes, and requests by their kind."""

    latest: dict[str, Any] = field(default_factory=dict)

    def take(self, statistics: str) -> None:
        self.latest = json.loads(statistics)

    @property
    def received(self) -> int:
        return sum(broker["rxbytes"] for broker in self.latest["brokers"].values())

    def requests(self, kind: str) -> int:
        return sum(broker["req"].get(kind, 0) for broker in self.latest["brokers"].values())


def broker_cpu_s() -> float:
    """Return the CPU seconds so far of the brokers that this process started."""
    java = [child for child in psutil.Process().children(recursive=True) if child.name() == "java"]
    times = [child.cpu_times() for child in java]
    return float(sum(each.user + each.system for each in times))


@contextmanager
def topic_on(broker: Broker, partitions: int) -> Iterator[str]:
    """Make a topic, and remove it at the end."""
    name = f"scale-{uuid4().hex[:8]}"
    admin = AdminClient({**QUIET, "bootstrap.servers": broker.bootstrap_servers})
    admin.create_topics([NewTopic(name, partitions, 1)])[name].result()
    try:
        yield name
    finally:
        admin.delete_topics([name])[name].result()


def settings_for(broker: Broker, topic: str) -> Settings:
    """Return the settings of a worker on that topic."""
    return Settings(
        _env_file=None,
        kafka_bootstrap_servers=broker.bootstrap_servers,
        kafka_request_topic=topic,
        kafka_consumer_group=topic,
    )


def measure_look(broker: Broker, partitions: int, looks: int = 200) -> dict[str, dict[str, float]]:
    """Return bytes and times of a look of `kafka/topics.py`: at two offsets of each own partition, and at the topic."""
    with topic_on(broker, partitions) as topic:
        traffic = Traffic()
        properties: dict[str, Any] = {
            "bootstrap.servers": broker.bootstrap_servers,
            "statistics.interval.ms": 100,
            "stats_cb": traffic.take,
        }
        admin = AdminClient(properties | QUIET)
        own = [TopicPartition(topic, number) for number in range(OWN_PARTITIONS)]

        def look_at_topic() -> None:
            admin.describe_topics(TopicCollection([topic]))[topic].result()

        def look_at_offsets() -> None:
            for spec in (EARLIEST, LATEST):
                wanted = dict.fromkeys(own, spec)
                for result in admin.list_offsets(wanted, isolation_level=IsolationLevel.READ_COMMITTED).values():
                    result.result()

        def settled() -> int:
            time.sleep(0.5)
            admin.poll(0.2)
            return traffic.received

        def measured(look: Callable[[], None]) -> dict[str, float]:
            until_it_works(look)
            bytes_before, cpu, began = settled(), broker_cpu_s(), time.monotonic()
            for _ in range(looks):
                look()
            seconds, used = time.monotonic() - began, broker_cpu_s() - cpu
            received = settled() - bytes_before
            return {"bytes": received / looks, "seconds": seconds / looks, "broker_cpu_s": used / looks}

        return {"offsets": measured(look_at_offsets), "topic": measured(look_at_topic)}


def until_it_works(call: Callable[[], None]) -> None:
    """Make a call again and again until the partitions of a new topic have their leaders."""
    until = time.monotonic() + LEADERS_S
    while True:
        try:
            call()
        except KafkaException:
            if time.monotonic() > until:
                raise
            time.sleep(1)
        else:
            return


def measure_fetches(broker: Broker, limits: Mapping[str, int]) -> dict[str, float]:
    """Return the bytes that a worker fetches for an image while a backlog waits, and its requests a second while idle.

    As in `kafka_handler.py`, the partition is paused some time after a record was taken, and resumed behind the encode.
    """
    with topic_on(broker, 1) as topic:
        fill(broker, topic)
        traffic = Traffic()
        properties = member_properties(settings_for(broker, topic)) | QUIET | {**limits, "stats_cb": traffic.take}
        consumer = Consumer(properties)  # its statistics come once a second
        consumer.assign([TopicPartition(topic, 0, 0)])
        received = [one_image(consumer, topic, traffic) for _ in range(IMAGES + 1)]
        consumer.assign([TopicPartition(topic, 0, RECORDS)])
        before = one_wait(consumer, traffic)
        idle = (one_wait(consumer, traffic) - before) / SECONDS
        consumer.close()
    return {"bytes": (received[-1] - received[0]) / IMAGES, "idle_fetches_a_second": idle}


def fill(broker: Broker, topic: str) -> None:
    """Put requests into the topic."""
    producer = Producer({**QUIET, "bootstrap.servers": broker.bootstrap_servers, **BATCHES})
    for _ in range(RECORDS):
        producer.produce(topic, value=b"x" * REQUEST_BYTES, partition=0)
        producer.poll(0)
    assert producer.flush(60) == 0


def one_image(consumer: Consumer, topic: str, traffic: Traffic) -> int:
    """Take a record and hold it for an encode, as a full worker does; return the bytes received so far."""
    place = [TopicPartition(topic, 0)]
    while consumer.poll(1.0) is None:
        pass
    time.sleep(PAUSE_AFTER_S)
    consumer.pause(place)
    until = time.monotonic() + ENCODE_S - PAUSE_AFTER_S
    while time.monotonic() < until:
        consumer.poll(0.05)
    consumer.resume(place)
    return traffic.received


def one_wait(consumer: Consumer, traffic: Traffic) -> int:
    """Poll an empty partition for some seconds, and return the fetch requests so far."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        consumer.poll(0.2)
    return traffic.requests("Fetch")


def measure_statistics(broker: Broker, partitions: int) -> dict[str, float]:
    """Return size and reading time of the consumer's statistics, which come every second, with one partition assigned."""
    with topic_on(broker, partitions) as topic:
        latest = [""]
        resident = psutil.Process().memory_info().rss
        consumer = Consumer(
            consumer_properties(settings_for(broker, topic)) | QUIET | {"stats_cb": lambda text: latest.__setitem__(0, text)}
        )
        consumer.assign([TopicPartition(topic, 0, 0)])
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            consumer.poll(0.2)
        began = time.perf_counter()
        json.loads(latest[0])
        seconds = time.perf_counter() - began
        grown = psutil.Process().memory_info().rss - resident
        consumer.close()
    return {"bytes": len(latest[0]), "seconds": seconds, "resident_bytes": grown}


def group_record_bytes(broker: Broker, group: str) -> int:
    """Return the size of the largest record about a group in the topic of the coordinators."""
    consumer = Consumer({**QUIET, "bootstrap.servers": broker.bootstrap_servers, "group.id": f"{group}-reader"})
    partitions = consumer.list_topics("__consumer_offsets", timeout=10).topics["__consumer_offsets"].partitions
    consumer.assign([TopicPartition("__consumer_offsets", number, 0) for number in partitions])
    largest, until = 0, time.monotonic() + SECONDS
    while time.monotonic() < until:
        message = consumer.poll(0.2)
        if message is not None and message.error() is None and group.encode() in (message.key() or b""):
            largest = max(largest, len(message.value() or b""))
    consumer.close()
    return largest


def measure_commits(broker: Broker, members: int = 4) -> dict[str, float]:
    """Return the rate and the broker's CPU time of offset commits and of reading offsets, from several consumers at once."""
    with topic_on(broker, members) as topic:
        properties: Mapping[str, Any] = consumer_properties(settings_for(broker, topic)) | QUIET
        found = {}
        for kind in ("commit", "committed"):
            counts = [0] * members
            consumers = [Consumer({**properties, "group.id": topic}) for _ in range(members)]
            threads = [
                Thread(target=repeat, args=(consumer, topic, number, counts, kind))
                for number, consumer in enumerate(consumers)
            ]
            cpu = broker_cpu_s()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            found[f"{kind}s_a_second"] = sum(counts) / SECONDS
            found[f"{kind}_broker_cpu_s"] = (broker_cpu_s() - cpu) / sum(counts)
            for consumer in consumers:
                consumer.close()
    return found


def repeat(consumer: Consumer, topic: str, number: int, counts: list[int], kind: str) -> None:
    """Commit, or read the committed offset, again and again for some seconds."""
    notes = format_notes("pSXSm6xCQeGcMhxvEXqtMQ", {17: 1, 18: 1})
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if kind == "commit":
            position = TopicPartition(topic, number, counts[number], metadata=notes)
            consumer.commit(offsets=[position], asynchronous=False)
        else:
            consumer.committed([TopicPartition(topic, number)], timeout=5)
        counts[number] += 1
