"""The interface of the two ways to publish the records of a job and commit its offset.

`commits.py` does one after the other, `transactions.py` does both in one Kafka transaction.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicPartition

from errors import KafkaFailed, one_line
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

    fault: str | None
    """The reason why nothing can be published now, as far as it is known; None if all is well."""

    def publish(self, job: RecordJob) -> None:
        """Begin to publish `job.records` and return at once."""

    def poll(self) -> None:
        """Serve the acknowledgements that came in."""

    def before_revoke(self, partitions: Collection[Partition], deadline: float) -> None:
        """Commit the acknowledged jobs of these partitions before they are given away.

        `deadline` is in seconds of the monotonic clock.
        """

    def forget(self, partitions: Collection[Partition]) -> None:
        """Commit nothing more on these partitions, which belong to another worker now."""

    @property
    def settled(self) -> bool:
        """Every acknowledged job is committed."""

    def close(self, deadline: float) -> None:
        """Stop, soon after `deadline` (monotonic clock, s) at the latest; records that are under way may or may not arrive."""


Delivered = Callable[[Outgoing, KafkaError | None], None]
"""The call by which a producer reports on a record: with None once the broker has it, or with its refusal."""


def produce(producer: Producer, record: Outgoing, delivered: Delivered) -> None:
    """Hand a record to the producer, which calls `delivered`.

    Raises:
        KafkaException: the producer does not take the record.
        BufferError: the producer's queue is full; it has room again after deliveries.
    """

    def on_delivery(error: KafkaError | None, _: Message) -> None:
        delivered(record, error)

    try:
        producer.produce(
            record.topic, value=record.value, key=record.key, headers=list(record.headers), on_delivery=on_delivery
        )
    except KafkaException:
        raise
    except BufferError as exc:
        if len(producer):
            raise
        # The queue is empty, so waiting would not help: its `queue.buffering.max.kbytes` is below the size of this record.
        raise KafkaException(KafkaError(KafkaError.MSG_SIZE_TOO_LARGE, "larger than the producer's queue")) from exc
    except Exception as exc:  # the client cannot make a record of these bytes
        raise KafkaException(KafkaError(KafkaError._INVALID_ARG, one_line(exc))) from exc
