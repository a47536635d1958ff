"""Two ways to answer a request and commit its offset: one after the other, or both in one Kafka transaction."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from errors import KafkaFailed, one_line
from latent_encoder.kafka.connection import FATAL, failure, is_fatal
from latent_encoder.kafka.lanes import Job, Partition
from latent_encoder.kafka.records import Outgoing
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.telemetry.metrics import COMMITS

log = get_logger("latent_encoder.kafka")

CALL_TIMEOUT_S = 5.0  # of one call to the transaction coordinator; it is repeated as long as the broker is away

RETRY_S = 0.2
AWAY = {KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError._WAIT_COORD}

# What becomes of a transaction's records when it is aborted for another reason: they were not refused themselves.
UNDONE = {KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT, KafkaError._MSG_TIMED_OUT}

Refusal = tuple[Outgoing, KafkaError]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Reports:
    """What a publisher calls with the outcome of a job, perhaps from a thread of its own."""

    answered: Callable[[Job], None]
    """The answer is acknowledged."""
    refused: Callable[[Job, list[Refusal]], None]
    """These records were not delivered; `job.answer` is what still has to be."""
    again: Callable[[Job], None]
    """The transaction was aborted; the same answer can be published again."""
    failed: Callable[[KafkaFailed], None]
    """The service cannot go on."""


class Publisher(Protocol):
    """Publishes the answers of jobs and commits their offsets. The jobs of a partition come one at a time, in order."""

    threads: Sequence[threading.Thread]
    """Those that it cannot work without."""

    def publish(self, job: Job) -> None:
        """Begin to publish `job.answer`; returns at once."""

    def poll(self) -> None:
        """Serve acknowledgements that came in."""

    def on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> bool:
        """The consumer's `on_commit`. Whether all is well; a commit that was refused, in a rebalance for one, is logged."""

    def commit_again(self) -> None:
        """Commit once more what is not confirmed."""

    def settle(self, partitions: Collection[Partition]) -> None:
        """Make sure that what was answered on these partitions is committed, before they are given away."""

    def forget(self, partitions: Collection[Partition]) -> None:
        """These partitions are another worker's: commit nothing more there."""

    @property
    def settled(self) -> bool:
        """Whether nothing that was answered waits for its commit."""

    def close(self) -> None:
        """Stop; an answer that is on its way may or may not arrive."""


class AnswerThenCommit:
    """At least once: the offset is committed when the broker has acknowledged the answer.

    Everything runs in the thread that polls.
    """

    threads: Sequence[threading.Thread] = ()

    def __init__(self, consumer: Consumer, make_producer: Callable[[], Producer], reports: Reports) -> None:
        self._consumer = consumer
        self._producer = make_producer()
        self._reports = reports
        self._unconfirmed: dict[Partition, int] = {}
        """Offsets to commit whose commit the broker has not confirmed."""

    def publish(self, job: Job) -> None:
        records = job.answer or ()
        refusals: list[Refusal] = []
        waiting = len(records)

        def delivered(record: Outgoing, error: KafkaError | None) -> None:
            nonlocal waiting
            waiting -= 1
            if error is not None:
                refusals.append((record, error))
            if not waiting:
                end()

        def end() -> None:
            job.answer = tuple(record for record, _ in refusals)
            if refusals:
                self._reports.refused(job, refusals)
            else:
                self._commit(job)
                self._reports.answered(job)

        if not records:
            end()
        for record in records:
            try:
                produce(self._producer, record, delivered)
            except KafkaException as exc:
                delivered(record, exc.args[0])

    def poll(self) -> None:
        self._producer.poll(0)

    def _commit(self, job: Job) -> None:
        if not job.dropped:
            self._unconfirmed[job.partition] = job.record.offset + 1
            self._commit_async([_next_offset(job)])

    def _commit_async(self, offsets: list[TopicPartition]) -> None:
        try:
            self._consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as exc:
            self.on_commit(exc.args[0], offsets)

    def on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> bool:
        confirmed = True
        for partition in partitions:
            refused = error or partition.error
            key = (partition.topic, partition.partition)
            COMMITS.labels("ok" if refused is None else "refused").inc()
            if refused is None:
                if self._unconfirmed.get(key) == partition.offset:
                    del self._unconfirmed[key]
            elif is_fatal(refused):
                self._reports.failed(failure(f"Cannot commit offsets of topic {partition.topic}", refused))
            elif key in self._unconfirmed:
                place = {"topic": partition.topic, "partition": partition.partition, "offset": partition.offset}
                log.warning("commit refused", reason=refused.str(), error_code=refused.name(), **place)
                confirmed = False
        return confirmed

    def commit_again(self) -> None:
        if self._unconfirmed:
            self._commit_async(self._offsets(self._unconfirmed.keys()))

    def settle(self, partitions: Collection[Partition]) -> None:
        offsets = self._offsets(partitions)
        if offsets:
            try:
                done = self._consumer.commit(offsets=offsets, asynchronous=False)
            except KafkaException as exc:
                self.on_commit(exc.args[0], offsets)
            else:
                self.on_commit(None, done or [])

    def forget(self, partitions: Collection[Partition]) -> None:
        for partition in partitions:
            self._unconfirmed.pop(partition, None)

    @property
    def settled(self) -> bool:
        return not self._unconfirmed

    def close(self) -> None:
        self._producer.purge()

    def _offsets(self, partitions: Collection[Partition]) -> list[TopicPartition]:
        return [TopicPartition(*key, offset) for key, offset in self._unconfirmed.items() if key in partitions]


