"""Workers whose images and files are behind URLs."""

from __future__ import annotations

import json
import signal
from contextlib import ExitStack

import pytest

from tests.helpers import IMAGES
from tests.kafka_tools import MakeBench, read_responses, wait_until
from tests.storage.conftest import Bucket
from tests.storage.web_server import WebServer, status


def test_a_url_that_is_not_listed_is_answered_and_not_read(make_bench: MakeBench, bucket: Bucket) -> None:
    """A request with a URL that is not allowed gets ACCESS_DENIED, and nothing is called."""
    bench = make_bench()
    with bench.process(**bucket.environment):
        bench.send({"request_id": "r", "image_path": bucket.add(), "output_dir": f"{bucket.url}/out"})
        (response,) = read_responses(bench.responses, 1)
    assert response["error_code"] == "ACCESS_DENIED"
    assert bucket.proxy.calls == []


@pytest.mark.usefixtures("apache_kafka")
def test_exactly_once_with_files_in_buckets_and_on_disk(make_bench: MakeBench, bucket: Bucket) -> None:
    """With transactions, requests for buckets and for folders get one response each; repetitions have the same files."""
    bench = make_bench()
    images, outs = (bucket.add(), str(IMAGES / "photo.jpg")), (f"{bucket.url}/out", str(bench.folder / "output"))
    for number in range(8):
        request = {"image_path": images[number % 2], "output_dir": outs[number // 2 % 2], "correlation_id": str(number)}
        bench.send({"request_id": f"r{number}", **request})
        bench.send({"request_id": f"r{number}", **request})
    bucket.proxy.latency_s = 0.1
    environment = {**bucket.environment, "ALLOWED_INPUT_URLS": f"{bucket.url}/in", "ALLOWED_OUTPUT_URLS": outs[0]}
    with bench.process(**environment, KAFKA_TRANSACTIONAL_ID=bench.group) as worker:
        answers = read_responses(bench.responses, 16)
        worker.signal(signal.SIGTERM)
        assert worker.end() == 0
    assert [answer["request_id"] for answer in answers] == [f"r{number // 2}" for number in range(16)]
    assert {answer["status"] for answer in answers} == {"success"}
    for first, second in zip(answers[::2], answers[1::2], strict=True):
        assert first["metadata"]["latent_sha256"] == second["metadata"]["latent_sha256"]
    assert not [name for name in bucket.names() if name.endswith(".lock")]


OUTAGE_S = 20.0
"""Longer than KAFKA_MAX_RETRIES retries of the default settings last."""


@pytest.mark.usefixtures("apache_kafka")
def test_an_outage_of_the_storage(make_bench: MakeBench, bucket: Bucket) -> None:
    """An outage of 20 s gives no error and no dead letter with default settings, for one request and for several."""
    image, out = bucket.add(), f"{bucket.url}/out"
    environment = {**bucket.environment, "ALLOWED_INPUT_URLS": f"{bucket.url}/in", "ALLOWED_OUTPUT_URLS": out}
    benches = {make_bench(partitions=2): 12, make_bench(): 1}
    with ExitStack() as running:
        workers = [running.enter_context(bench.process(**environment)) for bench in benches]
        for bench in benches:
            bench.send({"request_id": "first", "image_path": image, "output_dir": out, "preview": False})
            read_responses(bench.responses, 1)
        bucket.proxy.away = True
        for bench, count in benches.items():
            for number in range(count):
                # Some images come from the disk, so that only the output folder is out of reach.
                path = image if number % 2 == 0 else str(IMAGES / "photo.jpg")
                bench.send({"request_id": f"{bench.group}-{number}", "image_path": path, "output_dir": out})
        for bench, patience in zip(benches, (OUTAGE_S, 0.1), strict=True):
            assert bench.dead_letters.all_within(patience) == []
        bucket.proxy.away = False
        for bench, count in benches.items():
            answers = read_responses(bench.responses, 1 + count)
            assert [answer["status"] for answer in answers] == ["success"] * (1 + count)
            assert bench.dead_letters.all_within(0.1) == []
        for worker in workers:
            assert [event["event"] for event in worker.log() if event["event"].startswith("breaker")][-1] == "breaker closed"


@pytest.mark.usefixtures("apache_kafka")
def test_a_storage_that_asks_for_fewer_calls(make_bench: MakeBench, bucket: Bucket) -> None:
    """A 503 that outlasts all repetitions, as while a prefix is split, stops the worker for a while and gives nothing up."""
    image, out = bucket.add(), f"{bucket.url}/out"
    bench = make_bench()
    environment = {
        **bucket.environment,
        "ALLOWED_INPUT_URLS": f"{bucket.url}/in",
        "ALLOWED_OUTPUT_URLS": out,
        "KAFKA_MAX_RETRIES": "0",
        "KAFKA_RETRY_BACKOFF_S": "0.1",
        "STORAGE_MAX_RETRIES": "0",
    }
    with bench.process(**environment) as worker:
        for method, path, count in (("GET", "/in/", 3), ("PUT", "/out/", 6)):
            refused = bucket.proxy.fault("status", method, path, times=1_000_000, status=503)
            for number in range(3):
                bench.send({"request_id": f"{method}-{number}", "image_path": image, "output_dir": out})
            wait_until(lambda: refused.times <= 1_000_000 - 5, "several refusals")  # noqa: B023  # it is called at once
            assert bench.dead_letters.all_within(0.1) == []
            refused.times = 0
            answers = read_responses(bench.responses, count)
            assert [answer["status"] for answer in answers] == ["success"] * count
        events = [event["event"].split(",")[0] for event in worker.log() if event["event"].startswith("breaker")]
    assert events == ["breaker opened", "breaker closed"] * 2
    assert bench.dead_letters.all_within(0.1) == []


@pytest.mark.usefixtures("apache_kafka")
def test_a_presigned_url_is_only_in_the_request(make_bench: MakeBench, web: WebServer) -> None:
    """The query of a presigned URL is in no log, response or header; the dead letter has the request, to be sent again."""
    signature = "0123456789abcdef0123456789abcdef"
    url = web.url(f"/a.png?X-Amz-Credential=AKIA&X-Amz-Signature={signature}")
    web.pages["/a.png"] = status(503, {"Retry-After": "0"})
    bench = make_bench()
    environment = {"ALLOWED_INPUT_URLS": web.url("/"), "KAFKA_MAX_RETRIES": "0", "LOG_LEVEL": "DEBUG"}
    with bench.process(**environment) as worker:
        bench.send({"request_id": "r", "image_path": url})
        (response,) = read_responses(bench.responses, 1)
        (letter,) = bench.dead_letters.take(1)
        log = worker.log_file.read_text()
    assert response["error_code"] == "IMAGE_UNREACHABLE"
    assert "call to storage is repeated" in log
    assert not any(signature in text for text in (json.dumps(response), log, str(letter.headers)))
    assert json.loads(letter.value or b"")["image_path"] == url
