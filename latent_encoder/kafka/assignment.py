"""The partitions of a worker: subscribing, pausing, and the rebalances in which partitions come and go."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

from latent_encoder.kafka.jobs import Partition
from latent_encoder.kafka.lanes import Lanes
from latent_encoder.kafka.progress import Progress
from latent_encoder.kafka.publishers import Publisher
from latent_encoder.kafka.readiness import Readiness
from latent_encoder.kafka.starts import Starts
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.telemetry.metrics import REBALANCES

log = get_logger("latent_encoder.kafka")


@dataclass(frozen=True)
class Holdings:
    """All that a worker keeps for each partition."""

    lanes: Lanes
    publisher: Publisher
    starts: Starts
    progress: Progress

    def forget(self, partitions: Collection[Partition]) -> None:
        """Forget partitions that belong to another worker now."""
        self.publisher.forget(partitions)
        self.starts.forget(partitions)
        self.progress.forget(partitions)


class Assignment:
    """The partitions that the group's coordinator gave to this worker."""

    def __init__(
        self,
        consumer: Consumer,
        held: Holdings,
        readiness: Readiness,
        finish: Callable[[Collection[Partition]], None],
    ) -> None:
        """`finish` finishes the jobs of partitions that are about to be revoked, as far as the time allows."""
        self._consumer = consumer
        self._held = held
        self._readiness = readiness
        self._finish = finish
        self._mine: set[Partition] = set()
        self._paused: set[Partition] = set()

    @property
    def partitions(self) -> frozenset[Partition]:
        return frozenset(self._mine)

    @property
    def paused(self) -> frozenset[Partition]:
        return frozenset(self._paused)

    def subscribe(self, topic: str) -> None:
        """Join the consumer group for a topic; partitions come in later polls."""
        self._consumer.subscribe([topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)

    def pause(self, partitions: Collection[Partition]) -> None:
        """Pause these partitions of the worker, so that polling fetches nothing from them, and resume the others."""
        wanted = self._mine & set(partitions)
        if wanted - self._paused:
            self._consumer.pause([TopicPartition(*place) for place in wanted - self._paused])
        if self._paused - wanted:
            self._consumer.resume([TopicPartition(*place) for place in self._paused - wanted])
        self._paused = wanted

    def read_from_start(self) -> None:
        """Go back to the beginning of every partition."""
        for place in self._mine:
            self._consumer.seek(TopicPartition(*place, OFFSET_BEGINNING))

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        consumer.incremental_assign(self._held.starts.open(partitions))
        consumer.resume(partitions)  # librdkafka keeps the pause of a partition that was taken away while it was paused
        self._held.progress.assigned(self._held.starts.offsets(_keys(partitions)))
        self._mine |= _keys(partitions)
        self._readiness.group_fault = None
        REBALANCES.labels("assigned").inc()
        log.info("partitions assigned", partitions=_numbers(partitions))

    def _on_revoke(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        """Finish the jobs whose encode has begun; leave the others to the next worker."""
        keys = _keys(partitions)
        dropped = self._held.lanes.drop_unstarted(keys)
        self._finish(keys)
        dropped += self._held.lanes.drop(keys)
        self._forget(keys)
        REBALANCES.labels("revoked").inc()
        log.info("partitions revoked", partitions=_numbers(partitions), dropped=len(dropped))

    def _on_lost(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        """Drop the jobs and commit nothing: another worker has the partitions already."""
        keys = _keys(partitions)
        dropped = self._held.lanes.drop(keys)
        self._forget(keys)
        self._readiness.group_fault = "partitions lost"
        REBALANCES.labels("lost").inc()
        log.warning("partitions lost", partitions=_numbers(partitions), dropped=len(dropped))

    def _forget(self, partitions: set[Partition]) -> None:
        self._held.forget(partitions)
        self._mine -= partitions
        self._paused -= partitions


def _keys(partitions: Collection[TopicPartition]) -> set[Partition]:
    return {(partition.topic, partition.partition) for partition in partitions}


def _numbers(partitions: Collection[TopicPartition]) -> list[int]:
    return sorted(partition.partition for partition in partitions)
