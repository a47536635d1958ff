"""The metrics of Kafka mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import get_args

import pytest
from prometheus_client import REGISTRY

from config import Settings
from latent_encoder.kafka.jobs import RecordJob
from latent_encoder.kafka.lanes import Lanes
from latent_encoder.kafka.positions import Reading
from latent_encoder.kafka.records import Incoming
from latent_encoder.kafka.telemetry import Backlog
from latent_encoder.telemetry.metrics import CONSUMER_LAG, OLDEST_REQUEST
from models import ImageNote
from service import LatentEncoder
from tests.helpers import IMAGES
from tests.kafka_tools import Bench, Events, read_responses, wait_until

Value = Callable[..., float]


@pytest.fixture(autouse=True)
def no_lag() -> Iterator[None]:
    yield
    CONSUMER_LAG.clear()
    OLDEST_REQUEST.clear()


def test_every_way_that_a_request_can_end_is_counted(
    bench: Bench, encoder: LatentEncoder, settings: Settings, grown: Value, events: Events
) -> None:
    """A success, an error, retries with a dead letter, a redelivery and an unusable message each count once."""
    (bench.folder / "file").touch()
    responses = bench.responses
    with bench.worker(encoder, bench.settings(settings, kafka_max_retries=2, kafka_retry_backoff_s=0.05)):
        bench.send({"request_id": "good"})
        read_responses(responses, 1)
        bench.send({"request_id": "good"})
        bench.send({"request_id": "bad", "image_path": "/no"})
        bench.send({"request_id": "stuck", "output_dir": str(bench.folder / "file")})
        bench.send(b"no JSON")
        read_responses(responses, 4)
        bench.wait_for_commit({0: 5})
        wait_until(lambda: len(events("request answered")) == 5, "the end of all")
        wait_until(lambda: grown("latent_encoder_commits_total", "ok") == 5, "the commits")
        wait_until(lambda: REGISTRY.get_sample_value("latent_encoder_in_flight") == 0, "nothing in flight")
    counted = {
        ("latent_encoder_requests_total", "success", ""): 2,
        ("latent_encoder_requests_total", "error", "IMAGE_NOT_FOUND"): 1,
        ("latent_encoder_requests_total", "error", "OUTPUT_DIR_NOT_WRITABLE"): 1,
        ("latent_encoder_requests_total", "error", "MESSAGE_UNUSABLE"): 1,
        ("latent_encoder_requests_total", "dropped", ""): 0,
        ("latent_encoder_retries_total",): 2,
        ("latent_encoder_dead_letters_total", "OUTPUT_DIR_NOT_WRITABLE"): 1,
        ("latent_encoder_dead_letters_total", "MESSAGE_UNUSABLE"): 1,
        ("latent_encoder_redeliveries_total",): 1,
        ("latent_encoder_rebalances_total", "assigned"): 1,
        ("latent_encoder_queue_seconds_count",): 5,
        ("latent_encoder_request_seconds_count",): 5,
        ("latent_encoder_stage_seconds_count", "encode"): 1,
        ("latent_encoder_stage_seconds_count", "save"): 1,
    }
    assert {place: grown(*place) for place in counted} == counted
    # Of the VAE: the encode, the request that came again, the one without an image, and three attempts to write.
    assert sum(grown("latent_encoder_vae_cache_total", result) for result in ("hit", "miss")) >= 4
    outcomes = {event["request_id"]: event["outcome"] for event in events("request answered")}
    assert outcomes == {"good": "success", "bad": "error", "stuck": "error", None: "error"}
    assert [event["attempts"] for event in events("request answered")] == [1, 1, 1, 3, 0]


def test_notes_on_images_are_counted(bench: Bench, encoder: LatentEncoder, settings: Settings, grown: Value) -> None:
    """Each encoded image counts once for each of its notes; a redelivery and an opaque image do not."""
    masked = str(IMAGES / "rgba.png")
    responses = bench.responses
    with bench.worker(encoder, bench.settings(settings)):
        for count in (1, 2):
            bench.send({"request_id": "dropped", "image_path": masked})
            read_responses(responses, count)
        bench.send({"request_id": "over white", "image_path": masked, "alpha": "white"})
        bench.send({"request_id": "opaque", "image_path": str(IMAGES / "photo.jpg")})
        *_, white, opaque = read_responses(responses, 4)
        bench.wait_for_commit({0: 4})
    assert (white["metadata"]["alpha"], white["metadata"]["image_notes"]) == ("white", ["alpha_composited"])
    assert (opaque["metadata"]["alpha"], opaque["metadata"]["image_notes"]) == ("drop", [])
    assert {note: grown("latent_encoder_image_notes_total", note) for note in get_args(ImageNote)} == {
        **dict.fromkeys(get_args(ImageNote), 0),
        "alpha_dropped": 1,
        "alpha_composited": 1,
    }


def test_dropped_requests_are_counted(bench: Bench, encoder: LatentEncoder, settings: Settings, grown: Value) -> None:
    """A request that was taken and not begun when the worker stops counts as dropped."""
    gate = bench.gate()
    with gate.holding(), bench.worker(encoder, bench.settings(settings)) as worker:
        bench.send({"request_id": "first"})
        bench.send({"request_id": "second"})
        wait_until(lambda: grown("latent_encoder_stage_seconds_count", "scale") == 2, "both prepared")
        gate.wait()
        worker.handler.stop()
        wait_until(lambda: grown("latent_encoder_requests_total", "dropped", "") == 1, "the second one dropped")
        gate.open()
    assert grown("latent_encoder_requests_total", "dropped", "") == 1
    assert grown("latent_encoder_requests_total", "success", "") == 1


def test_lag_is_what_waits(bench: Bench, encoder: LatentEncoder, settings: Settings) -> None:
    """The lag counts the requests in flight and those behind them, and is zero once all have a response."""

    def lag() -> float | None:
        return REGISTRY.get_sample_value("latent_encoder_consumer_lag", {"topic": bench.request_topic, "partition": "0"})

    gate = bench.gate()
    with gate.holding(), bench.worker(encoder, bench.settings(settings)):
        bench.send({"request_id": "long"})
        for n in range(4):
            bench.send({"request_id": f"r{n}"})
        wait_until(lambda: lag() == 5, "five behind")
        gate.open()
        bench.wait_for_commit({0: 5})
        wait_until(lambda: lag() == 0, "nothing behind")


def test_backlog_of_a_partition_that_is_gone_is_forgotten() -> None:
    """The metrics have no value for a partition that another worker has now."""
    backlog, lanes = Backlog(), Lanes()
    lanes.add(RecordJob(Incoming("requests", 1, 4, None, None, b"{}", ())))
    readings = {("requests", number): Reading(position=5, start=0, end=9) for number in (0, 1)}
    backlog.observe(readings, lanes)
    del readings["requests", 0]
    backlog.observe(readings, lanes)
    for gauge, expected in ((CONSUMER_LAG, 5), (OLDEST_REQUEST, pytest.approx(0, abs=1))):
        shown = {sample.labels["partition"]: sample.value for family in gauge.collect() for sample in family.samples}
        assert shown == {"1": expected}


def test_age_of_a_request_that_is_not_read_yet_is_the_time_of_its_worker() -> None:
    """It grows from the moment at which the worker got to its position, and is 0 if nothing is left."""
    seconds = 0.0
    backlog = Backlog(lambda: seconds)

    def age(position: int) -> float | None:
        backlog.observe({("requests", 0): Reading(position, start=0, end=2)}, Lanes())
        return REGISTRY.get_sample_value("latent_encoder_oldest_request_seconds", {"topic": "requests", "partition": "0"})

    assert age(0) == 0
    seconds = 30
    assert age(0) == 30
    assert age(1) == 0
    seconds = 40
    assert age(1) == 10
    assert age(2) == 0
