"""The sizes of a worker's fetches: small, because a pause drops them, and never too small for a record."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition

from config import Settings
from latent_encoder.kafka.properties import consumer_properties, member_properties
from service import LatentEncoder
from tests.kafka_tools import QUIET, Bench, MakeBench, client_config, read_responses

RECORDS = 5000
"""Records of 400 bytes that wait: 2 MB, far more than a worker fetches ahead."""
ROUNDS = 4
PAUSED_S = 0.5
"""Seconds of a pause: enough for a fetch from a broker on this machine."""
MOST_BYTES = 400_000
"""Most bytes for an image. 131,000 were measured with a partition, and 5,243,000 with queues of 4 MiB."""


def test_fetches_of_a_pause_are_small(bench: Bench, settings: Settings) -> None:
    """A partition that is paused and resumed for each image costs some 100 KB, however many requests wait in it."""
    for _ in range(RECORDS):
        bench.send(b"x" * 400)
    received: list[int] = []

    def take(statistics: str) -> None:
        received.append(sum(broker["rxbytes"] for broker in json.loads(statistics)["brokers"].values()))

    more: dict[str, Any] = {"stats_cb": take, "statistics.interval.ms": 100}
    consumer = Consumer(member_properties(bench.settings(settings)) | QUIET | more)
    place = [TopicPartition(bench.request_topic, 0, 0)]
    consumer.assign(place)
    try:
        totals = [one_image(consumer, place, received) for _ in range(ROUNDS + 1)]
    finally:
        consumer.close()
    assert (totals[-1] - totals[0]) / ROUNDS < MOST_BYTES


def one_image(consumer: Consumer, place: list[TopicPartition], received: list[int]) -> int:
    """Take a record, pause the partition for a while, and return the bytes received so far."""
    message = consumer.poll(30)
    assert message is not None
    assert message.error() is None
    consumer.pause(place)
    until = time.monotonic() + PAUSED_S
    while time.monotonic() < until:
        consumer.poll(0.05)
    consumer.resume(place)
    return received[-1]


@pytest.mark.usefixtures("apache_kafka")
def test_record_that_is_larger_than_a_fetch_comes(make_bench: MakeBench, encoder: LatentEncoder, settings: Settings) -> None:
    """A request of 900 KB gets its response, also beside a partition in which many wait."""
    bench = make_bench(partitions=2)
    large = json.dumps({"request_id": "large", "note": "x" * 900_000}).encode()
    for number in range(200):
        bench.send(json.dumps({"request_id": f"r{number}", "note": "x" * 1000}).encode(), partition=0)
    for _ in range(3):
        bench.send(large, partition=1)
    with bench.worker(encoder, bench.settings(settings, kafka_max_message_bytes=1_000_000)):
        ids = [response["request_id"] for response in read_responses(bench.responses, 203)]
        bench.wait_for_commit({0: 200, 1: 3})
    assert ids.count("large") == 3


def test_fetches_of_the_file_are_taken(settings: Settings, tmp_path: Path) -> None:
    """KAFKA_CLIENT_CONFIG sets the sizes, and tools that read a topic have larger ones than a worker."""
    given = settings.model_copy(update={"kafka_client_config": client_config(tmp_path, max_partition_fetch_bytes=123_456)})
    assert member_properties(given)["max.partition.fetch.bytes"] == "123456"
    assert member_properties(settings)["queued.max.messages.kbytes"] == 64
    assert consumer_properties(settings)["queued.max.messages.kbytes"] == 4096
