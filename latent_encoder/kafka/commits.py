"""At-least-once publishing: the offset is committed after the broker acknowledged the records."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from errors import KafkaFailed
from latent_encoder.kafka.connection import is_fatal, kafka_failed
from latent_encoder.kafka.jobs import Partition, RecordJob
from latent_encoder.kafka.publishers import Delivered, PositionAfter, PublisherEvents, produce
from latent_encoder.kafka.records import Outgoing, RefusedRecord
from latent_encoder.kafka.timers import Timers
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.telemetry.metrics import COMMITS

log = get_logger("latent_encoder.kafka")

COMMIT_AGAIN_AFTER_S = 1.0
"""Wait before a refused commit is repeated. A commit is refused during a rebalance, which takes about that long."""

LEAST_SETTLE_S = 0.5
"""Shortest time to wait for the confirmation of a last commit, also if the deadline has passed: a broker that is there takes
milliseconds."""

FIRST_WAIT_S = 0.05
"""Wait before a last commit that the broker has not taken is repeated, doubled each time: it may be looking for the group's
coordinator, or be in the middle of a rebalance."""


class OffsetCommits:
    """Offsets on their way to the broker, committed asynchronously and repeated until the broker confirms them."""

    def __init__(self, consumer: Consumer, timers: Timers, failed: Callable[[KafkaFailed], None]) -> None:
        """`failed` is called with an error that retrying cannot fix."""
        self._consumer = consumer
        self._timers = timers
        self._failed = failed
        self._unconfirmed: dict[Partition, TopicPartition] = {}
        self._uncounted: set[tuple[str, int, int]] = set()
        """Topic, partition and offset of each unconfirmed commit. Commits of notes alone (`starts.py`) do not count."""
        self._repeating = False
        """A repetition is due; further refusals wait for the same one."""

    def __len__(self) -> int:
        return len(self._unconfirmed)

    def add(self, offset: TopicPartition) -> None:
        """Commit an offset."""
        self._unconfirmed[offset.topic, offset.partition] = offset
        self._uncounted.add((offset.topic, offset.partition, offset.offset))
        self._commit([offset])

    def settle(self, partitions: Collection[Partition], deadline: float) -> None:
        """Commit the unconfirmed offsets of these partitions, and wait until the broker has them or the deadline has passed.

        `deadline` is in seconds of the monotonic clock. A synchronous commit has no timeout: without a response of the broker
        it takes minutes.
        """
        deadline = max(deadline, time.monotonic() + LEAST_SETTLE_S)
        wait = FIRST_WAIT_S
        while offsets := self._offsets(partitions):
            self._commit(offsets)
            if self._taken(offsets, deadline - time.monotonic()):
                return
            if time.monotonic() + wait > deadline:
                unconfirmed = {offset.partition: offset.offset for offset in offsets}
                log.warning("last commit is not confirmed, its requests may be delivered again", offsets=unconfirmed)
                return
            time.sleep(wait)
            wait *= 2

    def _taken(self, offsets: list[TopicPartition], timeout_s: float) -> bool:
        """Ask the broker if it has taken these offsets; it responds to this question after the commit before it."""
        places = [TopicPartition(offset.topic, offset.partition) for offset in offsets]
        try:
            committed = self._consumer.committed(places, timeout_s)
        except KafkaException:
            return False
        for partition in committed:
            self._confirm(partition)
        return not self._offsets([(offset.topic, offset.partition) for offset in offsets])

    def forget(self, partitions: Collection[Partition]) -> None:
        """Forget the unconfirmed offsets of these partitions."""
        for partition in partitions:
            self._unconfirmed.pop(partition, None)
        self._uncounted = {commit for commit in self._uncounted if commit[:2] not in partitions}

    def on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        """Take the broker's response to a commit; the consumer's `on_commit`."""
        again = False
        for partition in partitions:
            refusal = error or partition.error
            if refusal is None:
                self._confirm(partition)
                continue
            COMMITS.labels("refused").inc((partition.topic, partition.partition, partition.offset) in self._uncounted)
            if is_fatal(refusal):
                self._failed(kafka_failed(f"Cannot commit offsets of topic {partition.topic}", refusal))
            elif (partition.topic, partition.partition) in self._unconfirmed:
                place = {"topic": partition.topic, "partition": partition.partition, "offset": partition.offset}
                log.warning("commit refused", reason=refusal.str(), error_code=refusal.name(), **place)
                again = True
        if again and not self._repeating:
            self._repeating = True
            self._timers.after(COMMIT_AGAIN_AFTER_S, self._commit_again)

    def _confirm(self, partition: TopicPartition) -> None:
        """Count an offset, and forget it unless a later one of the partition is under way."""
        place = (partition.topic, partition.partition)
        if (*place, partition.offset) in self._uncounted:
            self._uncounted.remove((*place, partition.offset))
            COMMITS.labels("ok").inc()
        if place in self._unconfirmed and self._unconfirmed[place].offset == partition.offset:
            del self._unconfirmed[place]

    def _commit_again(self) -> None:
        self._repeating = False
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
    fault: str | None = None

    def __init__(
        self, commits: OffsetCommits, producer: Producer, position_after: PositionAfter, events: PublisherEvents
    ) -> None:
        self._commits = commits
        self._position_after = position_after
        self._producer = producer
        self._events = events
        self._unsent: deque[tuple[RecordJob, Outgoing, Delivered]] = deque()
        """Records that the producer's queue had no room for, in order."""

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
        self._unsent.extend((job, record, delivered) for record in job.records)
        self._send()

    def _send(self) -> None:
        """Hand the unsent records to the producer until its queue is full; `poll` goes on as soon as it has room."""
        while self._unsent:
            job, record, delivered = self._unsent[0]
            try:
                if not job.dropped:
                    produce(self._producer, record, delivered)
            except BufferError:
                return
            except KafkaException as exc:
                delivered(record, exc.args[0])
            self._unsent.popleft()

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
        self._send()

    def before_revoke(self, partitions: Collection[Partition], deadline: float) -> None:
        self._commits.settle(partitions, deadline)

    def forget(self, partitions: Collection[Partition]) -> None:
        self._commits.forget(partitions)

    @property
    def settled(self) -> bool:
        return not len(self._commits)

    def close(self, deadline: float) -> None:  # noqa: ARG002  # nothing is waited for
        self._producer.purge()
