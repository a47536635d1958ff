"""A worker watches its topics as long as it runs: topics that are gone, records that were deleted unread, and its lag."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from confluent_kafka import Producer, TopicPartition
from prometheus_client import REGISTRY

from config import Settings
from latent_encoder.kafka import topics
from latent_encoder.telemetry.metrics import CONSUMER_LAG, OLDEST_REQUEST
from service import LatentEncoder
from tests.helpers import IMAGES
from tests.kafka_tools import Bench, Events, MakeBench, Worker, read_responses, wait_until

DELETED = "records were deleted before they were read"


@pytest.fixture(autouse=True)
def no_lag() -> Iterator[None]:
    yield
    CONSUMER_LAG.clear()
    OLDEST_REQUEST.clear()


def delete_records(bench: Bench, before: int) -> None:
    """Delete the records of the request topic's first partition before an offset, as the retention does."""
    for deleted in bench.admin.delete_records([TopicPartition(bench.request_topic, 0, before)]).values():
        deleted.result()


def delete_topic(bench: Bench, name: str) -> None:
    for deleted in bench.admin.delete_topics([name]).values():
        deleted.result()
    wait_until(lambda: name not in bench.admin.list_topics(timeout=10).topics, "the end of the topic")


def parts(worker: Worker) -> dict[str, str]:
    return worker.handler.health.ready().parts


def lag_of(bench: Bench) -> Callable[[], dict[int, float | None]]:
    """Return a function that returns the lag of each partition."""

    def lag() -> dict[int, float | None]:
        name = "latent_encoder_consumer_lag"
        return {
            number: REGISTRY.get_sample_value(name, {"topic": bench.request_topic, "partition": str(number)})
            for number in range(bench.partitions)
        }

    return lag


@pytest.mark.usefixtures("apache_kafka")
def test_worker_whose_topic_is_gone_is_not_ready(
    bench: Bench, encoder: LatentEncoder, settings: Settings, events: Events
) -> None:
    """A topic that is deleted while the worker runs is named by its health, and the worker is ready when it is back."""
    with bench.worker(encoder, bench.settings(settings)) as worker:
        wait_until(lambda: worker.handler.health.ready().ok, "ready")
        for name in (bench.response_topic, bench.dlq_topic, bench.request_topic):
            delete_topic(bench, name)
            wait_until(lambda: parts(worker)["topics"] == f"missing: {name}", name)  # noqa: B023  # it is called at once
            bench.create(name)
            wait_until(lambda: worker.handler.health.ready().ok, "ready again")
    assert len(events("topics are gone: create them again")) == 3


@pytest.mark.usefixtures("apache_kafka")
def test_topic_that_was_created_again_is_read_from_its_start(
    bench: Bench, encoder: LatentEncoder, settings: Settings, events: Events
) -> None:
    """The first records of the new topic are read, though the worker's position in the old one lies behind them."""
    gate = bench.gate()
    with gate.holding(), bench.worker(encoder, bench.settings(settings, kafka_prefetch=1)) as worker:
        bench.send({"request_id": "old"})
        gate.wait()
        wait_until(lambda: bool(worker.handler._assignment.paused), "the pause")
        delete_topic(bench, bench.request_topic)
        bench.create(bench.request_topic)
        for n in range(3):
            bench.send({"request_id": f"new-{n}"})
        wait_until(lambda: bool(events("request topic was created again, reading it from its beginning")), "the message")
        gate.open()
        ids = [response["request_id"] for response in read_responses(bench.responses, 4)]
        bench.wait_for_commit({0: 3})
    assert ids == ["old", "new-0", "new-1", "new-2"]


