"""Requests that kill or hang their worker: they are found out, and the others behind them get their responses."""

from __future__ import annotations

import json
import signal
import urllib.error
import urllib.request

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import Settings
from latent_encoder.kafka.starts import format_notes, parse_notes
from service import LatentEncoder
from tests.broker.ports import free_ports
from tests.kafka_tools import Bench, Events, MakeBench, quick_failover, read_responses, request_ids, wait_until

MAX_CRASHES = 2


def is_alive(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10):
            return True
    except urllib.error.HTTPError:
        return False
    except OSError:
        return True  # it is starting


@pytest.mark.parametrize("transactional", [False, True], ids=["at-least-once", "exactly-once"])
@pytest.mark.usefixtures("apache_kafka")
def test_request_that_kills_each_worker_is_given_up(make_bench: MakeBench, transactional: bool) -> None:
    """After KAFKA_MAX_CRASHES + 1 workers it gets an error response and a dead letter; its neighbours are encoded."""
    bench = make_bench(partitions=2)
    responses, dead_letters = bench.responses, bench.dead_letters
    for request_id in ("before", "kill", "after"):
        bench.send({"request_id": request_id}, partition=0)
    bench.send({"request_id": "beside"}, partition=1)
    environment = quick_failover(bench.folder) | ({"KAFKA_TRANSACTIONAL_ID": bench.group} if transactional else {})
    for _ in range(MAX_CRASHES + 1):
        with bench.faulty_process(**environment) as process:
            assert process.end() == -signal.SIGKILL
    with bench.faulty_process(**environment):
        # A worker that is killed after a response and before its commit leaves a repeated one.
        responses.read(lambda records: len({record.key for record in records}) == 4)
        by_id = {response["request_id"]: response for response in read_responses(responses, len(responses.records))}
        bench.wait_for_commit({0: 3, 1: 1})
    assert {request_id: response["error_code"] for request_id, response in by_id.items()} == {
        "before": None,
        "kill": "REQUEST_CRASHES_WORKER",
        "after": None,
        "beside": None,
    }
    assert "memory" in by_id["kill"]["error_message"]
    (letter,) = dead_letters.take(1)
    assert json.loads(letter.value or b"")["request_id"] == "kill"
    assert bench.notes() == {}


def test_request_that_hangs_each_worker_is_given_up(bench: Bench) -> None:
    """A decode that never ends makes each worker not alive; each is killed, and the last one gives the request up."""
    responses = bench.responses
    bench.send({"request_id": "hang"})
    bench.send({"request_id": "good"})
    for crashes in range(MAX_CRASHES + 1):
        (port,) = free_ports(1)
        settings = {"HTTP_PORT": str(port), "ENCODE_TIMEOUT_S": "3", **quick_failover(bench.folder)}
        with bench.faulty_process(**settings):
            wait_until(lambda crashes=crashes: bench.notes().get(0) == crashes + 1, "the request has begun")  # type: ignore[misc]
            wait_until(lambda port=port: not is_alive(port), "the worker is not alive")  # type: ignore[misc]
    with bench.faulty_process(**quick_failover(bench.folder)):
        codes = {response["request_id"]: response["error_code"] for response in read_responses(responses, 2)}
    assert codes == {"hang": "REQUEST_CRASHES_WORKER", "good": None}


def test_workers_that_are_stopped_suspect_no_request(bench: Bench, encoder: LatentEncoder, settings: Settings) -> None:
    """A request that was left to another worker more often than KAFKA_MAX_CRASHES, at each shutdown, is encoded."""
    responses, gate = bench.responses, bench.gate()
    bench.send({"request_id": "long"})
    bench.send({"request_id": "next"})
    with gate.holding():
        for _ in range(MAX_CRASHES + 2):
            with bench.worker(encoder, bench.settings(settings, shutdown_timeout_s=0.1)):
                wait_until(lambda: bench.notes().keys() == {0, 1}, "both have begun")
            assert bench.notes() == {}
    with bench.worker(encoder, bench.settings(settings)):
        responses.take(2)
        bench.wait_for_commit({0: 2})
    assert request_ids(responses) == {"long": 1, "next": 1}
    assert [json.loads(record.value or b"")["status"] for record in responses.records] == ["success", "success"]


def test_request_that_waits_for_a_retry_is_not_suspected(
    bench: Bench, encoder: LatentEncoder, settings: Settings, events: Events
) -> None:
    """The note of its start is removed when the attempt has failed."""
    (bench.folder / "file").touch()
    bench.send({"request_id": "r", "output_dir": str(bench.folder / "file" / "x")})
    with bench.worker(encoder, bench.settings(settings, kafka_retry_backoff_s=60)):
        wait_until(lambda: bool(events("request failed")), "the first attempt")
        wait_until(lambda: bench.notes() == {}, "the note is gone")


@given(st.one_of(st.none(), st.text()), st.dictionaries(st.integers(0, 2**63 - 1), st.integers(1, 100), max_size=100))
def test_notes_can_be_read_back(topic_id: str | None, notes: dict[int, int]) -> None:
    assert parse_notes(format_notes(topic_id, notes)) == (topic_id, notes)


@given(
    st.one_of(st.none(), st.text(), st.sampled_from(["null", "[1]", '{"starts": 1}', '{"starts": {"a": 1}}', '{"topic": 7}']))
)
def test_metadata_of_other_software_is_ignored(metadata: str | None) -> None:
    """Whatever stands beside an offset, for example after a reset by a tool of Kafka's, no request is suspected."""
    assert parse_notes(metadata)[1] == {}


def test_longest_note_fits_into_the_metadata_of_an_offset() -> None:
    """A broker takes 4096 bytes by default."""
    notes = {2**62 + n: 99 for n in range(100)}
    assert len(format_notes("a" * 22, notes).encode()) < 4096
