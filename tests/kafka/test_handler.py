"""The service over Kafka: every kind of request in its place, with real nodes and a real broker."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import pytest
from prometheus_client import REGISTRY

from config import VERSION, Settings
from errors import ErrorCode, KafkaFailed
from kafka_handler import MOST_SET_ASIDE
from models import Metadata
from service import LatentEncoder
from tests.helpers import IMAGES, VAE, load_latent
from tests.kafka_tools import Bench, Events, MakeBench, read_responses, wait_until

pytestmark = pytest.mark.core

IMAGE = str(IMAGES / "photo.jpg")

REFUSED: list[tuple[dict[str, Any], ErrorCode, str]] = [
    ({"image_path": "/no/such.jpg"}, ErrorCode.IMAGE_NOT_FOUND, "/no/such.jpg"),
    ({"image_path": str(IMAGES / "truncated.jpg")}, ErrorCode.IMAGE_INVALID, "truncated.jpg"),
    ({"vae_model_name": "none.safetensors"}, ErrorCode.VAE_MODEL_NOT_FOUND, "none.safetensors"),
    ({"vae_model_name": "broken.safetensors"}, ErrorCode.VAE_MODEL_INVALID, "broken.safetensors"),
    ({"image_path": str(IMAGES / "5x4000.png")}, ErrorCode.SCALING_FAILED, "megapixels"),
    ({"image_path": None}, ErrorCode.INVALID_REQUEST, "image_path: Field required"),
    ({"image_path": 7}, ErrorCode.INVALID_REQUEST, "image_path: "),
    ({"megapixels": "1.0"}, ErrorCode.INVALID_REQUEST, "megapixels: "),
    ({"megapixels": 17}, ErrorCode.INVALID_REQUEST, "megapixels: "),
    ({"upscale_method": "cubic"}, ErrorCode.INVALID_REQUEST, "upscale_method: "),
    ({"correlation_id": 7}, ErrorCode.INVALID_REQUEST, "correlation_id: "),
    ({"timestamp": "now"}, ErrorCode.INVALID_REQUEST, "timestamp: "),
    ({"output_dir": ""}, ErrorCode.INVALID_REQUEST, "output_dir: "),
]

UNUSABLE: dict[str, tuple[bytes | None, str, str | None]] = {
    "no value": (None, "has no value", None),
    "empty": (b"", "not JSON", None),
    "not UTF-8": (b'{"request_id": "latin", "image_path": "caf\xe9.jpg"}', "not UTF-8", "latin"),
    "not JSON": (b"image_path=photo.jpg", "not JSON", None),
    "cut off": (b'{"request_id": "cut", "image_path": "pho', "not JSON", "cut"),
    "an array of two": (b'[{"request_id": "one"}, {"request_id": "two"}]', "not an object: list", None),
    "a string": (b'"photo.jpg"', "not an object: str", None),
    "too deep": (b'{"a":' * 20_000, "not JSON", None),
    "too many digits": (b'{"request_id": "digits", "megapixels": ' + b"1" * 5000 + b"}", "not JSON", "digits"),
    "too large": (b'{"request_id": "large", "pad": "' + b"x" * 200_000 + b'"}', "KAFKA_MAX_MESSAGE_BYTES", "large"),
}


def test_request_gets_its_answer(bench: Bench, encoder: LatentEncoder, settings: Settings) -> None:
    """The response has the specification's fields and the additions, and its files are there."""
    responses = bench.responses
    with bench.worker(encoder, bench.settings(settings)):
        before = int(time.time())
        request = {"request_id": "r-1", "correlation_id": "w-1", "image_path": IMAGE, "output_dir": str(bench.folder / "x")}
        bench.send({**request, "vae_model_name": VAE, "upscale_method": "nearest", "timestamp": 1.5})
        (response,) = read_responses(responses, 1)
        bench.wait_for_commit({0: 1})
    latent, image = bench.folder / "x" / "latent_photo_r-1.pt", bench.folder / "x" / "scaled_image_photo_r-1.png"
    metadata = response.pop("metadata")
    assert before <= response.pop("timestamp") <= time.time()
    assert response == {
        "request_id": "r-1",
        "correlation_id": "w-1",
        "status": "success",
        "latent_file_path": str(latent),
        "latent_shape": list(load_latent(latent).shape),
        "error_message": None,
        "error_code": None,
        "scaled_image_path": str(image),
    }
    assert metadata == json.loads(Path(f"{latent}.json").read_text())
    assert Metadata.model_validate(metadata).scaled_image_sha256 == hashlib.sha256(image.read_bytes()).hexdigest()
    assert (metadata["upscale_method"], metadata["megapixels"]) == ("nearest", 0.01)


