"""What a request takes beside ComfyUI's nodes: reading, hashing and checking the image, PNG, latent, JSON, checksums."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from benchmarks.encode_report import Spread, markdown, megapixels_text, progress
from benchmarks.encode_sides import Workbench
from comfy_runtime import ComfyRuntime
from models import EncodeRequest, SuccessResponse
from service import LatentEncoder
from tests.helpers import TINY_VAE

REQUESTS = 15
NODE_METHODS = ("load_vae", "load_image", "scale", "encode")


@dataclass(frozen=True)
class FileWork:
    """Seconds of requests, each of which reads a PNG of that size and writes its three files."""

    megapixels: float
    encoder: str
    total: Spread
    beside_nodes: Spread


class TimedRuntime:
    """A runtime that counts the seconds inside its nodes."""

    def __init__(self, runtime: ComfyRuntime) -> None:
        self._runtime = runtime
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._runtime, name)
        return self._timed(value) if name in NODE_METHODS else value

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def measure_files(bench: Workbench, folder: Path, megapixels: float) -> FileWork:
    """Requests with the tiny VAE; the first of them, which loads it, does not count."""
    progress(f"file work at {megapixels_text(megapixels)}")
    image = folder / "photo.png"
    Image.fromarray(np.asarray((bench.pixels(megapixels)[0] * 255).round().byte())).save(image)
    runtime = TimedRuntime(bench.runtime)
    encoder = LatentEncoder(bench.settings(), cast("ComfyRuntime", runtime))
    took = [_one_request(encoder, runtime, _request(image, folder, megapixels, n)) for n in range(REQUESTS + 1)]
    totals, rests = zip(*took[1:], strict=True)
    return FileWork(megapixels, encoder.vaes.get(TINY_VAE).encoder, Spread(totals), Spread(rests))


def _request(image: Path, folder: Path, megapixels: float, number: int) -> EncodeRequest:
    return EncodeRequest(
        image_path=str(image),
        vae_model_name=TINY_VAE,
        upscale_method="lanczos",
        megapixels=megapixels,
        output_dir=str(folder / "files"),
        request_id=str(number),
    )


def _one_request(encoder: LatentEncoder, runtime: TimedRuntime, request: EncodeRequest) -> tuple[float, float]:
    """Seconds in all, and beside the nodes."""
    runtime.seconds = 0.0
    start = time.perf_counter()
    response = encoder.answer(request)
    total = time.perf_counter() - start
    assert isinstance(response, SuccessResponse), response
    return total, total - runtime.seconds


def files_text(work: FileWork) -> str:
    row = (megapixels_text(work.megapixels), work.encoder, work.total.text(0, 1e3), work.beside_nodes.text(0, 1e3))
    return markdown(("size", "encoder of the tiny VAE", "a request, ms", "of which beside the nodes, ms"), [row])
