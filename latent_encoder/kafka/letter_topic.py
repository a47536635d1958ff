"""The topic of the dead letters, read from its start to the end that it has at the moment, and the group's offsets in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from config import Settings
from errors import KafkaFailed
from latent_encoder.kafka.connection import BrokerState, kafka_failed
from latent_encoder.kafka.records import Incoming
from latent_encoder.kafka.replay_memory import ReplayMemory
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder.kafka")

CONNECT_TIMEOUT_S = 10.0
"""Timeout of the first call to the broker: a person waits for it, and a broker that is there takes under a second."""

POLL_S = 0.5
"""Poll timeout: the longest delay until a stop or an error of the connection is noticed."""

SILENCE_S = 30.0
"""Longest wait for a record that the broker has: it takes milliseconds, and a broker that is started again some seconds."""


@dataclass
class LetterTopic:
    """The topic, in which new letters are ignored once `find` was called."""

    settings: Settings
    consumer: Consumer
    broker: BrokerState
    stopping: Callable[[], bool]

    @property
    def name(self) -> str:
        return self.settings.kafka_dlq_topic

    def find(self) -> None:
        """Look for the topic and the first and last offsets of its partitions.

        Raises:
            KafkaFailed: the broker cannot be reached, refuses access, or has no such topic.
        """
        try:
            partitions = self.consumer.list_topics(self.name, timeout=CONNECT_TIMEOUT_S).topics[self.name].partitions
            self.marks = {n: self._marks(n) for n in partitions}
        except KafkaException as exc:
            raise self._cannot_read(exc) from exc
        if not partitions:
            raise KafkaFailed(f"Topic {self.name} does not exist; KAFKA_DLQ_TOPIC or --dlq-topic names another.")

    def _marks(self, partition: int) -> tuple[int, int]:
        return self.consumer.get_watermark_offsets(TopicPartition(self.name, partition), CONNECT_TIMEOUT_S)

    def memories(self) -> dict[int, ReplayMemory]:
        """Return the memory of each partition, from the group's offsets.

        Raises:
            KafkaFailed: the broker does not respond, or somebody else wrote the metadata of an offset.
        """
        try:
            found = self.consumer.committed([TopicPartition(self.name, n) for n in self.marks], CONNECT_TIMEOUT_S)
        except KafkaException as exc:
            raise self._cannot_read(exc) from exc
        for place in found:
            if place.error is not None:
                raise kafka_failed(f"Cannot read the offsets of group {replay_group(self.settings)}", place.error)
        return {place.partition: self._memory(place) for place in found}

    def _memory(self, place: TopicPartition) -> ReplayMemory:
        first, end = self.marks[place.partition]
        if place.offset < 0:
            return ReplayMemory(first)
        where = f"The offset of group {replay_group(self.settings)} in partition {place.partition} of topic {self.name}"
        try:
            memory = ReplayMemory.of(place.offset, place.metadata)
        except ValueError as exc:
            hint = "Set it with kafka-consumer-groups.sh --reset-offsets: letters before it count as sent."
            raise KafkaFailed(f"{where} cannot be used: {exc}. {hint}") from exc
        if memory.read_to > end:
            log.warning("replays are forgotten: the topic ends before the group's offset", topic=self.name, **place_of(place))
            return ReplayMemory(first)
        memory.forget_before(first)
        return memory

    def records(self) -> Iterator[Incoming]:
        """Yield every record that was there when `find` was called, in order in each partition, unless a stop is wanted.

        Raises:
            KafkaFailed: the broker refuses access, or does not respond for `SILENCE_S`.
        """
        ends = {n: end for n, (first, end) in self.marks.items() if first < end}
        self.consumer.assign([TopicPartition(self.name, n, self.marks[n][0]) for n in ends])
        heard = time.monotonic()
        while ends and not self.stopping():
            message = self.consumer.poll(POLL_S)
            self.broker.check()
            if message is None:
                if time.monotonic() - heard > SILENCE_S:
                    servers = self.settings.kafka_bootstrap_servers
                    raise KafkaFailed(f"No record of topic {self.name} came from {servers} for {SILENCE_S:g} s.")
                continue
            if self._is_past_end(message, ends):
                ends.pop(message.partition() or 0, None)
            else:
                yield Incoming.of(message)
            heard = time.monotonic()

    def _is_past_end(self, message: Message, ends: dict[int, int]) -> bool:
        error = message.error()
        if error is not None:
            if error.code() != KafkaError._PARTITION_EOF:
                raise kafka_failed(f"Cannot read topic {self.name}", error)
            return True
        return (message.offset() or 0) >= ends.get(message.partition() or 0, 0)

    def _cannot_read(self, exc: KafkaException) -> KafkaFailed:
        self.consumer.poll(0)  # serves the error callback, which learns of a refused access
        self.broker.check()
        return kafka_failed(f"Cannot read topic {self.name} at {self.settings.kafka_bootstrap_servers}", exc.args[0])


def replay_group(settings: Settings) -> str:
    """Return the group whose offsets are the memory of the replays; also the id of their transactions."""
    return f"{settings.kafka_consumer_group}-dlq-replay"


def place_of(place: TopicPartition) -> dict[str, int]:
    """Return partition and offset, as fields of a log event."""
    return {"partition": place.partition, "offset": place.offset}