def test_key_and_headers_go_through(bench: Bench, encoder: LatentEncoder, settings: Settings) -> None:
    """The response has the request's key, whatever its bytes, and its headers: of one name, empty, null, not text."""
    headers = (("traceparent", b"00-1-2-01"), ("tenant", b"\xff\x00"), ("tenant", b""), ("nothing", None))
    responses = bench.responses
    with bench.worker(encoder, bench.settings(settings)):
        bench.send({"request_id": "with"}, key=b"\x00key", headers=headers)
        bench.send({"request_id": "without"})
        bench.send({"request_id": "failing", "image_path": "/no"}, key=b"", headers=headers)
        records = responses.take(3)
    assert [record.key for record in records] == [b"\x00key", b"without", b""]
    assert [record.headers for record in records] == [headers, (), headers]


def test_request_without_an_id_has_the_same_one_each_time(bench: Bench, encoder: LatentEncoder, settings: Settings) -> None:
    """The id is made of topic, partition and offset, so a second delivery finds the files of the first."""
    responses = bench.responses
    expected = [str(uuid5(NAMESPACE_URL, f"kafka:{bench.request_topic}/0/{offset}")) for offset in range(2)]
    with bench.worker(encoder, bench.settings(settings)):
        bench.send({})
        bench.send({"request_id": None, "image_path": "/no"})
        assert [response["request_id"] for response in read_responses(responses, 2)] == expected
    assert responses.records[0].key == expected[0].encode()


def test_request_errors_are_answered_at_once(
    bench: Bench, encoder: LatentEncoder, settings: Settings, model_dir: Path
) -> None:
    """Each of them, among good requests, gets one error response in order, no retry and no dead letter, and is committed."""
    (model_dir / "broken.safetensors").write_bytes(b"no weights")
    responses, dead_letters = bench.responses, bench.dead_letters
    with bench.worker(encoder, bench.settings(settings)):
        for n, (fields, _, _) in enumerate(REFUSED):
            bench.send({"request_id": f"bad-{n}", "correlation_id": f"c-{n}", **fields})
            bench.send({"request_id": f"good-{n}"})
        got = read_responses(responses, 2 * len(REFUSED))
        bench.wait_for_commit({0: 2 * len(REFUSED)})
        assert dead_letters.all_within(0.5) == []
    for n, (fields, code, text) in enumerate(REFUSED):
        bad, good = got[2 * n : 2 * n + 2]
        assert (good["request_id"], good["status"]) == (f"good-{n}", "success")
        assert (bad["request_id"], bad["status"], bad["error_code"]) == (f"bad-{n}", "error", code)
        assert text in bad["error_message"]
        assert bad["correlation_id"] == (None if "correlation_id" in fields else f"c-{n}")
        for absent in ("latent_file_path", "latent_shape", "scaled_image_path", "metadata"):
            assert bad[absent] is None


def test_request_with_an_id_that_cannot_be_used_is_answered_under_its_key(
    bench: Bench, encoder: LatentEncoder, settings: Settings
) -> None:
    """The response to an id of the wrong type has another id; the sender knows it by its key."""
    responses = bench.responses
    with bench.worker(encoder, bench.settings(settings)):
        bench.send({"request_id": 7}, key=b"mine")
        (response,) = read_responses(responses, 1)
    assert response["error_code"] == "INVALID_REQUEST"
    assert "request_id: " in response["error_message"]
    assert responses.records[0].key == b"mine"