@pytest.mark.usefixtures("apache_kafka")
def test_records_deleted_before_the_start_are_reported(
    bench: Bench, encoder: LatentEncoder, settings: Settings, events: Events
) -> None:
    """A worker that starts behind the deleted records logs which ones were missed."""
    bench.send({"request_id": "first"})
    with bench.worker(encoder, bench.settings(settings)):
        bench.wait_for_commit({0: 1})
    for n in range(4):
        bench.send({"request_id": f"r{n}"})
    delete_records(bench, 4)
    with bench.worker(encoder, bench.settings(settings)):
        bench.wait_for_commit({0: 5})
    (event,) = events(DELETED)
    assert (event["partition"], event["first_offset"], event["last_offset"], event["at_most"]) == (0, 1, 3, 3)


@pytest.mark.usefixtures("apache_kafka")
def test_records_deleted_while_the_worker_is_full_are_reported(
    bench: Bench, encoder: LatentEncoder, settings: Settings, events: Events
) -> None:
    """Records that are deleted from a paused partition are logged and counted, also if none comes behind them."""

    def missed() -> float:
        return REGISTRY.get_sample_value("latent_encoder_records_missed_total") or 0

    before = missed()
    gate = bench.gate()
    with gate.holding(), bench.worker(encoder, bench.settings(settings, kafka_prefetch=1)) as worker:
        bench.send({"request_id": "held"})
        gate.wait()
        wait_until(lambda: bool(worker.handler._assignment.paused), "the pause")
        for n in range(3):
            bench.send({"request_id": f"r{n}"})
        delete_records(bench, 3)
        gate.open()
        bench.wait_for_commit({0: 4})
        wait_until(lambda: len(events(DELETED)) == 1, "the message")
    for n in range(2):
        bench.send({"request_id": f"s{n}"})
    delete_records(bench, 6)
    with bench.worker(encoder, bench.settings(settings)):
        wait_until(lambda: len(events(DELETED)) == 2, "the message about all records")
    assert [(event["first_offset"], event["last_offset"]) for event in events(DELETED)] == [(1, 2), (4, 5)]
    assert missed() - before == 4


@pytest.mark.usefixtures("apache_kafka")
def test_gaps_of_transactions_are_no_deleted_records(
    bench: Bench, encoder: LatentEncoder, settings: Settings, events: Events
) -> None:
    """Markers and aborted records take offsets of their own; the lag of a worker that has read all is 0 all the same."""
    lag = lag_of(bench)
    producer = Producer({"bootstrap.servers": bench.servers, "transactional.id": bench.group})
    producer.init_transactions()
    with bench.worker(encoder, bench.settings(settings, kafka_transactional_id=f"{bench.group}-worker")):
        for n, end in enumerate([producer.commit_transaction, producer.abort_transaction] * 2):
            producer.begin_transaction()
            value = f'{{"request_id": "r{n}", "image_path": "{IMAGES / "photo.jpg"}"}}'
            producer.produce(bench.request_topic, value.encode())
            producer.flush()
            end()
        read_responses(bench.responses, 2)
        bench.wait_for_commit({0: 5})
        wait_until(lambda: lag() == {0: 0}, "no lag")
        delete_records(bench, 8)
        bench.send({"request_id": "last"})
        read_responses(bench.responses, 3)
        wait_until(lambda: lag() == {0: 0}, "no lag after the last")
    with bench.worker(encoder, bench.settings(settings)):
        wait_until(lambda: lag() == {0: 0}, "no lag of the next worker")
    assert events(DELETED) == []


