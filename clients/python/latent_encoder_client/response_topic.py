"""The response topic as one client reads it: each partition from the moment of the client's start on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from logging import Logger
from typing import Any, TypeVar

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, Message, TopicPartition

from latent_encoder_client.errors import BrokerUnavailable

REFRESH_S = 30.0  # between two looks for new partitions, in seconds; a topic rarely gets one
REFRESH_TIMEOUT_S = 2.0  # the longest such look; meanwhile no response is read
PAUSE_S = 0.1  # in seconds, before a question is repeated

T = TypeVar("T")


class ResponseTopic:
    """A reader without a consumer group: each client sees every response, and nothing is committed.

    Not thread-safe; one thread polls.

    Raises:
        BrokerUnavailable: the broker does not respond, or the topic cannot be read.
    """

    def __init__(self, topic: str, properties: Mapping[str, Any], group: str, timeout_s: float, log: Logger) -> None:
        self._topic = topic
        reading = {"group.id": group, "enable.auto.commit": False, "auto.offset.reset": "earliest"}
        self._consumer = Consumer({"isolation.level": "read_committed", **properties, **reading}, logger=log)
        self._looked_at = time.monotonic()
        try:
            self._partitions = partitions_of(self._consumer, topic, timeout_s)
            self._consumer.assign([TopicPartition(topic, number, self._end(number, timeout_s)) for number in self._partitions])
        except BaseException:
            self._consumer.close()
            raise

    def _end(self, partition: int, timeout_s: float) -> int:
        """Return the offset of the next record. `OFFSET_END` would be looked up later, after the first request perhaps."""
        place = TopicPartition(self._topic, partition)
        found = asked(lambda: self._consumer.get_watermark_offsets(place, timeout=timeout_s), self._topic, timeout_s)
        return int(found[1])

    def poll(self, timeout_s: float) -> Message | None:
        """Return the next record or error, None if there is none within the time."""
        if time.monotonic() - self._looked_at > REFRESH_S:
            self._take_new_partitions()
        return self._consumer.poll(timeout_s)

    def _take_new_partitions(self) -> None:
        """Read partitions that were added to the topic, from their beginning: all their records are newer than the client."""
        try:
            found = partitions_of(self._consumer, self._topic, REFRESH_TIMEOUT_S)
        except BrokerUnavailable:
            found = self._partitions  # the next look may succeed
        if added := found - self._partitions:
            self._consumer.incremental_assign([TopicPartition(self._topic, number, OFFSET_BEGINNING) for number in added])
            self._partitions |= added
        self._looked_at = time.monotonic()

    def close(self) -> None:
        self._consumer.close()


def partitions_of(client: Any, topic: str, timeout_s: float) -> set[int]:
    """Return the numbers of a topic's partitions, by a consumer or a producer.

    Raises:
        BrokerUnavailable: the broker does not respond, or there is no such topic for this user.
    """

    def partitions() -> set[int] | None:
        found = client.list_topics(topic, timeout=timeout_s).topics[topic]
        if found.error is not None:
            raise KafkaException(found.error)
        return set(found.partitions) or None

    return asked(partitions, topic, timeout_s)


def asked(question: Callable[[], T | None], topic: str, timeout_s: float) -> T:
    """Return the broker's response to a question about a topic. It is repeated, because a new topic has no leader at first.

    Raises:
        BrokerUnavailable: there is no response within the time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if (found := question()) is not None:
                return found
            reason = f"no response within {timeout_s:g} s"
        except KafkaException as exc:
            reason = exc.args[0].str()
        if time.monotonic() >= deadline:
            raise BrokerUnavailable(
                f"Cannot use the topic {topic}: {reason}. Check the bootstrap servers, the topic's name, and that the service "
                "runs."
            )
        time.sleep(PAUSE_S)
