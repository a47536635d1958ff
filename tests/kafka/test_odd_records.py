"""Records that no client of ours sends: each ends in a dead letter, and the worker goes on with the next one."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import pytest
from confluent_kafka import KafkaException

from config import Settings
from kafka_handler import KafkaHandler
from latent_encoder.kafka.guards import client_faults, harmless
from latent_encoder.kafka.letters import Letter
from latent_encoder.kafka.limits import DEAD_LETTER_HEADERS, LARGEST_RESPONSE, faults_of
from latent_encoder.kafka.records import Incoming, omitted
from service import LatentEncoder
from tests.helpers import IMAGES, VAE, RunMain
from tests.kafka.odd_records import send_odd
from tests.kafka_tools import Bench, Events, MakeBench, client_config, read_responses, wait_until

LARGEST_BY_DEFAULT = 1_048_588
"""Kafka's default of a topic's `max.message.bytes`."""

both_ways = pytest.mark.parametrize("transactional", [False, True], ids=["at-least-once", "exactly-once"])
pytestmark = pytest.mark.usefixtures("apache_kafka")


def changes(bench: Bench, transactional: bool) -> dict[str, Any]:
    return {"kafka_transactional_id": bench.group} if transactional else {}


def text_of(letter: Incoming, name: str) -> str:
    return (dict(letter.headers)[name] or b"").decode()


@both_ways
def test_header_name_that_is_not_utf8_makes_a_dead_letter(
    bench: Bench, encoder: LatentEncoder, settings: Settings, transactional: bool
) -> None:
    """The dead letter has key, value and reason but no headers; the sender gets an error, and the next request is served."""
    responses, dead_letters = bench.responses, bench.dead_letters
    odd = [(b"tenant", b"a"), (b"caf\xe9", b"b")]
    with bench.worker(encoder, bench.settings(settings, **changes(bench, transactional))):
        send_odd(bench.servers, bench.request_topic, b'{"request_id": "odd", "image_path": "a.png"}', odd)
        send_odd(bench.servers, bench.request_topic, b"no JSON", odd)
        send_odd(bench.servers, bench.request_topic, b'{"image_path": "a.png"}', odd)
        bench.send({"request_id": "good"})
        got = read_responses(responses, 3)
        letters = dead_letters.take(3)
    of_place = str(uuid5(NAMESPACE_URL, f"kafka:{bench.request_topic}/0/2"))
    assert [response["request_id"] for response in got] == ["odd", of_place, "good"]
    assert got[0]["error_code"] == "MESSAGE_UNUSABLE"
    assert "headers" in got[0]["error_message"]
    assert got[2]["status"] == "success"
    assert letters[0].value == b'{"request_id": "odd", "image_path": "a.png"}'
    for letter in letters:
        assert omitted(letter) == {"dlq.headers.omitted": "unreadable"}
        assert "can't decode byte 0xe9" in text_of(letter, "dlq.error.message")
    letter_read = Letter.of(letters[0], settings)
    assert letter_read is not None
    assert letter_read.is_whole
    sent_back = letter_read.revived()
    assert sent_back.value == letters[0].value
    assert not {"dlq.headers.omitted", "dlq.error.code"} & dict(sent_back.headers).keys()


def test_headers_are_read_safely_however_often(bench: Bench) -> None:
    """The thousandth record is read like the first, although Python optimises the call meanwhile."""
    topic = bench.topic(bench.request_topic)
    for _ in range(200):
        bench.send({}, headers=(("tenant", b"a"),))
    send_odd(bench.servers, bench.request_topic, b"{}", [(b"\xff", b"")])
    records = topic.take(201)
    assert {record.headers_fault for record in records[:200]} == {None}
    assert records[200].headers == ()
    assert "0xff" in (records[200].headers_fault or "")


def test_error_text_with_bytes_that_are_not_utf8_is_escaped(
    bench: Bench, encoder: LatentEncoder, settings: Settings, model_dir: Path
) -> None:
    """A VAE file with such a name is listed in the error response, and the next request is served."""
    odd = Path(os.fsdecode(os.fsencode(model_dir) + b"/caf\xe9.safetensors"))
    odd.touch()
    try:
        with bench.worker(encoder, bench.settings(settings)):
            bench.send({"request_id": "bad", "vae_model_name": "none.safetensors"})
            bench.send({"request_id": "good"})
            bad, good = read_responses(bench.responses, 2)
            bench.wait_for_commit({0: 2})
    finally:
        odd.unlink()
    assert bad["error_code"] == "VAE_MODEL_NOT_FOUND"
    assert "caf\\xe9.safetensors" in bad["error_message"]
    assert good["status"] == "success"


@both_ways
def test_full_queue_of_the_producer_is_waited_for(
    make_bench: MakeBench, encoder: LatentEncoder, settings: Settings, transactional: bool
) -> None:
    """With room for one record, responses and dead letters of four partitions all arrive, in order."""
    bench = make_bench(partitions=4)
    responses, dead_letters = bench.responses, bench.dead_letters
    config = client_config(bench.folder, queue_buffering_max_messages=1)
    for n in range(24):
        bench.send(b'{"request_id": "r%d"' % n, partition=n % 4, key=b"same")
    more = {"kafka_client_config": config, "kafka_prefetch": 8, **changes(bench, transactional)}
    with bench.worker(encoder, bench.settings(settings, **more)):
        got = [int(response["request_id"][1:]) for response in read_responses(responses, 24)]
        letters = dead_letters.take(24)
        bench.wait_for_commit(dict.fromkeys(range(4), 6))
    assert sorted(got) == list(range(24))
    for partition in range(4):
        own = [n for n in got if n % 4 == partition]
        assert own == sorted(own)
    assert len({letter.value for letter in letters}) == 24


@both_ways
def test_record_that_never_fits_into_the_queue_is_too_large(
    bench: Bench, encoder: LatentEncoder, settings: Settings, transactional: bool
) -> None:
    """A response over the producer's `queue.buffering.max.kbytes` becomes a dead letter, and the next request is served."""
    config = client_config(bench.folder, queue_buffering_max_kbytes=1)
    more = {"kafka_client_config": config, **changes(bench, transactional)}
    responses, dead_letters = bench.responses, bench.dead_letters
    with bench.worker(encoder, bench.settings(settings, **more)):
        bench.send({"request_id": "good"})
        bench.send({"request_id": "bad", "image_path": "/no"})
        (letter,) = dead_letters.take(1)
        (response,) = read_responses(responses, 1)
        bench.wait_for_commit({0: 2})
    assert response["request_id"] == "bad"
    assert text_of(letter, "dlq.error.code") == "RESPONSE_REFUSED"
    assert json.loads(letter.value or b"")["request_id"] == "good"


