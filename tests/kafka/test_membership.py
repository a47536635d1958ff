"""Members of the group: static ones, and workers that the group does not take."""

from __future__ import annotations

import signal

import pytest

from config import Settings
from errors import KafkaFailed
from service import LatentEncoder
from tests.broker import ApacheKafka, Broker, Tansu
from tests.broker.maven import java_and_maven_are_here
from tests.kafka_tools import (
    Events,
    MakeBench,
    as_environment,
    both_protocols,
    read_responses,
    request_ids,
    wait_until,
)

needs_java = pytest.mark.skipif(not java_and_maven_are_here(), reason="needs Java 17 or newer and Maven")


def assert_ends_for_want_of_the_protocol(make_bench: MakeBench, broker: Broker) -> None:
    bench = make_bench(servers=broker.bootstrap_servers)
    with bench.process(KAFKA_GROUP_PROTOCOL="consumer") as process:
        assert process.end() == 3
        (error,) = [event["event"] for event in process.log() if event["event"].startswith("Error: ")]
    assert "KAFKA_GROUP_PROTOCOL=consumer needs Apache Kafka 4.0" in error
    assert "set classic" in error


def test_broker_that_does_not_know_the_protocol_ends_the_service(make_bench: MakeBench) -> None:
    """The worker ends with status 3 and one line that names the setting, although librdkafka waits in silence."""
    with Tansu() as broker:
        assert_ends_for_want_of_the_protocol(make_bench, broker)


@needs_java
def test_broker_with_the_protocol_off_ends_the_service(make_bench: MakeBench) -> None:
    """The worker ends with status 3 and one line that names the setting."""
    with ApacheKafka(properties={"group.coordinator.rebalance.protocols": "classic"}) as broker:
        assert_ends_for_want_of_the_protocol(make_bench, broker)


@pytest.mark.usefixtures("apache_kafka")
@both_protocols
def test_second_worker_with_the_same_instance_id(
    make_bench: MakeBench, encoder: LatentEncoder, settings: Settings, protocol: str
) -> None:
    """One of the two ends with an error that names the setting, and the other one goes on.

    In the classic protocol the second worker takes the place of the first; in the protocol `consumer` it is refused.
    """
    bench = make_bench()
    responses = bench.responses
    given = bench.settings(settings, kafka_group_protocol=protocol, kafka_group_instance_id="worker-0")
    with bench.worker(encoder, given) as first:
        bench.send({"request_id": "a"})
        responses.take(1)
        bench.wait_for_commit({0: 1})
        with bench.worker(encoder, given) as second:
            failure = (first if protocol == "classic" else second).failure()
            bench.send({"request_id": "b"})
            assert read_responses(responses, 2)[1]["request_id"] == "b"
    assert isinstance(failure, KafkaFailed)
    assert "same KAFKA_GROUP_INSTANCE_ID" in str(failure)


@needs_java
@both_protocols
def test_static_member_that_returns_keeps_its_partitions(
    make_bench: MakeBench, encoder: LatentEncoder, settings: Settings, events: Events, protocol: str
) -> None:
    """While a worker is stopped and started again, its requests wait for it, and the other worker sees no rebalance."""
    with ApacheKafka(properties={"group.consumer.session.timeout.ms": "45000"}) as broker:
        bench = make_bench(partitions=2, servers=broker.bootstrap_servers)
        responses = bench.responses
        given = {"kafka_group_protocol": protocol}
        environment = as_environment(given | {"kafka_group_instance_id": "worker-0"})
        with bench.process(**environment) as first:
            first.wait_for("partitions assigned")
            with bench.worker(encoder, bench.settings(settings, **given, kafka_group_instance_id="worker-1")):
                wait_until(lambda: assigned(events) == [1], "a share of the second")
                first.signal(signal.SIGTERM)
                assert first.end() == 0
                for partition in range(2):
                    bench.send({"request_id": f"r{partition}"}, partition=partition)
                responses.take(1)
                with bench.process(**environment) as again:
                    responses.take(2)
                    bench.wait_for_commit({0: 1, 1: 1})
                    wait_until(lambda: len(again.events("request answered")) == 1, "the event of the response")
                assert assigned(events) == [1]
    assert request_ids(responses) == {"r0": 1, "r1": 1}


def assigned(events: Events) -> list[int]:
    """Return the count of partitions in each assignment of a worker in this process, except empty ones."""
    return [len(event["partitions"]) for event in events("partitions assigned") if event["partitions"]]
