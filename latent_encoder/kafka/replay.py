"""`--mode dlq-replay`: sends the records of dead letters back to their original topic, unchanged, each once in a run.

The dead letters stay in their topic. A run reads the topic from its start up to the end that it had when the run began. The
producer is idempotent, so a broken connection neither loses a record nor sends it twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from config import Settings
from errors import ErrorCode, KafkaFailed
from latent_encoder.kafka.connection import BrokerState, kafka_failed
from latent_encoder.kafka.properties import consumer_properties, make_client, producer_properties
from latent_encoder.kafka.publishers import produce
from latent_encoder.kafka.records import (
    ERROR_CODE,
    ERROR_MESSAGE,
    ORIGINAL_OFFSET,
    ORIGINAL_PARTITION,
    ORIGINAL_TOPIC,
    Incoming,
    Outgoing,
    revived,
)

CONNECT_TIMEOUT_S = 10.0
"""Timeout of the first call to the broker: a person waits for it, and a broker that is there takes under a second."""

POLL_S = 0.5
"""Poll timeout: the longest delay until an error of the connection is noticed."""


@dataclass(frozen=True)
class Selection:
    """The choice of dead letters to send back."""

    error_codes: frozenset[ErrorCode] = frozenset()
    """Only dead letters with one of these codes; every code if empty."""
    since: datetime | None = None
    """Only dead letters written at that time or later."""
    limit: int | None = None
    """The largest count of dead letters."""

    def takes(self, record: Incoming) -> bool:
        """Return whether the record is chosen; the limit is not considered."""
        code = dict(record.headers).get(ERROR_CODE) or b""
        written = record.timestamp or 0
        return (not self.error_codes or code.decode() in self.error_codes) and (
            self.since is None or written >= self.since.timestamp() * 1000
        )


@dataclass
class ReplayTally:
    """The counts of records of a run."""

    read: int = 0
    foreign: int = 0
    """Records of the topic that are no dead letters of this service."""
    chosen: int = 0
    sent: int = 0
    refused: int = 0

    def __str__(self) -> str:
        return f"{self.read} read, {self.foreign} foreign, {self.chosen} chosen, {self.sent} sent, {self.refused} refused"


@dataclass
class Replay:
    """One run. `report` is called with a line of JSON for each chosen dead letter."""

    settings: Settings
    selection: Selection
    dry_run: bool
    report: Callable[[str], None]
    tally: ReplayTally = field(default_factory=ReplayTally)
    _unreported: list[str] = field(default_factory=list)

    def run(self) -> ReplayTally:
        """Send the chosen dead letters back and wait until each is acknowledged.

        Raises:
            SettingsError: librdkafka refuses a property.
            KafkaFailed: the broker cannot be reached, refuses access, or has no such topic.
            Exception: `report` raised it. The records sent before are acknowledged, and counted in the tally.
        """
        broker = BrokerState(self.settings.kafka_bootstrap_servers)
        callbacks = {"error_cb": broker.on_error}
        settings = self.settings
        group = {"group.id": f"{settings.kafka_consumer_group}-dlq-replay", "enable.partition.eof": True}
        consumer = make_client(Consumer, consumer_properties(settings) | group | callbacks, settings)
        producer = make_client(Producer, producer_properties(settings, transactional=False) | callbacks, settings)
        try:
            for record, original in self._dead_letters(consumer, broker):
                self._send(producer, record, original)
                producer.poll(0)
                self._report()
        finally:
            consumer.close()
            while producer.flush(POLL_S) and broker.fatal is None:
                pass
        self._report()
        broker.check()
        return self.tally

    def _dead_letters(self, consumer: Consumer, broker: BrokerState) -> Iterator[tuple[Incoming, Outgoing]]:
        """Yield each chosen dead letter with its original record, up to the end that its partition had when the run began."""
        ends = self._assign(consumer, broker)
        while ends and self.tally.chosen != self.selection.limit:
            message = consumer.poll(POLL_S)
            broker.check()
            if message is None:
                continue
            if self._is_past_end(message, ends):
                ends.pop(message.partition() or 0, None)
                continue
            record = Incoming.of(message)
            self.tally.read += 1
            original = revived(record)
            if original is None:
                self.tally.foreign += 1
            elif self.selection.takes(record):
                self.tally.chosen += 1
                yield record, original

    def _is_past_end(self, message: Message, ends: dict[int, int]) -> bool:
        error = message.error()
        if error is not None:
            if error.code() != KafkaError._PARTITION_EOF:
                raise kafka_failed(f"Cannot read topic {self.settings.kafka_dlq_topic}", error)
            return True
        return (message.offset() or 0) >= ends.get(message.partition() or 0, 0)

    def _assign(self, consumer: Consumer, broker: BrokerState) -> dict[int, int]:
        """Begin to read every partition from its start; return the current end offset of each that is not empty."""
        topic = self.settings.kafka_dlq_topic
        try:
            partitions = consumer.list_topics(topic, timeout=CONNECT_TIMEOUT_S).topics[topic].partitions
            marks = {n: consumer.get_watermark_offsets(TopicPartition(topic, n), CONNECT_TIMEOUT_S) for n in partitions}
        except KafkaException as exc:
            consumer.poll(0)  # serves the error callback, which learns of a refused access
            broker.check()
            raise kafka_failed(f"Cannot read topic {topic} at {self.settings.kafka_bootstrap_servers}", exc.args[0]) from exc
        if not partitions:
            raise KafkaFailed(f"Topic {topic} does not exist; KAFKA_DLQ_TOPIC or --dlq-topic names another.")
        filled = {n: mark for n, mark in marks.items() if mark[0] < mark[1]}
        consumer.assign([TopicPartition(topic, n, low) for n, (low, _) in filled.items()])
        return {n: high for n, (_, high) in filled.items()}

    def _send(self, producer: Producer, record: Incoming, original: Outgoing) -> None:
        if self.dry_run:
            self._note(record, "would be sent")
            return

        def delivered(_: Outgoing, error: KafkaError | None) -> None:
            if error is None:
                self.tally.sent += 1
                self._note(record, "sent")
            else:
                self.tally.refused += 1
                self._note(record, "refused", reason=error.str())

        while True:
            try:
                produce(producer, original, delivered)
            except BufferError:
                producer.poll(POLL_S)  # the producer's queue is full
            else:
                return

    def _note(self, record: Incoming, action: str, **more: str) -> None:
        headers = {name: (value or b"").decode(errors="replace") for name, value in record.headers}
        line = {
            "action": action,
            "dead_letter": f"{record.topic}/{record.partition}/{record.offset}",
            "request": "/".join(headers[name] for name in (ORIGINAL_TOPIC, ORIGINAL_PARTITION, ORIGINAL_OFFSET)),
            "error_code": headers[ERROR_CODE],
            "error_message": headers[ERROR_MESSAGE],
        }
        self._unreported.append(json.dumps(line | more, ensure_ascii=False))

    def _report(self) -> None:
        """Report the results so far. Not from librdkafka's callbacks, where an exception would end the flush."""
        while self._unreported:
            self.report(self._unreported.pop(0))