class AnswerWithCommit:
    """Exactly once: answer and offset are one transaction, in a thread of its own, since its calls wait for the broker.

    The consumer group's metadata goes along, so that a worker which lost the partition meanwhile is refused (KIP-447).
    """

    def __init__(self, consumer: Consumer, make_producer: Callable[[], Producer], reports: Reports) -> None:
        self._consumer = consumer
        self._make_producer = make_producer
        self._producer = make_producer()
        self._reports = reports
        self._closing = threading.Event()
        self._inbox: SimpleQueue[tuple[Job, Any] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="transactions", daemon=True)
        self.threads: Sequence[threading.Thread] = (self._thread,)
        self._thread.start()

    def publish(self, job: Job) -> None:
        self._inbox.put((job, self._consumer.consumer_group_metadata()))

    def poll(self) -> None:
        """Serve what comes in between transactions, such as a refused log-in; their own calls serve the rest."""
        self._producer.poll(0)

    def on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> bool:  # noqa: ARG002
        """Never called: the consumer commits nothing."""
        return True

    def commit_again(self) -> None:
        """Nothing to do: an answered job is committed."""

    def settle(self, partitions: Collection[Partition]) -> None:
        """Nothing to do: an answered job is committed."""

    def forget(self, partitions: Collection[Partition]) -> None:
        """Nothing to do: a stale transaction is refused by the broker."""

    @property
    def settled(self) -> bool:
        return True

    def close(self) -> None:
        self._closing.set()
        self._inbox.put(None)
        self._thread.join(2 * CALL_TIMEOUT_S)  # a call that hangs must not keep the service from ending

    def _run(self) -> None:
        try:
            self._patiently(lambda: self._producer.init_transactions(CALL_TIMEOUT_S))
            while (item := self._inbox.get()) is not None:
                self._publish(*item)
        except _Closing:
            return
        except KafkaException as exc:
            self._reports.failed(failure("A transaction failed", exc.args[0]))
        except Exception as exc:
            self._reports.failed(KafkaFailed(f"A transaction failed: {one_line(exc)}"))

    def _publish(self, job: Job, group_metadata: Any) -> None:
        if job.dropped:
            return
        refusals: list[Refusal] = []
        try:
            self._transact(job, group_metadata, refusals)
        except KafkaException as exc:
            error: KafkaError = exc.args[0]
            if error.code() in FATAL:
                raise
            log.warning("transaction failed", reason=error.str(), error_code=error.name(), **job.record.place)
            if not self._undone(job, error):
                self._committed(job)
                return
            COMMITS.labels("refused").inc()
            if refusals:
                self._reports.refused(job, refusals)
            else:
                self._reports.again(job)
        else:
            self._committed(job)

    def _committed(self, job: Job) -> None:
        COMMITS.labels("ok").inc()
        self._reports.answered(job)

    def _transact(self, job: Job, group_metadata: Any, refusals: list[Refusal]) -> None:
        def delivered(record: Outgoing, error: KafkaError | None) -> None:
            if error is not None and error.code() not in UNDONE:
                refusals.append((record, error))

        self._producer.begin_transaction()
        for record in job.answer or ():
            produce(self._producer, record, delivered)
        self._producer.send_offsets_to_transaction([_next_offset(job)], group_metadata, CALL_TIMEOUT_S)
        self._patiently(lambda: self._producer.commit_transaction(CALL_TIMEOUT_S))

    def _undone(self, job: Job, error: KafkaError) -> bool:
        """End a transaction that failed. Whether it was aborted; the broker may have committed it all the same."""
        if error.txn_requires_abort():
            try:
                self._producer.abort_transaction(CALL_TIMEOUT_S)
            except KafkaException as exc:
                log.warning("abort failed", reason=exc.args[0].str(), error_code=exc.args[0].name())
            else:
                return True
        # A producer is of no use after some of its errors. With a new one of that id the broker ends what the old one began,
        # by abort or, where it had agreed already, by commit; then the group's offset tells which it was.
        self._producer.purge()
        self._producer = self._make_producer()
        self._patiently(lambda: self._producer.init_transactions(CALL_TIMEOUT_S))
        place = TopicPartition(job.record.topic, job.record.partition)
        (committed,) = self._patiently(lambda: self._consumer.committed([place], CALL_TIMEOUT_S))
        return committed.offset <= job.record.offset

    def _patiently(self, call: Callable[[], Result]) -> Result:
        """Repeat a call as long as the broker is away."""
        while True:
            try:
                return call()
            except KafkaException as exc:
                error: KafkaError = exc.args[0]
                if is_fatal(error) or not (error.retriable() or error.code() in AWAY):
                    raise
            if self._closing.wait(RETRY_S):
                raise _Closing


class _Closing(Exception):
    """The service ends while a transaction waits for the broker."""


def produce(producer: Producer, record: Outgoing, delivered: Callable[[Outgoing, KafkaError | None], None]) -> None:
    """Give a record to the producer; `delivered` is called with it when the broker took it, or with why it did not.

    Raises:
        KafkaException: the producer does not take it.
        BufferError: its queue is full.
    """

    def on_delivery(error: KafkaError | None, _: Message) -> None:
        delivered(record, error)

    producer.produce(record.topic, value=record.value, key=record.key, headers=list(record.headers), on_delivery=on_delivery)


def _next_offset(job: Job) -> TopicPartition:
    return TopicPartition(job.record.topic, job.record.partition, job.record.offset + 1)
