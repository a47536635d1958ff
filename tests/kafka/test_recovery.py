"""Nothing is lost: signals, rebalances, a broker that goes away, encodes longer than every time-out."""

from __future__ import annotations

import signal
import time
from collections import Counter

import pytest

from config import Settings
from errors import KafkaFailed
from service import LatentEncoder
from tests.broker import ApacheKafka
from tests.kafka_tools import Bench, Events, MakeBench, both_protocols, client_config, read_responses, request_ids, wait_until

apache_kafka = pytest.mark.usefixtures("apache_kafka")


@apache_kafka
@both_protocols
def test_workers_share_and_hand_over(
    make_bench: MakeBench, encoder: LatentEncoder, settings: Settings, events: Events, protocol: str
) -> None:
    """If one joins and one leaves in the middle of the work, every request gets one response."""
    bench = make_bench(partitions=4)
    responses = bench.responses
    expected: Counter[str] = Counter()

    def second_has_worked() -> bool:
        """Send ten requests to each partition, so that some wait however fast the worker is."""
        for n in range(len(expected), len(responses.all_within(0.1)) + 40):
            expected[f"r{n}"] = 1
            bench.send({"request_id": f"r{n}"}, partition=n % 4)
        return len(events("request answered")) >= 5

    with bench.process(KAFKA_GROUP_PROTOCOL=protocol) as first:
        assert not second_has_worked()
        responses.take(5)
        with bench.worker(encoder, bench.settings(settings, kafka_group_protocol=protocol)):
            wait_until(second_has_worked, "the work of the second")
            first.signal(signal.SIGTERM)
            assert first.end() == 0
            responses.take(expected.total())
            wait_until(lambda: sum(bench.committed().values()) == expected.total(), "the commits")
    assert first.events("partitions revoked")
    responses.all_within(0.5)
    assert request_ids(responses) == expected


@apache_kafka
@both_protocols
def test_work_on_a_revoked_partition_is_dropped_at_the_deadline(
    make_bench: MakeBench, encoder: LatentEncoder, settings: Settings, protocol: str
) -> None:
    """It is not committed, and the new owner responds to it."""
    bench = make_bench(partitions=2)
    responses = bench.responses
    for partition in range(2):
        bench.send({"request_id": f"r{partition}"}, partition=partition)
    gate = bench.gate()
    with bench.held_process(gate, KAFKA_REVOKE_TIMEOUT_S="0", KAFKA_GROUP_PROTOCOL=protocol) as first:
        gate.wait()
        with bench.worker(encoder, bench.settings(settings, kafka_group_protocol=protocol)):
            first.wait_for("partitions revoked")
            assert first.events("partitions revoked")[0]["dropped"] == 1
            gate.open()
            responses.take(2)
            bench.wait_for_commit({0: 1, 1: 1})
            responses.all_within(1)
    assert request_ids(responses) == {"r0": 1, "r1": 1}


def test_encode_longer_than_the_poll_interval(
    bench: Bench, encoder: LatentEncoder, settings: Settings, events: Events
) -> None:
    """The worker keeps its partition; the request is encoded once and has one response."""
    config = client_config(bench.folder, session_timeout_ms=3000, heartbeat_interval_ms=500, max_poll_interval_ms=3000)
    responses, gate = bench.responses, bench.gate()
    with gate.holding(), bench.worker(encoder, bench.settings(settings, kafka_client_config=config)):
        bench.send({"request_id": "long"})
        bench.send({"request_id": "next"})
        gate.wait()
        time.sleep(4)  # longer than the poll interval of 3 s, after which the broker would give the partition away
        assert responses.all_within(0) == []
        gate.open()
        long, following = read_responses(responses, 2)
        bench.wait_for_commit({0: 2})
    assert (long["request_id"], following["request_id"]) == ("long", "next")
    assert len(responses.records) == 2
    assert [event["redelivered"] for event in events("request answered")] == [False, False]
    assert len(events("partitions assigned")) == 1
    assert not events("partitions lost")


