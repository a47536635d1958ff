"""The transactions of a replay: records go to their topics, and the memory of them into the group's offsets, or neither.

The transactional id is the same in every replay of a group. When one begins, the broker aborts the transaction that a killed
one left open, and refuses everything that another one, which still runs, sends from then on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from config import Settings
from errors import KafkaFailed
from latent_encoder.kafka.connection import BrokerState, kafka_failed
from latent_encoder.kafka.letter_topic import replay_group
from latent_encoder.kafka.properties import REFRESH_MS, Properties, producer_properties
from latent_encoder.kafka.publishers import produce
from latent_encoder.kafka.records import Outgoing, RefusedRecord
from latent_encoder.kafka.replay_memory import LONGEST_METADATA, ReplayMemory

TRANSACTION_TIMEOUT_S = 10.0
"""Time after which the broker aborts a transaction that a killed replay left open. Until then the workers see no later record
of the topic. A transaction takes under a second."""

CALL_TIMEOUT_S = 1.0
"""Timeout of one call. It is repeated, so this is only the longest delay until a refused access is noticed."""

PATIENCE_S = 30.0
"""Longest wait for a broker that is away: one that is started again takes some seconds."""

UNDONE = {KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT, KafkaError._MSG_TIMED_OUT}
"""Errors of records that the broker did not refuse: their transaction was aborted, or the broker is away."""

FENCED = {KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH}
"""Errors of a producer after another one with its id has begun."""


def replay_producer_properties(settings: Settings) -> Properties:
    """Return the properties of the producer of a replay.

    Raises:
        SettingsError: the file of further properties cannot be used.
    """
    timeout_ms = int(TRANSACTION_TIMEOUT_S * 1000)
    return producer_properties(settings, transactional=False) | {
        "transactional.id": replay_group(settings),
        "transaction.timeout.ms": timeout_ms,
        "message.timeout.ms": timeout_ms,
        "topic.metadata.refresh.interval.ms": REFRESH_MS,
    }


class ReplayTransactions:
    """Sends records and commits the memory of it, in one transaction for each call of `send`."""

    def __init__(self, settings: Settings, producer: Producer, consumer: Consumer, broker: BrokerState) -> None:
        self._settings = settings
        self._producer = producer
        self._consumer = consumer
        self._broker = broker

    def begin(self) -> None:
        """Register the producer. From now on, the memory that the broker has is final.

        Raises:
            KafkaFailed: the broker is away, or refuses the transactional id.
        """
        fact = f"Cannot begin a replay with the transactional id {replay_group(self._settings)}"
        self._call(fact, lambda: self._producer.init_transactions(CALL_TIMEOUT_S))

    def send(self, records: Sequence[Outgoing], memories: Mapping[int, ReplayMemory]) -> list[RefusedRecord]:
        """Send all records and commit the memory, or do neither and return the records that the broker refused.

        Raises:
            KafkaFailed: this replay cannot go on. The text tells if the records may have been sent.
        """
        committed = {n: memory.committed() for n, memory in memories.items()}
        for n, (_, metadata) in committed.items():
            if len(metadata) > LONGEST_METADATA:
                raise self._too_scattered(n)
        offsets = [TopicPartition(self._settings.kafka_dlq_topic, n, *committed[n]) for n in committed]
        refused: list[RefusedRecord] = []
        try:
            self._transact(records, offsets, refused)
        except KafkaException as exc:
            error: KafkaError = exc.args[0]
            self._abort(error)
            if error.code() == KafkaError.OFFSET_METADATA_TOO_LARGE:
                raise self._too_scattered() from exc
            if not refused:
                raise self._failed("Cannot send letters; those that were not reported were not sent", error) from exc
        return refused

    def _transact(self, records: Sequence[Outgoing], offsets: list[TopicPartition], refused: list[RefusedRecord]) -> None:
        failed: list[KafkaError] = []

        def delivered(record: Outgoing, error: KafkaError | None) -> None:
            if error is not None:
                failed.append(error)
                if error.code() not in UNDONE | FENCED:
                    refused.append((record, error))

        self._producer.begin_transaction()
        for record in records:
            self._produce(record, delivered)
        while self._unacknowledged():  # ends: a record fails after message.timeout.ms
            self._broker.check()
        if failed:
            raise KafkaException(failed[0])
        metadata = self._consumer.consumer_group_metadata()
        self._producer.send_offsets_to_transaction(offsets, metadata, TRANSACTION_TIMEOUT_S)
        doubt = "The broker did not confirm the last letters; the next replay knows if they were sent"
        self._call(doubt, lambda: self._producer.commit_transaction(CALL_TIMEOUT_S), abortable=True)

    def _produce(self, record: Outgoing, delivered: Callable[[Outgoing, KafkaError | None], None]) -> None:
        while True:
            try:
                return produce(self._producer, record, delivered)
            except KafkaException as exc:
                return delivered(record, exc.args[0])
            except BufferError:  # the producer's queue is full
                self._unacknowledged()
                self._broker.check()

    def _unacknowledged(self) -> int:
        """Wait for acknowledgements, and return the count of records that still have none.

        Raises:
            KafkaException: the producer cannot go on.
        """
        try:
            return self._producer.flush(CALL_TIMEOUT_S)
        except SystemError as exc:
            # The client sets the exception of a fatal error, and then calls `delivered` all the same.
            if isinstance(exc.__cause__, KafkaException):
                raise exc.__cause__ from exc
            raise

    def _abort(self, error: KafkaError) -> None:
        """End a transaction that failed. After a fatal error there is nothing to end."""
        if not error.fatal():
            fact = "Cannot end a transaction; its letters were not sent"
            self._call(fact, lambda: self._producer.abort_transaction(CALL_TIMEOUT_S))

    def _call(self, fact: str, call: Callable[[], None], *, abortable: bool = False) -> None:
        """Make a call, and repeat it for a while if the broker is away.

        Raises:
            KafkaException: `abortable` is set, and the transaction has to be aborted.
            KafkaFailed: every other failure; `fact` begins the text.
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return call()
            except KafkaException as exc:
                error: KafkaError = exc.args[0]
                self._broker.check()
                if abortable and error.txn_requires_abort():
                    raise
                if not error.retriable() or time.monotonic() > deadline:
                    raise self._failed(fact, error) from exc

    def _failed(self, fact: str, error: KafkaError) -> KafkaFailed:
        if error.code() in FENCED:
            return KafkaFailed(
                f"Another replay of group {self._settings.kafka_consumer_group} has begun and goes on with the letters that "
                f"this one did not send ({error.name()})."
            )
        return kafka_failed(fact, error)

    def _too_scattered(self, partition: int | None = None) -> KafkaFailed:
        place = "a partition" if partition is None else f"partition {partition}"
        return KafkaFailed(
            f"The letters of {place} that were sent are too scattered to be remembered in the metadata of an offset. Nothing "
            f"was sent that is not remembered. Send neighbouring letters too: choose by time or place instead of code or id."
        )
