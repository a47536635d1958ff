"""Exactly-once publishing: the records of a job and its offset are one Kafka transaction."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from errors import KafkaFailed, one_line
from latent_encoder.kafka.connection import FATAL, is_fatal, kafka_failed
from latent_encoder.kafka.jobs import Partition, RecordJob
from latent_encoder.kafka.logins import LOGIN_REFUSED
from latent_encoder.kafka.publishers import Delivered, PositionAfter, PublisherEvents, produce
from latent_encoder.kafka.records import Outgoing, RefusedRecord
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.telemetry.metrics import COMMITS

log = get_logger("latent_encoder.kafka")

CALL_TIMEOUT_S = 5.0
"""Timeout of one call to the transaction coordinator. The call is repeated while the broker is away, so this is only the
longest delay until a stop is noticed."""

RETRY_S = 0.2
"""Wait between those calls: short beside an encode, long beside a round trip."""

AWAY = {KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError._WAIT_COORD, *LOGIN_REFUSED}
"""Errors of calls while no coordinator can be reached. `BrokerState` decides if a refused login is final."""

UNDONE = {KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT, KafkaError._MSG_TIMED_OUT, KafkaError._STATE}
"""Errors of records whose transaction failed for another reason; the broker did not refuse these records."""

Result = TypeVar("Result")


class PublishInTransaction:
    """Exactly once, in a thread of its own, because the calls of a transaction wait for the broker.

    A transaction contains the consumer group's metadata, so the broker refuses it if this worker has lost the partition
    meanwhile (KIP-447).
    """

    def __init__(
        self,
        consumer: Consumer,
        make_producer: Callable[[], Producer],
        position_after: PositionAfter,
        events: PublisherEvents,
    ) -> None:
        self._consumer = consumer
        self._make_producer = make_producer
        self._producer = make_producer()
        self._position_after = position_after
        self._events = events
        self.fault: str | None = "not initialised yet"
        self._closing = threading.Event()
        self._inbox: SimpleQueue[tuple[RecordJob, TopicPartition | None, Any] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="transactions", daemon=True)
        self.threads: Sequence[threading.Thread] = (self._thread,)
        self._thread.start()

    def publish(self, job: RecordJob) -> None:
        self._inbox.put((job, self._position_after(job), self._consumer.consumer_group_metadata()))

    def poll(self) -> None:
        """Serve events between transactions, for example a refused login; the calls of a transaction serve their own."""
        self._producer.poll(0)

    def before_revoke(self, partitions: Collection[Partition], deadline: float) -> None:
        """Do nothing: an acknowledged job is committed."""

    def forget(self, partitions: Collection[Partition]) -> None:
        """Do nothing: the broker refuses a stale transaction."""

    @property
    def settled(self) -> bool:
        return True

    def close(self, deadline: float) -> None:
        self._closing.set()
        self._inbox.put(None)
        # The worker ends also if a call does not: a transaction that stays open is aborted by the broker.
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        try:
            self._while_away(lambda: self._producer.init_transactions(CALL_TIMEOUT_S))
            while (entry := self._inbox.get()) is not None:
                self._publish(*entry)
        except _Closing:
            return
        except KafkaException as exc:
            self._events.failed(kafka_failed("A transaction failed", exc.args[0]))
        except Exception as exc:
            self._events.failed(KafkaFailed(f"A transaction failed: {one_line(exc)}"))

    def _publish(self, job: RecordJob, position: TopicPartition | None, group_metadata: Any) -> None:
        if job.dropped:
            return
        refused: list[RefusedRecord] = []
        try:
            self._transact(job, position, group_metadata, refused)
        except KafkaException as exc:
            error: KafkaError = exc.args[0]
            if error.code() in FATAL:
                raise
            log.warning("transaction failed", reason=error.str(), error_code=error.name(), **job.place)
            abort = isinstance(exc, _NotProduced) or error.txn_requires_abort()
            if not self._undone(job, abort=abort):
                self._committed(job)
                return
            COMMITS.labels("refused").inc()
            if refused:
                self._events.refused(job, refused, job.records)
            else:
                self._events.aborted(job)
        else:
            self._committed(job)

    def _committed(self, job: RecordJob) -> None:
        COMMITS.labels("ok").inc()
        self._events.acknowledged(job)

    def _transact(
        self, job: RecordJob, position: TopicPartition | None, group_metadata: Any, refused: list[RefusedRecord]
    ) -> None:
        def delivered(record: Outgoing, error: KafkaError | None) -> None:
            if error is not None and error.code() not in UNDONE:
                refused.append((record, error))

        self._producer.begin_transaction()
        for record in job.records:
            self._produce(record, delivered)
        if position is not None:
            self._producer.send_offsets_to_transaction([position], group_metadata, CALL_TIMEOUT_S)
        self._while_away(lambda: self._producer.commit_transaction(CALL_TIMEOUT_S))

    def _produce(self, record: Outgoing, delivered: Delivered) -> None:
        """Hand a record to the producer; wait while its queue is full."""
        while not self._closing.is_set():
            try:
                produce(self._producer, record, delivered)
            except BufferError:
                self._producer.poll(RETRY_S)
            except KafkaException as exc:
                delivered(record, exc.args[0])
                raise _NotProduced(*exc.args) from exc
            else:
                return
        raise _Closing

    def _undone(self, job: RecordJob, *, abort: bool) -> bool:
        """End a transaction that failed, by an abort if that can be. Return False if the broker committed it all the same."""
        if abort:
            try:
                self._producer.abort_transaction(CALL_TIMEOUT_S)
            except KafkaException as exc:
                log.warning("abort failed", reason=exc.args[0].str(), error_code=exc.args[0].name())
            else:
                return True
        # After some errors a producer cannot be used any more. When a new producer with the same id registers, the broker ends
        # the transaction of the old one: it aborts it, or commits it if it had agreed to that. The group's offset shows which.
        self._producer.purge()
        self._producer = self._make_producer()
        self._while_away(lambda: self._producer.init_transactions(CALL_TIMEOUT_S))
        place = TopicPartition(job.record.topic, job.record.partition)
        (committed,) = self._while_away(lambda: self._consumer.committed([place], CALL_TIMEOUT_S))
        return committed.offset <= job.record.offset

    def _while_away(self, call: Callable[[], Result]) -> Result:
        """Make a call, and repeat it while the broker is away."""
        while True:
            try:
                result = call()
            except KafkaException as exc:
                error: KafkaError = exc.args[0]
                if is_fatal(error) or not (error.retriable() or error.code() in AWAY):
                    raise
                self.fault = f"the coordinator does not respond ({error.str()})"
            else:
                self.fault = None
                return result
            if self._closing.wait(RETRY_S):
                raise _Closing


class _Closing(Exception):
    """The worker stops while a transaction waits for the broker."""


class _NotProduced(KafkaException):
    """The producer did not take a record, so the transaction can be aborted."""
