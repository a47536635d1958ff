"""The Kafka clients of a worker, and the limits on its polling that follow from their properties."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition

from config import Settings
from latent_encoder.kafka.connection import BrokerState
from latent_encoder.kafka.properties import (
    STATISTICS_INTERVAL_MS,
    make_client,
    member_properties,
    poll_interval_s,
    producer_properties,
)

PAUSE_AFTER_S = 2.0
"""Longest `pause_after_s`. After a pause librdkafka takes up to a second to fetch again, which short encodes would notice."""


class Clients:
    """The consumer, and the maker of producers. They connect by themselves; nothing is consumed yet."""

    def __init__(
        self,
        settings: Settings,
        broker: BrokerState,
        on_statistics: Callable[[str], None],
        on_commit: Callable[[KafkaError | None, list[TopicPartition]], None],
    ) -> None:
        """Make the consumer, which makes the calls while it is polled.

        Raises:
            SettingsError: librdkafka refuses a property.
        """
        self._settings = settings
        self._broker = broker
        callbacks = {"error_cb": broker.on_error, "stats_cb": on_statistics, "on_commit": on_commit}
        properties = member_properties(settings) | callbacks
        self.consumer = make_client(Consumer, properties, settings)
        interval_s = poll_interval_s(properties)
        self.revoke_timeout_s = min(settings.kafka_revoke_timeout_s, 0.8 * interval_s)
        """Longest time to finish jobs before their partition is revoked. A worker that does not poll within the interval loses
        its place in the group; a fifth of it is left for the commit."""
        self.pause_after_s = min(PAUSE_AFTER_S, 0.25 * interval_s)
        """Time without room for a further request after which the partitions are paused, so that the worker polls again well
        within the interval."""

    def make_producer(self) -> Producer:
        """Return a new producer of responses and dead letters.

        Raises:
            SettingsError: librdkafka refuses a property.
        """
        callbacks = {"error_cb": self._broker.on_producer_error, "stats_cb": self._broker.on_producer_statistics}
        properties = producer_properties(self._settings) | {"statistics.interval.ms": STATISTICS_INTERVAL_MS}
        return make_client(Producer, properties | callbacks, self._settings)

    def close(self, deadline: float) -> None:
        """Leave the group, and return at the deadline (monotonic clock, s) at the latest.

        Without a broker that responds, librdkafka would go on for minutes.
        """
        closing = threading.Thread(target=self.consumer.close, name="close", daemon=True)
        closing.start()
        closing.join(max(0.0, deadline - time.monotonic()))
