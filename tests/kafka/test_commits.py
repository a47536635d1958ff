"""Commits that the broker refuses or does not take: they are repeated, not multiplied, and nothing waits for ever."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from confluent_kafka import Consumer, KafkaError, TopicPartition

from config import Settings
from errors import KafkaFailed
from latent_encoder.kafka.commits import OffsetCommits
from latent_encoder.kafka.jobs import State
from latent_encoder.kafka.timers import Timers
from service import LatentEncoder
from tests.broker import ApacheKafka
from tests.kafka_tools import QUIET, Bench, MakeBench, wait_until

pytestmark = pytest.mark.usefixtures("apache_kafka")

BROKEN_S = 20.0
"""More seconds than any of these waits may take, and fewer than librdkafka takes without a limit, which is over 60."""


class CountedTimers(Timers):
    """Timers that count the calls that they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self.count += 1
        super().after(seconds, call)


def consumer_of(bench: Bench) -> Consumer:
    return Consumer({**QUIET, "bootstrap.servers": bench.servers, "group.id": bench.group, "enable.auto.commit": False})


def unexpected(reason: KafkaFailed) -> None:
    raise reason


def test_refused_commits_are_repeated_once_not_each(bench: Bench) -> None:
    """Ten refusals of three partitions make one repetition, and its refusals the next one."""
    timers = CountedTimers()
    consumer = consumer_of(bench)
    commits = OffsetCommits(consumer, timers, unexpected)
    offsets = [TopicPartition(bench.request_topic, n, 1) for n in range(3)]
    for offset in offsets:
        commits.add(offset)
    for _ in range(10):
        commits.on_commit(KafkaError(KafkaError.REBALANCE_IN_PROGRESS), offsets)
    assert timers.count == 1
    while timers._calls:
        timers.run_due()
    for _ in range(10):
        commits.on_commit(KafkaError(KafkaError.REBALANCE_IN_PROGRESS), offsets)
    assert timers.count == 2
    consumer.close()


def test_last_commit_is_confirmed_by_the_broker(bench: Bench) -> None:
    """It is there when `settle` returns, also after the deadline."""
    consumer = consumer_of(bench)
    commits = OffsetCommits(consumer, Timers(), unexpected)
    commits._unconfirmed[bench.request_topic, 0] = TopicPartition(bench.request_topic, 0, 5)
    commits.settle([(bench.request_topic, 0)], deadline=time.monotonic() + 30)
    assert (len(commits), bench.committed()) == (0, {0: 5})
    commits._unconfirmed[bench.request_topic, 0] = TopicPartition(bench.request_topic, 0, 6)
    commits.settle([(bench.request_topic, 0)], deadline=0.0)
    assert (len(commits), bench.committed()) == (0, {0: 6})
    consumer.close()


def test_last_commit_does_not_wait_for_a_frozen_broker(own: ApacheKafka, make_bench: MakeBench) -> None:
    """It gives up at the deadline, with the offset unconfirmed."""
    bench = make_bench(servers=own.bootstrap_servers)
    consumer = consumer_of(bench)
    commits = OffsetCommits(consumer, Timers(), unexpected)
    commits._unconfirmed[bench.request_topic, 0] = TopicPartition(bench.request_topic, 0, 4)
    commits.settle([(bench.request_topic, 0)], deadline=time.monotonic() + 60)
    assert not len(commits)
    own.freeze()
    commits._unconfirmed[bench.request_topic, 0] = TopicPartition(bench.request_topic, 0, 5)
    began = time.monotonic()
    commits.settle([(bench.request_topic, 0)], deadline=began + 1)
    assert time.monotonic() - began < BROKEN_S
    assert len(commits) == 1
    own.kill()  # without a connection, the client's end is quick


@pytest.mark.usefixtures("events")
@pytest.mark.parametrize("transactional", [False, True], ids=["at-least-once", "exactly-once"])
def test_worker_ends_in_time_without_a_broker(
    own: ApacheKafka, make_bench: MakeBench, encoder: LatentEncoder, settings: Settings, transactional: bool
) -> None:
    """With a response on its way to a frozen broker, a stopped worker ends soon after SHUTDOWN_TIMEOUT_S."""
    bench = make_bench(servers=own.bootstrap_servers)
    more = {"kafka_transactional_id": bench.group} if transactional else {}
    gate = bench.gate()
    with gate.holding(), bench.worker(encoder, bench.settings(settings, shutdown_timeout_s=2.0, **more)) as worker:
        bench.send({"request_id": "r"})
        gate.wait()
        assert [job.state for job in worker.handler._lanes.jobs()] == [State.SUBMITTED]
        own.freeze()
        gate.open()
        gate.wait_for_end()
        wait_until(
            lambda: any(worker.handler._lanes.ready()) or bool(worker.handler._lanes.sent_before(float("inf"))), "a send"
        )
        began = time.monotonic()
        worker.handler.stop()
        worker.end()
    assert worker.outcome is False
    assert time.monotonic() - began < BROKEN_S