def test_unusable_messages_are_dead_letters(bench: Bench, encoder: LatentEncoder, settings: Settings) -> None:
    """The dead letter has the key, bytes and headers untouched, and headers with the reason; a readable id gets a response."""
    responses, dead_letters = bench.responses, bench.dead_letters
    headers = (("tenant", b"\xff"),)
    with bench.worker(encoder, bench.settings(settings, kafka_max_message_bytes=150_000)):
        for value, _, _ in UNUSABLE.values():
            bench.send(value, key=b"k", headers=headers)
        bench.send({"request_id": "good"})
        ids = [request_id for _, _, request_id in UNUSABLE.values() if request_id]
        got = read_responses(responses, len(ids) + 1)
        letters = dead_letters.take(len(UNUSABLE))
        bench.wait_for_commit({0: len(UNUSABLE) + 1})
    assert [response["request_id"] for response in got] == [*ids, "good"]
    assert {response["error_code"] for response in got[:-1]} == {"MESSAGE_UNUSABLE"}
    assert got[-1]["status"] == "success"
    for offset, (letter, (value, text, request_id)) in enumerate(zip(letters, UNUSABLE.values(), strict=True)):
        assert (letter.key, letter.value, letter.headers[:1]) == (b"k", value, headers)
        why = {name: (content or b"").decode() for name, content in letter.headers[1:]}
        assert text in why.pop("dlq.error.message")
        assert abs(int(why.pop("dlq.original.timestamp")) / 1000 - time.time()) < 300
        assert why.pop("dlq.error.class") in (
            "errors.MessageUnusable",
            "UnicodeDecodeError",
            "json.decoder.JSONDecodeError",
            "RecursionError",
            "ValueError",
        )
        assert why == {
            "dlq.error.code": "MESSAGE_UNUSABLE",
            "dlq.original.topic": bench.request_topic,
            "dlq.original.partition": "0",
            "dlq.original.offset": str(offset),
            "dlq.consumer.group": bench.group,
            "dlq.attempts": "0",
            "dlq.service.version": VERSION,
            **({"dlq.request.id": request_id} if request_id else {}),
        }


def test_transient_error_is_tried_again_and_then_a_dead_letter(
    bench: Bench, encoder: LatentEncoder, settings: Settings, events: Events
) -> None:
    """After the retries there is an error response and a dead letter, and the requests behind it are served."""
    (bench.folder / "file").touch()
    bad = {"request_id": "bad", "output_dir": str(bench.folder / "file")}
    responses, dead_letters = bench.responses, bench.dead_letters
    with bench.worker(encoder, bench.settings(settings, kafka_max_retries=2, kafka_retry_backoff_s=0.2)):
        bench.send(bad, key=b"k")
        bench.send({"request_id": "good"})
        first, second = read_responses(responses, 2)
        (letter,) = dead_letters.take(1)
        bench.wait_for_commit({0: 2})
    assert (first["request_id"], first["error_code"]) == ("bad", "OUTPUT_DIR_NOT_WRITABLE")
    assert (second["request_id"], second["status"]) == ("good", "success")
    headers = dict(letter.headers)
    assert headers["dlq.error.code"] == b"OUTPUT_DIR_NOT_WRITABLE"
    assert headers["dlq.error.class"] in (b"FileExistsError", b"NotADirectoryError")
    assert headers["dlq.attempts"] == b"3"
    assert json.loads(letter.value or b"") == {"image_path": IMAGE, **bad}
    assert [event["attempt"] for event in events("request failed")] == [1, 2, 3]


