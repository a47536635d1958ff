"""The figures behind `docs/scale.md`: measured times and calls, published limits and prices, and the arithmetic with them.

Change a figure here, and `python -m benchmarks.scale_simulation` prints all tables with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.scale_events import Group, Steps
from latent_encoder.kafka.topics import LOOK_EVERY_S, topics_every_s


@dataclass(frozen=True)
class Calls:
    """The calls of an image to its bucket: docs/object-storage.md, "Calls"."""

    get_before: int = 4
    """GET before the encode: three names of metadata, and the image."""
    get_after: int = 3
    """GET under the claim: the three names again."""
    head: int = 0
    put: int = 4
    delete: int = 1

    @property
    def reads(self) -> int:
        return self.get_before + self.get_after + self.head

    @property
    def writes(self) -> int:
        return self.put + self.delete


CALLS = Calls()

FETCH_TRIPS, PUBLISH_TRIPS = 2.0, 5.0
"""Round trips of an image: docs/object-storage.md, "Calls"."""

LATENCY_S = 0.05
"""Seconds of a call to storage; Amazon names 0.1 to 0.2 s for small objects."""


def steps_of(prepare_s: float, encode_s: float, write_s: float) -> Steps:
    """Return the steps of an image in object storage."""
    return Steps(
        prepare_s,
        encode_s,
        write_s,
        FETCH_TRIPS,
        PUBLISH_TRIPS,
        CALLS.get_before,
        CALLS.get_after + CALLS.head,
        CALLS.writes,
        variation=0.1,
    )


CPU_STEPS = steps_of(0.06, 3.6, 0.06)
"""A megapixel on two CPU cores in bfloat16: docs/encoder.md, "Speed"; file work: benchmarks/README.md, "prepare_bench"."""

GPU_STEPS = steps_of(0.06, 0.05, 0.03)
"""A megapixel on a GPU, assumed as in benchmarks/gpu_simulation.py."""

CLASSIC = Group("classic", heartbeat_s=3.0, member_s=0.0008)
CONSUMER = Group("consumer", heartbeat_s=5.0, member_s=0.0)
"""The protocols with their default intervals. The time for each member is the slope between 10 and 200 members, measured."""

MOST_CLASSIC = 1_048_588 // 274
"""Most members of a classic group: bytes of the largest record by default, over those of a member in its record, measured."""

MEASURED_STEPS = Steps(0.01, 0.5, 0.01)
"""Steps of the workers of `scale_measure --only workers`, whose encode sleeps."""
MEASURED_RATES = ((1, 8, 1.99), (2, 8, 4.05), (4, 8, 8.13), (4, 2, 4.04))
"""Workers, partitions, and their requests a second."""
MEASURED_KILL_S = 28.5
"""Seconds from the first request until all of 160 have a response, if one of four workers is killed behind twenty."""
MEASURED_REBALANCES = (
    ("classic, 200 members, one joins", CLASSIC, True, 6.35),
    ("classic, 200 members, one leaves", CLASSIC, False, 3.17),
    ("consumer, 200 members, one joins", CONSUMER, True, 5.06),
    ("consumer, 10, 50 and 200 members, one leaves, mean", CONSUMER, False, 2.45),
)

READS_A_SECOND, WRITES_A_SECOND = 5500, 3500
"""Calls of a prefix: https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html"""

COMMIT_CPU_S, READ_OFFSET_CPU_S = 0.0001, 0.00007
"""CPU seconds of the coordinator for a commit and for reading an offset, measured."""
COORDINATOR_CPUS = 8
"""CPUs of the broker that is the group's coordinator."""
COMMITS_AN_IMAGE, READS_AN_IMAGE = 2, 1
"""The note of the start, its confirmation, and the offset behind the response: kafka/starts.py, kafka/commits.py."""

LOOK_BYTES, LOOK_BYTES_A_PARTITION = 64.0, 54.0
"""Bytes of a look at the offsets of a worker's partitions, measured: a constant part, and that of each partition."""
LOOK_CPU_S = 0.0015
"""CPU seconds of the brokers for a look at the offsets of two partitions: the mean of four runs with 0.0004 to 0.0023."""
TOPIC_LOOK_BYTES, TOPIC_LOOK_BYTES_A_PARTITION = 105.0, 26.0
TOPIC_LOOK_CPU_S, TOPIC_LOOK_CPU_S_A_PARTITION = 0.0005, 0.0000017
"""Likewise of a look at the request topic, with all of its partitions."""
STATISTICS_BYTES, STATISTICS_S = 769.0, 0.000015
"""Size and reading time of the consumer's statistics for each partition of the topic, measured. They come each second."""
FETCH_BYTES = 131_000.0
"""Bytes that a worker fetches for an image whose encode is longer than 2 s, while a backlog waits, measured."""
IDLE_FETCHES_A_SECOND = 10.0
RECORD_BYTES, RESPONSE_BYTES = 400, 2500
CONNECTIONS = 3
"""Connections of a worker to each broker: consumer, producer, and the watch of the topics."""

