"""At-least-once publishing: the offset is committed after the broker acknowledged the records."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from errors import KafkaFailed
from latent_encoder.kafka.connection import is_fatal, kafka_failed
from latent_encoder.kafka.jobs import Partition, RecordJob
from latent_encoder.kafka.publishers import PositionAfter, PublisherEvents, produce
from latent_encoder.kafka.records import Outgoing, RefusedRecord
from latent_encoder.kafka.timers import Timers
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.telemetry.metrics import COMMITS

log = get_logger("latent_encoder.kafka")

COMMIT_AGAIN_AFTER_S = 1.0
"""Wait before a refused commit is repeated. A commit is refused during a rebalance, which takes about that long."""


class OffsetCommits:
    """Offsets on their way to the broker, committed asynchronously and repeated until the broker confirms them."""

    def __init__(self, consumer: Consumer, timers: Timers, failed: Callable[[KafkaFailed], None]) -> None:
        """`failed` is called with an error that retrying cannot fix."""
        self._consumer = consumer
        self._timers = timers
        self._failed = failed
        self._unconfirmed: dict[Partition, TopicPartition] = {}

    def __len__(self) -> int:
        return len(self._unconfirmed)

    def add(self, offset: TopicPartition) -> None:
        """Commit an offset."""
        self._unconfirmed[offset.topic, offset.partition] = offset
        self._commit([offset])

    def settle(self, partitions: Collection[Partition]) -> None:
        """Commit the unconfirmed offsets of these partitions and wait for the broker."""
        offsets = self._offsets(partitions)
        if not offsets:
            return
        try:
            confirmed = self._consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as exc:
            self.on_commit(exc.args[0], offsets)
        else:
            self.on_commit(None, confirmed or [])

    def forget(self, partitions: Collection[Partition]) -> None:
        """Forget the unconfirmed offsets of these partitions."""
        for partition in partitions:
            self._unconfirmed.pop(partition, None)

    def on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        """Take the broker's response to a commit; the consumer's `on_commit`."""
        again = False
        for partition in partitions:
            refusal = error or partition.error
            COMMITS.labels("ok" if refusal is None else "refused").inc()
            if refusal is None:
                self._confirm(partition)
            elif is_fatal(refusal):
                self._failed(kafka_failed(f"Cannot commit offsets of topic {partition.topic}", refusal))
            elif (partition.topic, partition.partition) in self._unconfirmed:
                place = {"topic": partition.topic, "partition": partition.partition, "offset": partition.offset}
                log.warning("commit refused", reason=refusal.str(), error_code=refusal.name(), **place)
                again = True
        if again:
            self._timers.after(COMMIT_AGAIN_AFTER_S, self._commit_again)

    def _confirm(self, partition: TopicPartition) -> None:
        """Forget an offset, unless a later one of the partition is under way."""
        place = (partition.topic, partition.partition)
        if place in self._unconfirmed and self._unconfirmed[place].offset == partition.offset:
            del self._unconfirmed[place]

    def _commit_again(self) -> None:
        if self._unconfirmed:
            self._commit(self._offsets(self._unconfirmed.keys()))

    def _commit(self, offsets: list[TopicPartition]) -> None:
        try:
            self._consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as exc:
            self.on_commit(exc.args[0], offsets)

    def _offsets(self, partitions: Collection[Partition]) -> list[TopicPartition]:
        return [offset for place, offset in self._unconfirmed.items() if place in partitions]


class PublishThenCommit:
    """At least once. Everything runs in the thread that polls."""

    threads: Sequence[threading.Thread] = ()

    def __init__(
        self, commits: OffsetCommits, producer: Producer, position_after: PositionAfter, events: PublisherEvents
    ) -> None:
        self._commits = commits
        self._position_after = position_after
        self._producer = producer
        self._events = events

    def publish(self, job: RecordJob) -> None:
        refused: list[RefusedRecord] = []
        waiting = len(job.records)

        def delivered(record: Outgoing, error: KafkaError | None) -> None:
            nonlocal waiting
            waiting -= 1
            if error is not None:
                refused.append((record, error))
            if not waiting:
                self._published(job, refused)

        if not job.records:
            self._published(job, refused)
        for record in job.records:
            try:
                produce(self._producer, record, delivered)
            except KafkaException as exc:
                delivered(record, exc.args[0])

    def _published(self, job: RecordJob, refused: list[RefusedRecord]) -> None:
        """Commit the job, or report the records that were refused; the others arrived and are not published again."""
        if refused:
            self._events.refused(job, refused, tuple(record for record, _ in refused))
            return
        position = None if job.dropped else self._position_after(job)
        if position is not None:
            self._commits.add(position)
        self._events.acknowledged(job)

    def poll(self) -> None:
        self._producer.poll(0)

    def before_revoke(self, partitions: Collection[Partition]) -> None:
        self._commits.settle(partitions)

    def forget(self, partitions: Collection[Partition]) -> None:
        self._commits.forget(partitions)

    @property
    def settled(self) -> bool:
        return not len(self._commits)

    def close(self) -> None:
        self._producer.purge()
