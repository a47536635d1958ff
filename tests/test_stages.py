"""Tests of the stages: preparations run side by side, and a failed job keeps nothing of its work alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from threading import Barrier, Event
from typing import Any

import pytest

from config import Settings
from latent_encoder.outputs.encoded import Prepared
from latent_encoder.stages import Stages
from latent_encoder.standalone.engines import ImageJob
from latent_encoder.telemetry.health import Health
from models import EncodeRequest, SuccessResponse
from service import LatentEncoder
from tests.helpers import PATIENCE_S, VAE, request_for
from tests.kafka_tools import wait_until

Result = SuccessResponse | BaseException


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Keep Python's cyclic garbage collector off, so that only references decide how long an object lives."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def running(encoder: LatentEncoder, settings: Settings) -> Iterator[tuple[Stages[ImageJob], Queue[Result]]]:
    """Return the stages over the encoder, and the queue of their results."""
    results: Queue[Result] = Queue()
    stages = Stages[ImageJob](encoder, lambda _, result: results.put(result), Health(settings.encode_timeout_s))
    yield stages, results
    stages.close()
    for thread in stages.threads:
        thread.join(PATIENCE_S)


def test_preparations_run_side_by_side(
    encoder: LatentEncoder, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PREPARE_THREADS images are prepared at the same time, and each thread ends when the stages are closed."""
    together = Barrier(3, timeout=PATIENCE_S)
    prepare = LatentEncoder.prepare

    def meeting(self: LatentEncoder, request: EncodeRequest, *more: Any) -> Prepared:
        together.wait()
        return prepare(self, request, *more)

    monkeypatch.setattr(LatentEncoder, "prepare", meeting)
    monkeypatch.setattr(encoder, "prepare_threads", 3)
    results: Queue[Result] = Queue()
    stages = Stages[ImageJob](encoder, lambda _, result: results.put(result), Health(settings.encode_timeout_s))
    for number in range(3):
        request = request_for(settings, tmp_path / str(number), "photo.jpg", {"request_id": f"r{number}"})
        stages.submit(ImageJob(number, request, Event()))
    found = [results.get(timeout=PATIENCE_S) for _ in range(3)]
    assert {result.request_id for result in found if isinstance(result, SuccessResponse)} == {"r0", "r1", "r2"}
    stages.close()
    for thread in stages.threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("fault", ["image", "folder", "encode"])
def test_errors_keep_no_vae(
    fault: str,
    running: tuple[Stages[ImageJob], Queue[Result]],
    encoder: LatentEncoder,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The VAE and the job of a failed request are freed while its error is kept, whatever stage failed."""
    vae = encoder.vaes.get(VAE)
    freed = weakref.ref(vae.vae.first_stage_model)
    del vae
    folder = tmp_path / "output"
    if fault == "folder":
        folder.touch()
    if fault == "encode":
        monkeypatch.setattr(encoder.runtime, "encode", _raise)
    image = "truncated.jpg" if fault == "image" else "photo.jpg"
    job = ImageJob(0, request_for(settings, folder, image, {"vae_model_name": VAE}), Event())
    stages, results = running
    stages.submit(job)
    freed_job = weakref.ref(job)
    del job
    error = results.get(timeout=PATIENCE_S)
    assert isinstance(error, Exception)
    assert error.__traceback__ is not None, "the place of the fault is not lost"
    encoder.vaes._loaded.clear()
    wait_until(
        lambda: freed() is None and freed_job() is None, "VAE and job are freed", patience=10
    )  # the stage's thread may not have left it yet


def _raise(*_: Any) -> None:
    try:
        raise ValueError("first")
    except ValueError:
        raise KeyError("second") from None
