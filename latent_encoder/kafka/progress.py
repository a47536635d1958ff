"""The progress of a worker in its partitions: its lag, gaps in the records, and partitions that stand still."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

from confluent_kafka import Consumer, KafkaException, TopicPartition

from config import Settings
from latent_encoder.kafka.connection import BrokerState
from latent_encoder.kafka.gaps import Gaps
from latent_encoder.kafka.jobs import Partition, RecordJob
from latent_encoder.kafka.lanes import Lanes
from latent_encoder.kafka.positions import readings
from latent_encoder.kafka.stalls import Watchdog
from latent_encoder.kafka.telemetry import Backlog
from latent_encoder.kafka.topics import LOOK_EVERY_S, LOOK_TIMEOUT_S, SPREAD, TopicWatch

STALE_AFTER_S = 2 * (LOOK_EVERY_S * (1 + SPREAD) + LOOK_TIMEOUT_S)
"""Age of a look at the broker after which its offsets say nothing about a stall: two looks were missed."""


class Progress:
    """All that is known about the partitions of a worker. For the thread that polls."""

    def __init__(self, settings: Settings, consumer: Consumer, broker: BrokerState, topics: TopicWatch, lanes: Lanes) -> None:
        self._topic = settings.kafka_request_topic
        self._consumer = consumer
        self._broker = broker
        self._topics = topics
        self._lanes = lanes
        self._committed: dict[Partition, int | None] = {}
        self._paused: Collection[Partition] = ()
        self._gaps = Gaps(self._start_of)
        self._backlog = Backlog()
        self.watchdog = Watchdog(settings.kafka_stall_timeout_s)

    def assigned(self, committed: Mapping[Partition, int | None]) -> None:
        """Take new partitions, each with its committed offset; None if it has none, or if it is not known."""
        self._committed |= committed
        self._gaps.assigned(committed)
        self._watch()

    def forget(self, partitions: Collection[Partition]) -> None:
        """Forget partitions that belong to another worker now."""
        for place in partitions:
            self._committed.pop(place, None)
        self._gaps.forget(partitions)
        self._watch()

    def _watch(self) -> None:
        self._topics.watch([number for _, number in self._committed])

    def restart(self) -> None:
        """Forget all offsets, because the topic was created again."""
        self._committed = dict.fromkeys(self._committed)
        self._gaps.forget(self._committed.keys())

    def taken(self, job: RecordJob) -> None:
        """Note that a record was taken from its partition."""
        self._gaps.taken(job.partition, job.record.offset)

    def turn(self, *, room: bool, paused: Collection[Partition]) -> None:
        """Begin a turn of the loop; `room` states if a record can be taken in it, `paused` has the partitions without."""
        self._paused = paused
        seen = self._topics.seen
        known = seen is not None and time.monotonic() - seen.at < STALE_AFTER_S
        self.watchdog.turn(may_fetch=room and known and self._broker.up)

    def observe(self, topics: Mapping[str, Any]) -> None:
        """Take the `topics` of the consumer's statistics, which come every second."""
        found = readings(topics.get(self._topic, {}), self._topics.seen, self._committed)
        self._gaps.observe(found)
        self.watchdog.observe(found, self._paused)
        self._backlog.observe(found, self._lanes)

    def _start_of(self, place: Partition) -> int:
        """Return the first offset that the broker still had at the last fetch, or at the last look."""
        seen = self._topics.seen
        looked = seen.starts.get(place[1], 0) if seen is not None else 0
        try:
            marks = self._consumer.get_watermark_offsets(TopicPartition(*place), cached=True)
        except KafkaException:
            return looked
        return max(marks[0], looked) if marks else looked
