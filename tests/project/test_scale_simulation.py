"""The simulation of many workers, compared with closed forms and with the rules that it states."""

from __future__ import annotations

from dataclasses import replace

import pytest
from click.testing import CliRunner

from benchmarks.scale_events import PREPARE, Faults, Group, Outcome, Queue, Scenario, Simulation, Steps
from benchmarks.scale_model import CALLS, BrokerLoad, Calls, cost_of_a_million, prefixes_for
from benchmarks.scale_simulation import main

ENCODE_S = 0.5
STEPS = Steps(prepare_s=0.1, encode_s=ENCODE_S, write_s=0.05)
BASE = Scenario(4, 8, STEPS, seconds=200, warm_up_s=20)


def outcome(base: Scenario = BASE, **changes: object) -> Outcome:
    return Simulation(replace(base, **changes)).run()  # type: ignore[arg-type]


@pytest.mark.parametrize(("workers", "partitions"), [(1, 1), (1, 8), (4, 8), (8, 4), (100, 200), (100, 30)])
def test_rate_is_that_of_the_workers_that_have_partitions(workers: int, partitions: int) -> None:
    """Without faults and limits, it is the smaller count of workers and partitions times that of one encoder."""
    found = outcome(workers=workers, partitions=partitions)
    assert found.per_second == pytest.approx(min(workers, partitions) / ENCODE_S, rel=0.01)


@pytest.mark.parametrize(
    ("steps", "threads", "waiting", "slowest_s"),
    [
        (Steps(0.8, 0.5, 0.05), 1, 1, 0.8),
        (Steps(0.8, 0.5, 0.05), 2, 1, 0.5),
        (Steps(0.1, 0.5, 0.9), 1, 16, 0.9),
        (Steps(0.1, 0.5, 0.4, publish_trips=9), 1, 1, 0.9),
        (Steps(0.1, 0.5, 0.4, publish_trips=9), 1, 2, 0.5),
        (Steps(0.1, 0.5, 0.4, fetch_trips=8), 1, 1, 0.8),
        (Steps(0.1, 0.5, 0.4, fetch_trips=8), 1, 2, 0.5),
    ],
)
def test_rate_is_that_of_the_slowest_step(steps: Steps, threads: int, waiting: int, slowest_s: float) -> None:
    """A pipeline whose buffers suffice is as fast as its slowest step, round trips to storage included."""
    found = outcome(workers=2, steps=steps, threads=threads, waiting=waiting, prefetch=8, latency_s=0.1)
    assert found.per_second == pytest.approx(2 / slowest_s, rel=0.01)


def test_pixels_in_memory_are_bounded() -> None:
    """Beside the threads that prepare, two images may have their pixels in memory, so a slow step stops the preparation."""
    found = Simulation(replace(BASE, workers=1, partitions=1, steps=Steps(0.1, 0.5, 0.9), threads=2, prefetch=8, seconds=20))
    found.run()
    (worker,) = found._workers
    assert worker.pixels == 4
    assert len(worker.queues[PREPARE]) == 8 - 4


def test_one_request_in_hand_takes_the_sum_of_the_steps() -> None:
    """With KAFKA_PREFETCH=1, nothing overlaps."""
    assert outcome(prefetch=1).per_second == pytest.approx(4 / 0.65, rel=0.01)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_wait_is_that_of_one_server_with_a_constant_time(load: float) -> None:
    """A worker that only encodes, with arrivals at random, is the queue M/D/1: Pollaczek and Khinchine's mean wait."""
    found = outcome(workers=1, partitions=1, steps=Steps(0, ENCODE_S, 0), rate=load / ENCODE_S, seconds=60_000)
    mean = sum(found.latencies) / len(found.latencies)
    assert mean == pytest.approx(ENCODE_S + load * ENCODE_S / (2 * (1 - load)), rel=0.05)


def test_prefix_and_coordinator_bound_the_rate() -> None:
    """A prefix serves its writes divided by those of an image, and a coordinator its requests divided by three."""
    steps = Steps(0.01, 0.05, 0.01, publish_trips=1, publish_writes=5)
    many = replace(BASE, workers=30, partitions=60, steps=steps, prefetch=6, seconds=30)
    one = outcome(many, writes_a_second=1000)
    assert one.per_second == pytest.approx(200, rel=0.03)
    assert one.throttled > 0
    assert outcome(many, writes_a_second=1000, prefixes=2).per_second == pytest.approx(400, rel=0.05)
    assert outcome(many, commits_a_second=900).per_second == pytest.approx(300, rel=0.03)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_every_request_has_a_response_although_workers_die_and_restart(protocol: str, static: bool) -> None:
    """No request is lost in a backlog, with workers that die every two minutes and a rolling restart."""
    group = Group(protocol, heartbeat_s=3, session_s=10, static=static)
    faults = Faults(death_every_s=120, start_s=5, rolling_from_s=30, rolling_at_once=2)
    found = outcome(workers=10, partitions=40, backlog=3000, seconds=100_000, warm_up_s=0, group=group, faults=faults)
    assert found.deaths > 0
    assert found.completed == 3000
    assert found.lag == 0


def test_static_members_that_are_back_in_time_cause_no_rebalance() -> None:
    """A restart within the session timeout moves no partition; otherwise each restart is two changes."""
    faults = Faults(start_s=5, rolling_from_s=30)
    static, dynamic = (outcome(faults=faults, group=Group(heartbeat_s=1, static=static)) for static in (True, False))
    assert static.rebalances == 0
    assert 0 < dynamic.rebalances <= 2 * BASE.workers
    assert static.rolled_at > 0


def test_dead_worker_delays_its_partitions_by_the_session_timeout() -> None:
    """The longest latency is at least the timeout, and its encode is repeated; without deaths it is short."""
    group, faults = Group(heartbeat_s=1, session_s=45), Faults(death_every_s=150, start_s=1000)
    died, lived = (outcome(rate=4, group=group, faults=each) for each in (faults, Faults()))
    assert max(died.latencies) > group.session_s > 10 * max(lived.latencies)
    assert died.repeated > 0
    assert lived.repeated == 0


def test_same_seed_gives_the_same_figures() -> None:
    """Runs with one seed are equal, with another seed they differ."""
    runs = [outcome(rate=6, seed=seed).latencies for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_queue_serves_one_after_the_other() -> None:
    """Calls that come together wait for each other; an idle time is not made up for."""
    queue = Queue(10)
    assert [queue.take(0, 2), queue.take(0, 3), queue.take(2, 1)] == pytest.approx([0.2, 0.5, 2.1])


def test_costs_and_prefixes_follow_the_calls() -> None:
    """A million images cost their GET and PUT; DELETE is free; prefixes follow from the scarcer kind of call."""
    assert cost_of_a_million(Calls(get_before=4, get_after=3, put=4, delete=1))["calls"] == pytest.approx(7 * 0.4 + 4 * 5)
    # 5 writes of an image, and 3500 in a second: 700 images.
    assert prefixes_for(690, CALLS, share=1) == 1
    assert prefixes_for(710, CALLS, share=1) == 2


def test_offsets_that_are_looked_up_grow_with_the_workers() -> None:
    """Each worker looks at its own partitions: ten times the workers and partitions are ten times the offsets."""
    small, large = (BrokerLoad(each, 2 * each, each, Group(), paused=True) for each in (100, 1000))
    assert large.offsets_looked_up == pytest.approx(10 * small.offsets_looked_up)


def test_command_prints_its_tables() -> None:
    """All tables are printed for small counts of workers."""
    result = CliRunner().invoke(main, ["--workers", "2"], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output.count("| --- |") >= 6
