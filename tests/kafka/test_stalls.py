"""A worker never stalls: nothing holds up a partition that is its own, and no request holds up another partition."""

from __future__ import annotations

import time

import pytest

from config import Settings
from latent_encoder.kafka.clients import PAUSE_AFTER_S
from service import LatentEncoder
from tests.kafka_tools import MakeBench, read_responses, request_ids


@pytest.mark.usefixtures("apache_kafka")
def test_partition_that_was_taken_away_while_paused_is_read_when_it_comes_back(
    make_bench: MakeBench, encoder: LatentEncoder, settings: Settings
) -> None:
    """A rebalance takes a partition from a worker that is full, and gives it back when it has room again."""
    bench = make_bench(partitions=2)
    responses, gate = bench.responses, bench.gate()
    for partition in range(2):
        bench.send({"request_id": f"held-{partition}"}, partition=partition)
    changes = {"kafka_prefetch": 1, "kafka_revoke_timeout_s": 0.5}
    with bench.held_process(gate, KAFKA_PREFETCH="1", KAFKA_REVOKE_TIMEOUT_S="0.5") as first:
        gate.wait()
        time.sleep(PAUSE_AFTER_S + 1)  # the worker is full for so long that it pauses its partitions
        with bench.worker(encoder, bench.settings(settings, **changes)):
            first.wait_for("partitions revoked")
            gate.open()
            responses.take(2)
        first.wait_for("partitions assigned", count=2)
        for partition in range(2):
            bench.send({"request_id": f"later-{partition}"}, partition=partition)
        responses.read(lambda _: {"later-0", "later-1"} <= request_ids(responses).keys(), patience=30)


def test_requests_that_wait_for_a_retry_hold_up_no_other_partition(
    make_bench: MakeBench, encoder: LatentEncoder, settings: Settings
) -> None:
    """A good request is answered while a hundred requests of another partition wait for their next attempt."""
    bench = make_bench(partitions=2)
    (bench.folder / "file").touch()
    for n in range(100):
        bench.send({"request_id": f"bad-{n}", "output_dir": str(bench.folder / "file" / "folder")}, partition=0)
    with bench.worker(encoder, bench.settings(settings, kafka_retry_backoff_s=60)):
        time.sleep(1)
        bench.send({"request_id": "good"}, partition=1)
        (response,) = read_responses(bench.responses, 1, patience=40)
    assert (response["request_id"], response["status"]) == ("good", "success")