REPLICAS = 3
PARTITIONS_A_BROKER = 4000
"""Replicas of a broker: https://cwiki.apache.org/confluence/spaces/KAFKA/pages/148641509"""
OTHER_PARTITIONS = 108
"""Partitions of the responses (100) and of the dead letters (8), which need fewer."""

READ_PRICE, WRITE_PRICE, MONTH_GB_PRICE = 0.0004 / 1000, 0.005 / 1000, 0.023
"""Dollars of S3 Standard in us-east-1, 2026: a GET or HEAD, a PUT or LIST, a GB for a month. DELETE costs nothing."""
IMAGE_GB = 0.003
"""Output files of a megapixel: 3 MB."""


def cost_of_a_million(calls: Calls = CALLS) -> dict[str, float]:
    """Return dollars for a million images: their calls, and a month of their files."""
    return {
        "calls": 1e6 * (calls.reads * READ_PRICE + calls.put * WRITE_PRICE),
        "month": 1e6 * IMAGE_GB * MONTH_GB_PRICE,
    }


def prefixes_for(per_second: float, calls: Calls = CALLS, share: float = 0.7) -> int:
    """Return the prefixes that serve a rate of images with `share` of their limit."""
    return max(1, math.ceil(per_second / share * max(calls.reads / READS_A_SECOND, calls.writes / WRITES_A_SECOND)))


def coordinator_s(per_second: float) -> float:
    """Return CPU seconds of the coordinator in a second."""
    return per_second * (COMMITS_AN_IMAGE * COMMIT_CPU_S + READS_AN_IMAGE * READ_OFFSET_CPU_S)


def commits_a_second() -> float:
    """Return the requests that a coordinator serves in a second, on all of its CPUs."""
    requests = COMMITS_AN_IMAGE + READS_AN_IMAGE
    return COORDINATOR_CPUS * requests / (COMMITS_AN_IMAGE * COMMIT_CPU_S + READS_AN_IMAGE * READ_OFFSET_CPU_S)


@dataclass(frozen=True)
class BrokerLoad:
    """The load of all brokers together."""

    workers: int
    partitions: int
    per_second: float
    group: Group
    paused: bool
    """Encodes are longer than 2 s, so the workers pause their partitions."""

    @property
    def brokers(self) -> int:
        return max(3, math.ceil((self.partitions + OTHER_PARTITIONS) * REPLICAS / PARTITIONS_A_BROKER))

    @property
    def connections_each(self) -> int:
        """Connections of each broker: every worker has partitions on some, and a producer for all."""
        return self.workers * CONNECTIONS

    @property
    def requests(self) -> dict[str, float]:
        """Requests a second, by kind."""
        return {
            "produce": self.per_second,
            "fetch": self.per_second if self.paused else self.workers * IDLE_FETCHES_A_SECOND,
            "heartbeat": self.workers / self.group.heartbeat_s,
            "offsets": self.per_second * (COMMITS_AN_IMAGE + READS_AN_IMAGE),
            "look": self.workers * (2 * min(self.own, self.brokers) / LOOK_EVERY_S + 1 / topics_every_s(self.partitions)),
        }

    @property
    def own(self) -> float:
        """Partitions of a worker."""
        return self.partitions / self.workers

    @property
    def fetched_bytes(self) -> float:
        """Bytes a second of requests to the workers."""
        return self.per_second * (FETCH_BYTES if self.paused else RECORD_BYTES)

    @property
    def look_bytes(self) -> float:
        """Bytes a second of all looks at offsets and at the topic."""
        offsets = LOOK_BYTES + LOOK_BYTES_A_PARTITION * self.own
        topic = TOPIC_LOOK_BYTES + TOPIC_LOOK_BYTES_A_PARTITION * self.partitions
        return self.workers * (offsets / LOOK_EVERY_S + topic / topics_every_s(self.partitions))

    @property
    def look_cpus(self) -> float:
        """CPU seconds of all looks in a second."""
        topic = TOPIC_LOOK_CPU_S + TOPIC_LOOK_CPU_S_A_PARTITION * self.partitions
        return self.workers * (LOOK_CPU_S / LOOK_EVERY_S + topic / topics_every_s(self.partitions))

    @property
    def offsets_looked_up(self) -> float:
        """Offsets of partitions that the brokers look up in a second."""
        return self.workers / LOOK_EVERY_S * 2 * self.own
