"""`scripts/send_request.py` as its users run it, with a real broker and a worker."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from config import Settings
from service import LatentEncoder
from tests.helpers import IMAGES, PATIENCE_S, PROJECT, clean_environment
from tests.kafka_tools import Bench, read_responses

MakeBench = Callable[..., Bench]


def send(bench: Bench, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the script with the bench's topics in its environment, in the folder of the test images."""
    topics = {
        "KAFKA_BOOTSTRAP_SERVERS": bench.servers,
        "KAFKA_REQUEST_TOPIC": bench.request_topic,
        "KAFKA_RESPONSE_TOPIC": bench.response_topic,
        "KAFKA_DLQ_TOPIC": bench.dlq_topic,
        "KAFKA_CONSUMER_GROUP": bench.group,
        "KAFKA_TRANSACTIONAL_ID": "the-workers-own",
    }
    command = [sys.executable, PROJECT / "scripts" / "send_request.py", *arguments]
    environment = clean_environment() | topics
    return subprocess.run(
        command, env=environment, cwd=IMAGES, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def responses(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def one_line_of(done: subprocess.CompletedProcess[str]) -> str:
    """Return the only line on standard error, which must be an error message."""
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


def test_an_error_among_the_answers(bench: Bench, encoder: LatentEncoder, settings: Settings) -> None:
    """Each image has a response with one correlation id, the missing image an error, and standard error stays empty."""
    with bench.worker(encoder, bench.settings(settings)):
        done = send(bench, "photo.jpg", "grey.png", "/no/such.jpg")
        bench.wait_for_commit({0: 3})
    assert (done.returncode, done.stderr) == (1, "")
    first, second, third = responses(done)
    assert [response["status"] for response in (first, second, third)] == ["success", "success", "error"]
    assert third["error_code"] == "IMAGE_NOT_FOUND"
    assert len({response["request_id"] for response in (first, second, third)}) == 3
    assert len({response["correlation_id"] for response in (first, second, third)}) == 1


def test_options_are_sent(bench: Bench, encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> None:
    """Every given field goes into the request, and responses to other requests are not printed."""
    options = ["--request-id", "r-1", "--correlation-id", "c-1", "--vae-model-name", "tiny_qwen_vae.safetensors"]
    options += ["--upscale-method", "area", "--megapixels", "0.02", "--output-dir", str(tmp_path / "mine")]
    with bench.worker(encoder, bench.settings(settings)):
        bench.send({"request_id": "another"})
        read_responses(bench.responses, 1)
        done = send(bench, "photo.jpg", *options)
    (response,) = responses(done)
    assert (done.returncode, done.stderr) == (0, "")
    assert (response["request_id"], response["correlation_id"]) == ("r-1", "c-1")
    assert (response["metadata"]["upscale_method"], response["metadata"]["megapixels"]) == ("area", 0.02)
    assert response["latent_file_path"] == str(tmp_path / "mine" / "latent_photo_r-1.pt")


def test_count_sends_each_image_so_many_times(make_bench: MakeBench, encoder: LatentEncoder, settings: Settings) -> None:
    """`--count` sends each image that many times, with distinct ids, over several partitions."""
    bench = make_bench(3)
    with bench.worker(encoder, bench.settings(settings)):
        done = send(bench, "photo.jpg", "grey.png", "--count", "3")
    assert (done.returncode, done.stderr) == (0, "")
    assert len({response["request_id"] for response in responses(done)}) == 6


def test_topic_that_does_not_exist(make_bench: MakeBench) -> None:
    """A topic that does not exist is named in the error, and not created."""
    bench = make_bench(create=False)
    done = send(bench, "photo.jpg")
    assert (done.returncode, done.stdout) == (3, "")
    assert bench.request_topic in one_line_of(done)
    assert bench.request_topic not in bench.admin.list_topics(timeout=10).topics


def test_answers_that_do_not_come(bench: Bench) -> None:
    """At the timeout, the error has the number of missing responses."""
    done = send(bench, "photo.jpg", "grey.png", "--timeout", "2")
    assert (done.returncode, done.stdout) == (3, "")
    assert "2 of 2 responses" in one_line_of(done)


def test_broker_that_is_not_there(make_bench: MakeBench) -> None:
    """A broker that cannot be reached gives one line that names its address."""
    bench = make_bench(create=False, servers="127.0.0.1:1")
    done = send(bench, "photo.jpg", "--timeout", "1")
    assert (done.returncode, done.stdout) == (3, "")
    assert "127.0.0.1:1" in one_line_of(done)


@pytest.mark.parametrize("arguments", [("photo.jpg", "grey.png"), ("photo.jpg", "--count", "2")])
def test_request_id_is_for_one_request(make_bench: MakeBench, arguments: tuple[str, ...]) -> None:
    """`--request-id` with more than one request is wrong usage."""
    done = send(make_bench(create=False, servers="127.0.0.1:1"), *arguments, "--request-id", "r-1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--request-id" in done.stderr
