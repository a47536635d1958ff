"""The partitions of a worker: subscribing, pausing, and the rebalances in which partitions come and go."""

from __future__ import annotations

from collections.abc import Callable, Collection

from confluent_kafka import Consumer, TopicPartition

from latent_encoder.kafka.jobs import Partition
from latent_encoder.kafka.lanes import Lanes
from latent_encoder.kafka.publishers import Publisher
from latent_encoder.kafka.readiness import Readiness
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.telemetry.metrics import REBALANCES

log = get_logger("latent_encoder.kafka")


class Assignment:
    """The partitions that the group's coordinator gave to this worker."""

    def __init__(
        self,
        consumer: Consumer,
        lanes: Lanes,
        publisher: Publisher,
        readiness: Readiness,
        finish: Callable[[Collection[Partition]], None],
    ) -> None:
        """`finish` finishes the jobs of partitions that are about to be revoked, as far as the time allows."""
        self._consumer = consumer
        self._lanes = lanes
        self._publisher = publisher
        self._readiness = readiness
        self._finish = finish
        self._paused = False

    def subscribe(self, topic: str) -> None:
        """Join the consumer group for a topic; partitions come in later polls."""
        self._consumer.subscribe([topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)

    def pause(self, *, pause: bool) -> None:
        """Pause all partitions, so that polling fetches nothing, or resume them."""
        if pause != self._paused:
            (self._consumer.pause if pause else self._consumer.resume)(self._consumer.assignment())
            self._paused = pause

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        consumer.incremental_assign(partitions)
        if self._paused:
            consumer.pause(partitions)
        self._readiness.group_fault = None
        REBALANCES.labels("assigned").inc()
        log.info("partitions assigned", partitions=_numbers(partitions))

    def _on_revoke(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        """Finish the jobs whose encode has begun; leave the others to the next worker."""
        keys = _keys(partitions)
        dropped = self._lanes.drop_unstarted(keys)
        self._finish(keys)
        dropped += self._lanes.drop(keys)
        self._publisher.forget(keys)
        REBALANCES.labels("revoked").inc()
        log.info("partitions revoked", partitions=_numbers(partitions), dropped=len(dropped))

    def _on_lost(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        """Drop the jobs and commit nothing: another worker has the partitions already."""
        keys = _keys(partitions)
        dropped = self._lanes.drop(keys)
        self._publisher.forget(keys)
        self._readiness.group_fault = "partitions lost"
        REBALANCES.labels("lost").inc()
        log.warning("partitions lost", partitions=_numbers(partitions), dropped=len(dropped))


def _keys(partitions: Collection[TopicPartition]) -> set[Partition]:
    return {(partition.topic, partition.partition) for partition in partitions}


def _numbers(partitions: Collection[TopicPartition]) -> list[int]:
    return sorted(partition.partition for partition in partitions)