@both_ways
def test_dead_letter_that_is_too_large_goes_without_its_largest_part(
    bench: Bench, encoder: LatentEncoder, settings: Settings, transactional: bool
) -> None:
    """At Kafka's default limits, values, headers and keys near the limit are left out, and a header has their size."""
    responses, dead_letters = bench.responses, bench.dead_letters
    large = b"x" * 1_048_400
    more = {"kafka_max_message_bytes": 2_000_000, **changes(bench, transactional)}
    with bench.worker(encoder, bench.settings(settings, **more)):
        bench.send(large, key=b"k", headers=(("tenant", b"a"),))
        bench.send(b"short", headers=(("tenant", large),))
        bench.send(b"short", key=large)
        bench.send({"request_id": "good"})
        letters = dead_letters.take(3)
        (response,) = read_responses(responses, 1)
        bench.wait_for_commit({0: 4})
    assert response["request_id"] == "good"
    by_offset = {int(text_of(letter, "dlq.original.offset")): letter for letter in letters}
    value, headers, key = by_offset[0], by_offset[1], by_offset[2]
    assert omitted(value) == {"dlq.value.omitted": "1048400"}
    assert (value.key, value.value, value.headers[0]) == (b"k", None, ("tenant", b"a"))
    assert omitted(headers) == {"dlq.headers.omitted": str(1_048_400 + len("tenant"))}
    assert (headers.value, "tenant" in dict(headers.headers)) == (b"short", False)
    assert omitted(key) == {"dlq.key.omitted": "1048400"}
    assert (key.key, key.value) == (None, b"short")
    for letter in letters:
        assert text_of(letter, "dlq.original.topic") == bench.request_topic
        assert text_of(letter, "dlq.error.code") == "MESSAGE_UNUSABLE"
    read = [Letter.of(letter, settings) for letter in (value, headers, key)]
    assert [letter.is_whole for letter in read if letter is not None] == [False, True, False]


def test_request_whose_response_and_dead_letter_are_too_large_ends(
    bench: Bench, encoder: LatentEncoder, settings: Settings
) -> None:
    """A good request with headers near the limit becomes a dead letter without them, and the next one is served."""
    responses, dead_letters = bench.responses, bench.dead_letters
    with bench.worker(encoder, bench.settings(settings)):
        bench.send({"request_id": "heavy"}, headers=(("pad", b"x" * 1_048_200),))
        bench.send({"request_id": "good"})
        (letter,) = dead_letters.take(1)
        (response,) = read_responses(responses, 1)
        bench.wait_for_commit({0: 2})
    assert response["request_id"] == "good"
    assert text_of(letter, "dlq.error.code") == "RESPONSE_REFUSED"
    assert json.loads(letter.value or b"")["request_id"] == "heavy"
    assert set(omitted(letter)) == {"dlq.headers.omitted"}


def test_topic_limits_that_do_not_fit_are_reported_at_the_start(
    make_bench: MakeBench, encoder: LatentEncoder, settings: Settings, events: Events
) -> None:
    """One warning names the topics and their limits in bytes; limits that fit give none."""
    event = "topics have limits that do not fit together"
    bench = make_bench(create=False)
    bench.create(bench.request_topic)
    bench.create(bench.dlq_topic, config={"max.message.bytes": "10485760"})
    bench.create(bench.response_topic, config={"max.message.bytes": "900"})
    with bench.worker(encoder, bench.settings(settings)):
        wait_until(lambda: bool(events(event)), "the warning")
    ((fault,),) = [warning["faults"] for warning in events(event)]
    assert f"{bench.response_topic} takes 900 bytes" in fault