@pytest.mark.usefixtures("apache_kafka")
def test_lag_is_true_while_nothing_is_fetched(make_bench: MakeBench, encoder: LatentEncoder, settings: Settings) -> None:
    """The lag of partitions that are paused, or of which nothing was read yet, follows the broker's end offsets."""
    bench = make_bench(partitions=2)
    lag = lag_of(bench)
    labels = {"topic": bench.request_topic, "partition": "1"}
    gate = bench.gate()
    with gate.holding(), bench.worker(encoder, bench.settings(settings, kafka_prefetch=1)) as worker:
        bench.send({"request_id": "held"}, partition=0)
        gate.wait()
        bench.send({"request_id": "waits"}, partition=1)
        wait_until(lambda: lag() == {0: 1, 1: 1}, "the first lag")
        wait_until(lambda: bool(worker.handler._assignment.paused), "the pause")
        for n in range(3):
            bench.send({"request_id": f"r{n}"}, partition=1)
        wait_until(lambda: lag() == {0: 1, 1: 4}, "the lag of paused partitions")
        wait_until(lambda: (REGISTRY.get_sample_value(OLDEST, labels) or 0) > 0, "the age")
        gate.open()
        bench.wait_for_commit({0: 1, 1: 4})
        wait_until(lambda: lag() == {0: 0, 1: 0}, "no lag")
        wait_until(lambda: REGISTRY.get_sample_value(OLDEST, labels) == 0, "no age")


@pytest.mark.usefixtures("apache_kafka")
def test_offsets_of_other_workers_are_not_looked_at(make_bench: MakeBench, encoder: LatentEncoder, settings: Settings) -> None:
    """Each of two workers looks at the offsets of its own partitions, also after these have changed."""
    bench = make_bench(partitions=4)

    def looked_at(worker: Worker) -> set[int]:
        seen = worker.handler._topics.seen
        return set(seen.ends) & set(seen.starts) if seen is not None else set()

    with bench.worker(encoder, bench.settings(settings)) as first:
        wait_until(lambda: looked_at(first) == {0, 1, 2, 3}, "all partitions")
        with bench.worker(encoder, bench.settings(settings)) as second:
            wait_until(lambda: len(looked_at(first)) == len(looked_at(second)) == 2, "a half for each")
            assert looked_at(first) | looked_at(second) == {0, 1, 2, 3}
        wait_until(lambda: looked_at(first) == {0, 1, 2, 3}, "all partitions again")


@pytest.mark.usefixtures("apache_kafka")
def test_large_topic_that_is_gone_is_noticed_by_its_offsets(
    bench: Bench, encoder: LatentEncoder, settings: Settings, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the topic itself is looked at once an hour, it is missed within seconds, and read from its start when it is back."""
    monkeypatch.setattr(topics, "TOPIC_LOOK_S_A_PARTITION", 3600.0)
    monkeypatch.setattr(topics, "LONGEST_TOPIC_LOOK_S", 3600.0)
    with bench.worker(encoder, bench.settings(settings)) as worker:
        bench.send({"request_id": "old"})
        bench.wait_for_commit({0: 1})
        looked_due = worker.handler._topics._topics_due
        assert looked_due > time.monotonic() + 1800
        delete_topic(bench, bench.request_topic)
        wait_until(lambda: parts(worker)["topics"] == f"missing: {bench.request_topic}", "the missing topic")
        bench.create(bench.request_topic)
        bench.send({"request_id": "new"})
        ids = [response["request_id"] for response in read_responses(bench.responses, 2)]
    assert ids == ["old", "new"]
    assert len(events("request topic was created again, reading it from its beginning")) == 1


@pytest.mark.usefixtures("apache_kafka")
def test_topic_that_was_replaced_between_two_looks_is_noticed(bench: Bench, settings: Settings) -> None:
    """A partition that ends earlier than before makes the watch look at the topic itself at once."""
    ids: list[str] = []
    for n in range(3):
        bench.send({"request_id": f"r{n}"})
    watch = topics.TopicWatch(bench.settings(settings), ids.append, lambda _: None)
    watch.watch([0])
    watch._look()
    watch._topics_due = time.monotonic() + 3600
    delete_topic(bench, bench.request_topic)
    bench.create(bench.request_topic)

    def looked_again() -> bool:
        watch._look()
        return bool(ids)

    wait_until(looked_again, "the id of the new topic")
    assert ids == [watch.topic_id]


OLDEST = "latent_encoder_oldest_request_seconds"