def test_transient_error_that_passes_is_no_error(
    bench: Bench, encoder: LatentEncoder, settings: Settings, events: Events
) -> None:
    """If the obstacle is removed between two attempts, there is one successful response and no dead letter."""
    obstacle = bench.folder / "file"
    obstacle.touch()
    responses, dead_letters = bench.responses, bench.dead_letters
    with bench.worker(encoder, bench.settings(settings, kafka_retry_backoff_s=0.5)):
        bench.send({"request_id": "r", "output_dir": str(obstacle)})
        wait_until(lambda: bool(events("request failed")), "the first attempt")
        obstacle.unlink()
        (response,) = read_responses(responses, 1)
        bench.wait_for_commit({0: 1})
        assert dead_letters.all_within(0.5) == []
    assert response["status"] == "success"


def test_request_that_comes_again_is_answered_without_encoding(
    bench: Bench, encoder: LatentEncoder, settings: Settings, events: Events
) -> None:
    """The stored response is sent, even if the image is gone; a changed image or a damaged file means a new encode."""
    image = bench.folder / "image.jpg"
    image.write_bytes((IMAGES / "photo.jpg").read_bytes())
    responses = bench.responses

    def again() -> dict[str, Any]:
        """Deliver the request once more, and return the metadata of the response."""
        bench.send({"request_id": "r", "image_path": str(image)})
        response = read_responses(responses, len(responses.records) + 1)[-1]
        assert response["status"] == "success"
        assert response["metadata"]["latent_sha256"] == hashlib.sha256(latent.read_bytes()).hexdigest()
        metadata: dict[str, Any] = response["metadata"]
        return metadata

    latent = bench.folder / "output" / "latent_image_r.pt"
    with bench.worker(encoder, bench.settings(settings)):

        def encodes() -> int:
            return sum(not event["redelivered"] for event in events("request answered"))

        first = again()
        written = latent.stat()
        assert again() == first
        image.unlink()
        assert again() == first
        assert latent.stat() == written
        wait_until(lambda: encodes() == 1, "one encode")

        image.write_bytes((IMAGES / "grey.png").read_bytes())
        second = again()
        assert second["fingerprint"] != first["fingerprint"]
        wait_until(lambda: encodes() == 2, "the second encode")
        latent.write_bytes(latent.read_bytes()[:-1])
        assert again()["fingerprint"] == second["fingerprint"]
        wait_until(lambda: encodes() == 3, "the third encode")


@pytest.mark.usefixtures("apache_kafka")
def test_response_that_its_topic_refuses_becomes_a_dead_letter(
    make_bench: MakeBench, encoder: LatentEncoder, settings: Settings
) -> None:
    """A request whose response is over the topic's limit becomes a dead letter, and the next one is served."""
    bench = make_bench(create=False)
    bench.create(bench.request_topic, bench.dlq_topic)
    bench.create(bench.response_topic, config={"max.message.bytes": "900"})
    responses, dead_letters = bench.responses, bench.dead_letters
    with bench.worker(encoder, bench.settings(settings)):
        bench.send({"request_id": "good"}, key=b"k")
        bench.send({"request_id": "bad", "image_path": "/no"})
        (letter,) = dead_letters.take(1)
        (response,) = read_responses(responses, 1)
        bench.wait_for_commit({0: 2})
    assert response["request_id"] == "bad"
    assert (letter.key, dict(letter.headers)["dlq.error.code"]) == (b"k", b"RESPONSE_REFUSED")
    assert b"max.message.bytes" in (dict(letter.headers)["dlq.error.message"] or b"")


@pytest.mark.usefixtures("apache_kafka")
def test_dead_letter_that_is_refused_stops_the_service(
    make_bench: MakeBench, encoder: LatentEncoder, settings: Settings
) -> None:
    """The worker stops with the reason, and the offset is not committed."""
    bench = make_bench(create=False)
    bench.create(bench.request_topic, bench.response_topic)
    bench.create(bench.dlq_topic, config={"max.message.bytes": "200"})
    with bench.worker(encoder, bench.settings(settings)) as worker:
        bench.send({"request_id": "good"})
        bench.wait_for_commit({0: 1})
        bench.send(b"not JSON" * 100)
        outcome = worker.failure()
    assert isinstance(outcome, KafkaFailed)
    assert f"Topic {bench.dlq_topic} refused a dead letter" in str(outcome)
    assert bench.committed() == {0: 1}


