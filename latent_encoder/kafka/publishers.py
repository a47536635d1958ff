"""The interface of the two ways to publish the records of a job and commit its offset.

`commits.py` does one after the other, `transactions.py` does both in one Kafka transaction.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from confluent_kafka import KafkaError, Message, Producer, TopicPartition

from errors import KafkaFailed
from latent_encoder.kafka.jobs import Partition, RecordJob
from latent_encoder.kafka.records import Outgoing, RefusedRecord

PositionAfter = Callable[[RecordJob], TopicPartition | None]
"""Returns the offset to commit with the response of a job; None if there is none to commit."""


@dataclass(frozen=True)
class PublisherEvents:
    """The calls by which a publisher reports on a job, perhaps from a thread of its own."""

    acknowledged: Callable[[RecordJob], None]
    """The broker has all records."""
    refused: Callable[[RecordJob, Sequence[RefusedRecord], tuple[Outgoing, ...]], None]
    """The broker refused some records; the last argument has those that it still has to acknowledge."""
    aborted: Callable[[RecordJob], None]
    """The transaction was aborted; the same records can be published again."""
    failed: Callable[[KafkaFailed], None]
    """The worker has to stop."""


class Publisher(Protocol):
    """Publishes the records of jobs and commits their offsets. The jobs of a partition come one at a time, in order."""

    threads: Sequence[threading.Thread]
    """The threads that it cannot work without."""

    def publish(self, job: RecordJob) -> None:
        """Begin to publish `job.records` and return at once."""

    def poll(self) -> None:
        """Serve the acknowledgements that came in."""

    def before_revoke(self, partitions: Collection[Partition]) -> None:
        """Commit the acknowledged jobs of these partitions before they are given away."""

    def forget(self, partitions: Collection[Partition]) -> None:
        """Commit nothing more on these partitions, which belong to another worker now."""

    @property
    def settled(self) -> bool:
        """Every acknowledged job is committed."""

    def close(self) -> None:
        """Stop; records that are under way may or may not arrive."""


def produce(producer: Producer, record: Outgoing, delivered: Callable[[Outgoing, KafkaError | None], None]) -> None:
    """Hand a record to the producer, which calls `delivered` with None once the broker has it, or with its refusal.

    Raises:
        KafkaException: the producer does not take the record.
        BufferError: the producer's queue is full.
    """

    def on_delivery(error: KafkaError | None, _: Message) -> None:
        delivered(record, error)

    producer.produce(record.topic, value=record.value, key=record.key, headers=list(record.headers), on_delivery=on_delivery)
