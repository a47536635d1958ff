"""A broken machine fails no requests: the worker stops taking them, and goes on when one succeeds."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from config import Settings
from errors import (
    EncodingFailed,
    ImageNotFound,
    OutputDirNotWritable,
    RequestError,
    UnexpectedError,
    VaeModelInvalid,
    VaeModelNotFound,
)
from latent_encoder.kafka.breaker import FRESH_WITHIN_S, Breaker, accused
from latent_encoder.kafka.jobs import RecordJob
from latent_encoder.kafka.records import Incoming
from latent_encoder.requests import parse_request
from service import LatentEncoder
from tests.helpers import VAE
from tests.kafka_tools import Bench, Events, read_responses, request_ids, wait_until

SETTINGS = Settings(_env_file=None, output_dir="/output", kafka_breaker_failures=3, kafka_retry_backoff_s=1)


def job_at(offset: int, **fields: Any) -> RecordJob:
    request = parse_request({"image_path": "a.png", "output_dir": "/output", "vae_model_name": "v", **fields}, {})
    return RecordJob(Incoming("requests", 0, offset, None, None, b"{}", ()), request)


def not_writable(number: int) -> OutputDirNotWritable:
    error = OutputDirNotWritable("It failed.")
    error.__cause__ = OSError(number, "It failed")
    return error


@pytest.mark.parametrize(
    ("error", "output_dir", "expected"),
    [
        (not_writable(errno.ENOSPC), "/elsewhere", "output folder /elsewhere"),
        (not_writable(errno.EROFS), "/output/deep", "output folder /output/deep"),
        (not_writable(errno.EACCES), "/output/deep", "output folder /output/deep"),
        (not_writable(errno.ENOTDIR), "/elsewhere", None),
        (OutputDirNotWritable("Another process has them."), "/output", None),
        (EncodingFailed("No latent."), "/output", "encoder"),
        (UnexpectedError("No latent."), "/output", "encoder"),
        (VaeModelNotFound("It is gone."), "/output", "model folder"),
        (VaeModelInvalid("It is odd."), "/output", None),
        (ImageNotFound("No file."), "/output", None),
    ],
)
def test_failure_accuses_the_machine_or_the_request(error: RequestError, output_dir: str, expected: str | None) -> None:
    """A folder that only the request names may be wrong; the service's own folder, and a full volume, are the machine's."""
    assert accused(error, job_at(0, output_dir=output_dir), SETTINGS, {"v"}) == expected


def test_vae_that_never_worked_accuses_the_request() -> None:
    assert accused(VaeModelNotFound("No file."), job_at(0), SETTINGS, set()) is None


def test_breaker_opens_after_failures_of_different_requests_in_a_row() -> None:
    """Attempts of one request count once, and a success in between begins a new row."""
    breaker = Breaker(SETTINGS)
    for offset in (0, 0, 0, 1):
        breaker.failed(job_at(offset), "encoder", now=0)
    breaker.succeeded()
    for offset in (2, 3):
        breaker.failed(job_at(offset), "encoder", now=0)
    assert breaker.fault is None
    breaker.failed(job_at(4), None, now=0)
    breaker.failed(job_at(5), "encoder", now=0)
    assert breaker.fault == "encoder"


def test_breaker_tries_one_request_after_each_wait() -> None:
    """A fresh one comes first, then the one with the fewest attempts, and the waits double."""
    breaker = Breaker(SETTINGS)
    waiting, other, fresh = job_at(0), job_at(1), job_at(2)
    for job, attempts in ((waiting, 2), (other, 1)):
        for _ in range(attempts):
            job.begin()
            job.wait(0)
    for offset in (7, 8, 9):
        breaker.failed(job_at(offset), "encoder", now=10)
    assert not breaker.takes([], now=10.5)
    assert breaker.to_try([waiting, fresh], now=10.5) == []
    assert breaker.takes([waiting], now=11)
    assert not breaker.takes([waiting, fresh], now=11)
    assert breaker.to_try([waiting, other, fresh], now=11) == [fresh]
    assert breaker.to_try([waiting, other], now=11) == []
    assert breaker.to_try([waiting, other], now=11 + FRESH_WITHIN_S) == [other]
    breaker.failed(other, "encoder", now=20)
    assert not breaker.takes([], now=21.9)
    assert breaker.takes([], now=22)
    assert breaker.succeeded()
    assert breaker.fault is None


def test_breaker_can_be_turned_off() -> None:
    breaker = Breaker(SETTINGS.model_copy(update={"kafka_breaker_failures": 0}))
    for offset in range(100):
        breaker.failed(job_at(offset), "encoder", now=0)
    assert breaker.fault is None


@pytest.mark.parametrize("prefetch", [1, 2])
def test_output_folder_that_is_lost_fails_no_request(
    bench: Bench, encoder: LatentEncoder, settings: Settings, events: Events, prefetch: int
) -> None:
    """None of twenty requests gets an error or a dead letter, and all succeed when the folder is back."""
    output = bench.folder / "output"
    output.touch()  # in the way
    responses = bench.responses
    for n in range(20):
        bench.send({"request_id": f"r{n}"})
    changes = {"kafka_retry_backoff_s": 0.2, "kafka_max_retries": 3, "kafka_prefetch": prefetch}
    with bench.worker(encoder, bench.settings(settings, **changes)) as worker:
        wait_until(lambda: bool(events("breaker opened, no requests are taken until one succeeds")), "the breaker")
        failures = len(events("request failed"))
        wait_until(lambda: len(events("request failed")) > failures + 3, "further tries")
        assert worker.handler.health.ready().parts["machine"] == f"output folder {output}"
        assert worker.handler.health.alive().ok
        assert REGISTRY.get_sample_value("latent_encoder_breaker_open") == 1
        output.unlink()
        assert {response["status"] for response in read_responses(responses, 20)} == {"success"}
        bench.wait_for_commit({0: 20})
        assert REGISTRY.get_sample_value("latent_encoder_breaker_open") == 0
        assert worker.handler.health.ready().parts["machine"] == "ok"
    assert set(request_ids(responses).values()) == {1}
    assert bench.dead_letters.all_within(0.5) == []
    assert events("breaker closed")


def test_model_folder_that_is_lost_fails_no_request(
    bench: Bench, encoder: LatentEncoder, settings: Settings, model_dir: Path
) -> None:
    """A VAE that has encoded and cannot be found any more is waited for."""
    file, away = model_dir / "lost.safetensors", bench.folder / "away"
    shutil.copy(next(model_dir.rglob("*kl*.safetensors")), file)
    responses = bench.responses
    with bench.worker(encoder, bench.settings(settings, kafka_retry_backoff_s=0.2, kafka_breaker_failures=2)):
        bench.send({"request_id": "first", "vae_model_name": file.name})
        responses.take(1)
        file.rename(away)
        for n in range(5):
            bench.send({"request_id": f"r{n}", "vae_model_name": file.name})
        wait_until(lambda: REGISTRY.get_sample_value("latent_encoder_breaker_open") == 1, "the breaker")
        away.rename(file)
        assert {response["status"] for response in read_responses(responses, 6)} == {"success"}
    file.unlink()
    assert file.name != VAE


def test_lost_device_ends_the_worker_with_nothing_committed(bench: Bench) -> None:
    """The error says so in one line; the next worker gets the requests."""
    bench.send({"request_id": "lose"})
    bench.send({"request_id": "good"})
    with bench.faulty_process() as process:
        assert process.end() == 3
        assert process.log()[-1]["event"].startswith("Error: Request failed: the device needs a new process")
        assert "Traceback" not in process.log_file.read_text()
    assert bench.committed() == {}
    assert bench.responses.all_within(0.5) == []
