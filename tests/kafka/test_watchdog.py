"""The watchdog of the consumer, and the parts of a worker's readiness that depend on the broker."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from config import Settings
from errors import KafkaFailed
from latent_encoder.kafka import clients
from latent_encoder.kafka.positions import Reading
from latent_encoder.kafka.properties import producer_properties
from latent_encoder.kafka.stalls import NOT_ALIVE_FACTOR, Watchdog
from service import LatentEncoder
from tests.broker import ApacheKafka
from tests.kafka_tools import Bench, MakeBench, client_config, read_responses, wait_until

PLACE = ("requests", 0)
OTHER = ("requests", 1)


class Clock:
    """A clock that is set by hand, in seconds."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Watched:
    """A watchdog with a clock of its own."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.dog = Watchdog(60, self.clock)

    def wait(self, seconds: float, readings: dict[tuple[str, int], Reading], *, may_fetch: bool = True) -> None:
        """Turn once, and look after that many seconds."""
        self.dog.turn(may_fetch=may_fetch)
        self.dog.observe(readings, ())
        self.clock.seconds += seconds
        self.dog.turn(may_fetch=may_fetch)
        self.dog.observe(readings, ())


def test_partition_that_hands_out_nothing_is_a_fault() -> None:
    """It is a fault after KAFKA_STALL_TIMEOUT_S, names the partition, and hangs the worker after a multiple of that."""
    watched = Watched()
    unread = {PLACE: Reading(5, 0, 8), OTHER: Reading(8, 0, 8)}
    watched.wait(59, unread)
    assert watched.dog.fault is None
    watched.wait(1, unread)
    assert watched.dog.fault == "nothing comes from requests [0] for 60 s, though records wait there"
    assert watched.dog.hung is None
    watched.wait(60 * (NOT_ALIVE_FACTOR - 1), unread)
    assert watched.dog.hung is not None
    watched.wait(1, unread | {PLACE: Reading(6, 0, 8)})
    assert (watched.dog.fault, watched.dog.hung) == (None, None)


def test_progress_of_another_partition_hides_no_stall() -> None:
    """A partition that stands still is noticed although others go on."""
    watched = Watched()
    for position in range(8):
        watched.wait(10, {PLACE: Reading(5, 0, 8), OTHER: Reading(position, 0, 9)})
    assert watched.dog.fault is not None


def test_time_without_room_does_not_count() -> None:
    """A full worker, a paused partition, and one of which all was deleted have no fault."""
    watched = Watched()
    watched.wait(600, {PLACE: Reading(5, 0, 8)}, may_fetch=False)
    watched.wait(600, {PLACE: Reading(5, 8, 8)})
    assert watched.dog.fault is None
    watched.dog.observe({PLACE: Reading(5, 0, 8)}, {PLACE})
    watched.wait(59, {PLACE: Reading(5, 0, 8)})
    assert watched.dog.fault is None


def test_worker_that_gets_nothing_is_not_ready_and_then_not_alive(
    bench: Bench, encoder: LatentEncoder, settings: Settings
) -> None:
    """A partition that librdkafka keeps paused is noticed; time in which the worker was full does not count."""
    gate = bench.gate()
    changes = {"kafka_prefetch": 1, "kafka_stall_timeout_s": 2}
    with gate.holding(), bench.worker(encoder, bench.settings(settings, **changes)) as worker:
        health = worker.handler.health
        bench.send({"request_id": "held"})
        gate.wait()
        bench.send({"request_id": "waits"})
        wait_until(lambda: bool(worker.handler._assignment.paused), "the pause")
        assert health.ready().parts["fetch"] == "ok"
        gate.open()
        bench.wait_for_commit({0: 2})
        worker.handler._consumer.pause(worker.handler._consumer.assignment())
        bench.send({"request_id": "stuck"})
        wait_until(lambda: health.ready().parts["fetch"].startswith("nothing comes from"), "not ready")
        assert health.alive().ok
        wait_until(lambda: not health.alive().ok, "not alive")
        worker.handler._consumer.resume(worker.handler._consumer.assignment())
        bench.wait_for_commit({0: 3})
        wait_until(lambda: health.ready().ok and health.alive().ok, "ready again")


def test_worker_whose_responses_are_not_acknowledged_is_not_ready(
    own: ApacheKafka, make_bench: MakeBench, encoder: LatentEncoder, settings: Settings
) -> None:
    """It is ready again when the broker has acknowledged the response."""
    bench = make_bench(servers=own.bootstrap_servers)
    gate = bench.gate()
    with gate.holding(), bench.worker(encoder, bench.settings(settings, kafka_ack_timeout_s=2)) as worker:
        health = worker.handler.health
        bench.send({"request_id": "r"})
        gate.wait()
        wait_until(lambda: health.ready().ok, "ready")
        own.freeze()
        gate.open()
        wait_until(lambda: health.ready().parts["responses"].startswith("a response is not acknowledged"), "not ready")
        own.kill()
        own.start()
        read_responses(bench.responses, 1)
        wait_until(lambda: health.ready().ok, "ready again")


def test_worker_without_a_transaction_coordinator_is_not_ready(
    own: ApacheKafka, make_bench: MakeBench, encoder: LatentEncoder, settings: Settings
) -> None:
    """A broker that cannot keep the state of transactions leaves the part `transactions` faulty until it can."""
    properties = own._properties
    own.stop()
    right = properties.read_text()
    factor = "transaction.state.log.replication.factor"
    properties.write_text(right.replace(f"{factor}=1", f"{factor}=3"))
    own.start()
    bench = make_bench(servers=own.bootstrap_servers)
    with bench.worker(encoder, bench.settings(settings, kafka_transactional_id="worker")) as worker:
        health = worker.handler.health
        wait_until(lambda: "the coordinator does not respond" in health.ready().parts["transactions"], "the fault")
        wait_until(lambda: set(health.ready().faults) == {"transactions"}, "all others ready")
        own.stop()
        properties.write_text(right)
        own.start()
        bench.send({"request_id": "r"})
        read_responses(bench.responses, 1)
        wait_until(lambda: health.ready().ok, "ready")


@pytest.mark.usefixtures("apache_kafka")
def test_worker_whose_place_is_taken_ends(bench: Bench) -> None:
    """The first of two workers with one `group.instance.id` ends with one line and status 3."""
    config = str(client_config(bench.folder, group_instance_id="worker-0"))
    with bench.process(KAFKA_CLIENT_CONFIG=config) as first:
        first.wait_for("ready")
        with bench.process(KAFKA_CLIENT_CONFIG=config) as second:
            second.wait_for("ready")
            assert first.end() == 3
            second.signal(signal.SIGTERM)
            assert second.end() == 0
    assert last_line(first.log_file).startswith(f"Error: Cannot consume topic {bench.request_topic} in group {bench.group}: ")
    assert "fenced" in last_line(first.log_file)


@pytest.mark.usefixtures("apache_kafka")
def test_producer_that_gave_up_ends_the_worker(
    make_bench: MakeBench, encoder: LatentEncoder, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fatal error of librdkafka's producer, here a gap that a refused response leaves, stops the worker in good order."""
    gapless = {"enable.gapless.guarantee": True}
    monkeypatch.setattr(clients, "producer_properties", lambda settings: producer_properties(settings) | gapless)
    bench = make_bench(create=False)
    bench.create(bench.request_topic, bench.dlq_topic)
    bench.create(bench.response_topic, config={"max.message.bytes": "100"})
    bench.send({"request_id": "r"})
    with bench.worker(encoder, bench.settings(settings)) as worker:
        failure = worker.failure()
    assert isinstance(failure, KafkaFailed)
    assert "gap-less guarantee" in str(failure)
    assert bench.committed() == {}


def last_line(log: Path) -> str:
    """Return the last line of a worker's log, which must have no traceback."""
    text = log.read_text()
    assert "Traceback" not in text
    assert "exception" not in text
    return text.splitlines()[-1]