def test_missing_topics_are_waited_for(
    make_bench: MakeBench, encoder: LatentEncoder, settings: Settings, events: Events
) -> None:
    """One message names them and the remedy; the worker goes on by itself as soon as they exist."""
    bench = make_bench(create=False)
    bench.create(bench.request_topic)
    names = sorted((bench.response_topic, bench.dlq_topic))

    def reports() -> list[list[str]]:
        event = "waiting for topics: create them, or set KAFKA_CREATE_TOPICS=true"
        return [report["missing"] for report in events(event)]

    with bench.worker(encoder, bench.settings(settings)):
        wait_until(lambda: names in reports(), "the message")
        time.sleep(4)  # the topics are looked for several times
        # The broker may show a topic later than it creates it, or one before the other: other lists are reported, too.
        assert reports().count(names) == 1
        bench.create(bench.response_topic, bench.dlq_topic)
        bench.send({"request_id": "r"})
        assert read_responses(bench.responses, 1)[0]["request_id"] == "r"
    assert reports().count(names) == 1


def test_missing_topics_are_created_where_that_is_wanted(
    make_bench: MakeBench, encoder: LatentEncoder, settings: Settings
) -> None:
    """The topics have as many partitions as the settings state."""
    bench = make_bench(create=False)
    options = {"kafka_create_topics": True, "kafka_topic_partitions": 3, "kafka_topic_replication": 1}
    with bench.worker(encoder, bench.settings(settings, **options)):
        wait_until(lambda: bench.dlq_topic in bench.admin.list_topics(timeout=10).topics, "the topics")
        bench.send({"request_id": "r"}, partition=2)
        bench.partitions = 3
        assert read_responses(bench.responses, 1)[0]["request_id"] == "r"
        bench.wait_for_commit({2: 1})
    topics = bench.admin.list_topics(timeout=10).topics
    assert [len(topics[name].partitions) for name in (bench.request_topic, bench.response_topic, bench.dlq_topic)] == [3, 3, 3]


def test_no_more_requests_are_held_than_prefetch_says(bench: Bench, encoder: LatentEncoder, settings: Settings) -> None:
    """While one is encoded, KAFKA_PREFETCH of thirty waiting requests are in flight."""
    for n in range(30):
        bench.send({"request_id": f"r{n}"})
    gate = bench.gate()
    with gate.holding(), bench.worker(encoder, bench.settings(settings, kafka_prefetch=3)):
        gate.wait()
        wait_until(lambda: in_flight() == 3, "three in flight")
        time.sleep(1)
        assert in_flight() == 3
        gate.open()


def test_requests_that_wait_for_a_retry_are_bounded(
    bench: Bench, encoder: LatentEncoder, settings: Settings, events: Events
) -> None:
    """Beyond KAFKA_PREFETCH, at most MOST_SET_ASIDE requests of a partition wait for a retry."""

    def ids_of_failed() -> set[str]:
        return {event["request_id"] for event in events("request failed")}

    (bench.folder / "file").touch()
    for n in range(MOST_SET_ASIDE + 30):
        bench.send({"request_id": f"r{n}", "output_dir": str(bench.folder / "file" / "folder")})
    changes = {"kafka_prefetch": 3, "kafka_max_retries": 1000, "kafka_retry_backoff_s": 0.5}
    with bench.worker(encoder, bench.settings(settings, **changes)):
        wait_until(lambda: len(ids_of_failed()) >= MOST_SET_ASIDE, "requests that are set aside")
        attempts = len(events("request failed"))
        wait_until(lambda: len(events("request failed")) > attempts + 2 * MOST_SET_ASIDE, "further attempts")
        failed = ids_of_failed()
    assert MOST_SET_ASIDE <= len(failed) <= MOST_SET_ASIDE + 3
    assert failed == {f"r{n}" for n in range(len(failed))}
    assert bench.committed() == {}


def in_flight() -> float | None:
    return REGISTRY.get_sample_value("latent_encoder_in_flight")