def test_limits_are_compared_with_room_for_headers() -> None:
    """Equal limits of requests and dead letters do not fit, because a dead letter has more headers."""
    settings = Settings(_env_file=None, kafka_request_topic="in", kafka_response_topic="out", kafka_dlq_topic="dlq")
    fitting = {"in": LARGEST_BY_DEFAULT, "out": LARGEST_RESPONSE, "dlq": LARGEST_BY_DEFAULT + DEAD_LETTER_HEADERS}
    assert faults_of(fitting, settings) == []
    (fault,) = faults_of({**fitting, "dlq": LARGEST_BY_DEFAULT}, settings)
    assert fault.startswith(f"dlq takes {LARGEST_BY_DEFAULT} bytes and in {LARGEST_BY_DEFAULT}")
    (fault,) = faults_of(fitting, settings.model_copy(update={"kafka_max_message_bytes": 2_000_000}))
    assert "KAFKA_MAX_MESSAGE_BYTES=2000000" in fault


def test_odd_statistics_stop_nothing(events: Events) -> None:
    """The fault of a report is logged once."""
    found: list[str] = []

    @harmless("statistics cannot be used")
    def observe(text: str) -> None:
        found.append(json.loads(text)["brokers"])

    for text in ("{}", "[", '{"brokers": "b"}'):
        observe(text)
    assert found == ["b"]
    assert [event["reason"] for event in events("statistics cannot be used")] == ["KeyError: 'brokers'"]


def test_large_statistics_are_read_less_often(bench: Bench, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of many partitions take a twentieth of the time at most, and small ones are read each second."""
    handler = KafkaHandler(bench.settings(settings))
    found: list[object] = []
    monkeypatch.setattr(handler._broker, "on_statistics", found.append)
    small: dict[str, object] = {"brokers": {}, "topics": {}}
    partition = {f"field_{n}": n for n in range(40)}
    handler._on_statistics(json.dumps(small))
    assert handler._statistics_from < time.monotonic() + 1
    handler._statistics_from = 0.0
    large = {**small, "topics": {"t": {"partitions": {str(n): partition for n in range(20_000)}}}}
    handler._on_statistics(json.dumps(large))
    assert handler._statistics_from > time.monotonic() + 1
    handler._on_statistics(json.dumps(small))
    assert len(found) == 2


def test_client_that_refuses_a_call_is_one_line(bench: Bench) -> None:
    """A call that the client refuses for the service as a whole names the reason and Kafka's code of it."""
    consumer = bench.responses.consumer
    with pytest.raises(Exception, match=r"^The Kafka client cannot go on: .* \(_INVALID_ARG\)\.$") as caught, client_faults():
        consumer.subscribe(["^["])
    assert isinstance(caught.value.__cause__, KafkaException)


def test_trace_context_that_no_propagator_can_read_stops_nothing(
    bench: Bench, encoder: LatentEncoder, settings: Settings, events: Events
) -> None:
    """A propagator that raises costs the request its parent span, not its response."""
    propagate = pytest.importorskip("opentelemetry.propagate")
    textmap = pytest.importorskip("opentelemetry.propagators.textmap")

    class Strict(textmap.TextMapPropagator):  # type: ignore[misc, name-defined]
        def extract(self, carrier: Any, *_: Any, **__: Any) -> Any:
            raise ValueError(carrier)

        def inject(self, *_: Any, **__: Any) -> None: ...

        @property
        def fields(self) -> set[str]:
            return set()

    before = propagate.get_global_textmap()
    propagate.set_global_textmap(Strict())
    try:
        with bench.worker(encoder, bench.settings(settings)):
            bench.send({"request_id": "r"}, headers=(("traceparent", b"\xff"),))
            (response,) = read_responses(bench.responses, 1)
    finally:
        propagate.set_global_textmap(before)
    assert response["status"] == "success"
    assert events("trace context cannot be read, the request begins a trace of its own")


def test_response_that_no_json_can_hold_is_refused_before_the_encode(run_main: RunMain, tmp_path: Path) -> None:
    """In a working folder that is not UTF-8, a relative output folder is an error response; an absolute one works."""
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    odd.mkdir()
    image = str(IMAGES / "photo.jpg")
    arguments = ["--image_path", image, "--vae_model_name", VAE, "--megapixels", "0.01", "--output_dir"]
    # A shell changes the folder, because a process of the tests starts in `tmp_path`.
    there = ["sh", "-c", 'cd "$0" && exec "$@"', str(odd)]
    refused = run_main(*arguments, "output", prefix=there)
    assert json.loads(refused.stdout)["error_code"] == "INVALID_REQUEST"
    assert "caf\\xe9/output" in json.loads(refused.stdout)["error_message"]
    done = run_main(*arguments, str(tmp_path / "output"), prefix=there)
    assert json.loads(done.stdout)["status"] == "success"
