"""Rebalances of a real consumer group: bare consumers in one process, with the properties of the worker's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import uuid4

from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from benchmarks.scale_calls import group_record_bytes
from config import Settings
from latent_encoder.kafka.properties import member_properties
from tests.broker import Broker
from tests.kafka_tools import QUIET

PATIENCE_S = 300.0
SETTLED_S = 6.0  # without a change: longer than a heartbeat interval, after which a late revocation would have come
POLL_S = 0.005  # between two rounds of polls of all consumers: short beside the times that are measured


@dataclass(frozen=True)
class Rebalance:
    """The times of one rebalance, in seconds."""

    seconds: float
    """Until the last partition has its new owner."""
    moved: int
    """Partitions that changed their owner."""
    unowned_s: float
    """Mean time without an owner, of the moved partitions."""


@dataclass
class Group:
    """Consumers of one group, polled in turns by one thread."""

    settings: Settings
    partitions: int
    members: dict[int, Consumer] = field(default_factory=dict)
    owner: dict[int, int] = field(default_factory=dict)
    freed: dict[int, float] = field(default_factory=dict)
    gaps: dict[int, float] = field(default_factory=dict)
    changed: float = 0.0
    count: int = 0

    def join(self) -> int:
        """Add a consumer, and return its number."""
        number, self.count = self.count, self.count + 1
        consumer = Consumer(member_properties(self.settings) | QUIET | {"statistics.interval.ms": 0})
        self.members[number] = consumer

        def on_assign(one: Consumer, places: list[TopicPartition]) -> None:
            now = self.changed = time.monotonic()
            one.incremental_assign(places)
            for place in places:
                self.owner[place.partition] = number
                self.gaps[place.partition] = now - self.freed.pop(place.partition, now)

        def on_revoke(_: Consumer, places: list[TopicPartition]) -> None:
            self._free(place.partition for place in places)

        consumer.subscribe([self.settings.kafka_request_topic], on_assign=on_assign, on_revoke=on_revoke)
        return number

    def leave(self) -> None:
        """Remove the consumer that joined last."""
        number, consumer = self.members.popitem()
        consumer.close()
        self._free([place for place, owner in self.owner.items() if owner == number])

    def _free(self, places: object) -> None:
        now = self.changed = time.monotonic()
        for place in list(places):  # type: ignore[call-overload]
            if self.owner.pop(place, None) is not None:
                self.freed[place] = now

    def settle(self, change: Callable[[], object]) -> Rebalance:
        """Make a change, wait until all partitions are shared out evenly again, and return the times.

        Raises:
            TimeoutError: they are not within PATIENCE_S.
        """
        before = dict(self.owner)
        self.gaps.clear()
        began = self.changed = time.monotonic()
        change()
        while not (self._even() and time.monotonic() - self.changed > SETTLED_S):
            if time.monotonic() - began > PATIENCE_S:
                raise TimeoutError(f"{len(self.owner)} of {self.partitions} partitions have an owner")
            for consumer in list(self.members.values()):
                consumer.poll(0)
            time.sleep(POLL_S)
        moved = [place for place, owner in self.owner.items() if before.get(place) != owner]
        unowned = sum(self.gaps.get(place, 0.0) for place in moved) / max(1, len(moved))
        return Rebalance(self.changed - began, len(moved), unowned)

    def _even(self) -> bool:
        if len(self.owner) < self.partitions:
            return False
        held = [0] * self.count
        for owner in self.owner.values():
            held[owner] += 1
        counts = [held[number] for number in self.members]
        return max(counts) - min(counts) <= 1

    def close(self) -> None:
        """Let all leave, without waiting for the rebalances between."""
        for consumer in self.members.values():
            consumer.close()


def measure_group(broker: Broker, protocol: str, members: int, partitions: int) -> tuple[dict[str, Rebalance], int]:
    """Return the times of forming a group, of one that joins, and of one that leaves; and bytes of the record about it."""
    topic = f"scale-{uuid4().hex[:8]}"
    admin = AdminClient({**QUIET, "bootstrap.servers": broker.bootstrap_servers})
    admin.create_topics([NewTopic(topic, partitions, 1)])[topic].result()
    settings = Settings(
        _env_file=None,
        kafka_bootstrap_servers=broker.bootstrap_servers,
        kafka_request_topic=topic,
        kafka_consumer_group=topic,
        kafka_group_protocol=protocol,
    )
    group = Group(settings, partitions)
    try:
        formed = group.settle(lambda: [group.join() for _ in range(members)])
        found = {"form": formed, "join": group.settle(group.join), "leave": group.settle(group.leave)}
        return found, group_record_bytes(broker, topic)
    finally:
        group.close()
        admin.delete_topics([topic])[topic].result()