@pytest.mark.parametrize("transactional", [False, True], ids=["at-least-once", "exactly-once"])
def test_broker_that_goes_away_is_waited_for(
    own: ApacheKafka,
    make_bench: MakeBench,
    encoder: LatentEncoder,
    settings: Settings,
    events: Events,
    transactional: bool,
) -> None:
    """A broker that is away at the start and for 20 s in the middle is logged once each time, and no response is missing."""
    bench = make_bench(servers=own.bootstrap_servers)
    own.stop()
    config = client_config(bench.folder, transaction_timeout_ms=10_000)  # the broker aborts a transaction meanwhile
    changes = {"kafka_transactional_id": "worker", "kafka_client_config": config} if transactional else {}
    with bench.worker(encoder, bench.settings(settings, **changes)) as worker:
        wait_until(lambda: bool(events("broker is away, waiting for it")), "the first message")
        own.start()
        for n in range(30):
            bench.send({"request_id": f"r{n}"})
        responses = bench.responses
        responses.take(5)
        own.kill()
        time.sleep(20)
        health = worker.handler.health
        assert (health.alive().ok, health.ready().ok) == (True, False)
        assert "cannot be reached" in health.ready().parts["broker"]
        own.start()
        for n in range(30, 40):
            bench.send({"request_id": f"r{n}"})
        responses.read(lambda _: len(request_ids(responses)) == 40)
        bench.wait_for_commit({0: 40})
    assert worker.outcome is True
    assert not transactional or set(request_ids(responses).values()) == {1}
    # At least twice: a broker that starts may drop the first connections, which is said too.
    assert len(events("broker is away, waiting for it")) == len(events("broker is back")) >= 2
    assert len(events("ready")) == len(events("not ready")) >= 2  # the last when it is stopped


def test_dead_letter_that_is_not_acknowledged_stops_the_service(
    own: ApacheKafka, make_bench: MakeBench, encoder: LatentEncoder, settings: Settings, events: Events
) -> None:
    """The worker stops if a reachable broker does not store a dead letter; a response is logged and waited for."""
    bench = make_bench(servers=own.bootstrap_servers, partitions=2)
    impatient = bench.settings(settings, kafka_ack_timeout_s=2, shutdown_timeout_s=1)
    gate = bench.gate()
    with gate.holding(), bench.worker(encoder, impatient) as worker:
        bench.send({"request_id": "r"}, partition=0)
        gate.wait()
        own.freeze()
        gate.open()
        wait_until(lambda: bool(events("response is not acknowledged")), "the message")
        assert worker.is_alive()
    assert worker.outcome is False
    own.kill()
    own.start()
    # In a group of its own: the other one waits until the session of the worker before is over.
    changes = {"kafka_consumer_group": "another", "kafka_max_retries": 1, "kafka_retry_backoff_s": 3}
    with bench.worker(encoder, bench.settings(impatient, **changes)) as worker:
        bench.send({"request_id": "bad", "output_dir": "/dev/null"}, partition=1)
        wait_until(lambda: bool(events("request failed")), "the first attempt")
        own.freeze()
        failure = worker.failure()
    assert isinstance(failure, KafkaFailed)
    assert f"KAFKA_ACK_TIMEOUT_S=2 for a dead letter in topic {bench.dlq_topic}" in str(failure)


def test_sigterm_finishes_the_request_in_flight(bench: Bench, encoder: LatentEncoder, settings: Settings) -> None:
    """Its response is sent and committed, the exit status is 0, and the request behind it is left to the next worker."""
    responses = bench.responses
    bench.send({"request_id": "first"})
    bench.send({"request_id": "second"})
    gate = bench.gate()
    with bench.held_process(gate) as process:
        gate.wait()
        process.signal(signal.SIGTERM)
        process.wait_for("stopping")
        gate.open()
        assert process.end() == 0
        assert not process.events("request failed")
    assert bench.committed() == {0: 1}
    responses.all_within(0.5)
    assert request_ids(responses) == {"first": 1}
    with bench.worker(encoder, bench.settings(settings)):
        responses.take(2)
        bench.wait_for_commit({0: 2})


def test_second_signal_stops_at_once(bench: Bench) -> None:
    """The request is uncommitted, has no response, and the exit status is that of a signal."""
    bench.send({"request_id": "r"})
    gate = bench.gate()
    with bench.held_process(gate) as process:
        gate.wait()
        process.signal(signal.SIGINT)
        process.wait_for("stopping")
        process.signal(signal.SIGTERM)
        assert process.end(patience=10) == 128 + signal.SIGTERM
        assert process.log()[-1]["event"].startswith("Error: Stopped at once by a second signal")
    assert bench.committed() == {}
    assert bench.responses.all_within(0.5) == []


def test_shutdown_that_takes_too_long_is_given_up(bench: Bench) -> None:
    """The request is left uncommitted, and the exit status is an error."""
    bench.send({"request_id": "r"})
    gate = bench.gate()
    with bench.held_process(gate, SHUTDOWN_TIMEOUT_S="0.5") as process:
        gate.wait()
        process.signal(signal.SIGTERM)
        assert process.end(patience=10) == 3
        (event,) = process.events("stopped before all was answered; it will be delivered again")
        assert event["unfinished"] == 1
    assert bench.committed() == {}
