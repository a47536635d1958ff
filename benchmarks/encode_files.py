"""The time of a request beside ComfyUI's nodes: reading and checking the image, its checksum, PNG, latent, JSON, checksums."""

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
from config import Settings
from latent_encoder.comfy_runtime import ComfyRuntime
from latent_encoder.images.source import ImageLimits, read_image
from models import EncodeRequest
from service import LatentEncoder
from tests.helpers import TINY_VAE

REQUESTS = 15
NODE_METHODS = ("load_vae", "load_image", "scale", "encode")


@dataclass(frozen=True)
class FileWork:
    """Seconds of requests that each read a PNG of that size and write three files."""

    megapixels: float
    encoder: str
    total: Spread
    beside_nodes: Spread
    checking: Spread
    """The part for reading the image, its checksum, and decoding it once more, more strictly than LoadImage does."""
    writing: Spread
    """The part for latent, PNG, JSON and their checksums, flushed to disk."""


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
    """Measure requests with the tiny VAE; the first one, which loads it, does not count."""
    progress(f"file work at {megapixels_text(megapixels)}")
    image = folder / "photo.png"
    Image.fromarray(np.asarray((bench.pixels(megapixels)[0] * 255).round().byte())).save(image)
    runtime = TimedRuntime(bench.runtime)
    encoder = LatentEncoder(bench.settings(), cast("ComfyRuntime", runtime))
    took = [_one_request(encoder, runtime, _request(image, folder, megapixels, n)) for n in range(REQUESTS + 1)]
    return FileWork(megapixels, encoder.vaes.get(TINY_VAE).encoder, *map(Spread, zip(*took[1:], strict=True)))


def _request(image: Path, folder: Path, megapixels: float, number: int) -> EncodeRequest:
    return EncodeRequest(
        image_path=str(image),
        vae_model_name=TINY_VAE,
        upscale_method="lanczos",
        megapixels=megapixels,
        output_dir=str(folder / "files"),
        request_id=str(number),
    )


def _one_request(encoder: LatentEncoder, runtime: TimedRuntime, request: EncodeRequest) -> tuple[float, float, float, float]:
    """Return the seconds in all, beside the nodes, of checking the image once more, and of writing."""
    runtime.seconds = 0.0
    start = time.perf_counter()
    encoded = encoder.encode_prepared(encoder.prepare(request))
    before_writing = time.perf_counter()
    encoder.write(encoded)
    end = time.perf_counter()
    read_image(request.image_path, ImageLimits.of(Settings()))
    return end - start, end - start - runtime.seconds, time.perf_counter() - end, end - before_writing


def files_text(work: FileWork) -> str:
    spreads = (work.total, work.beside_nodes, work.checking, work.writing)
    row = (megapixels_text(work.megapixels), work.encoder, *(spread.text(0, 1e3) for spread in spreads))
    header = ("size", "encoder of the tiny VAE", "a request, ms", "beside the nodes, ms", "reading and checking", "writing")
    return markdown(header, [row])
