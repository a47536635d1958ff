"""The growth of memory over many encodes, part by part: `python -m benchmarks.memory_growth`."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import click
import numpy as np
from PIL import Image

from benchmarks.encode_report import markdown, progress
from benchmarks.memory_parts import Parts, parts
from benchmarks.soak_requests import VAES
from config import Settings
from latent_encoder.stages import Stages
from latent_encoder.standalone.engines import ImageJob
from latent_encoder.telemetry.health import Health
from latent_encoder.telemetry.logs import configure_logging
from latent_encoder.torch_caches import limit_torch_caches
from models import MIN_MEGAPIXELS, EncodeRequest, SuccessResponse
from service import LatentEncoder
from tests.helpers import stock

MEGAPIXEL = 1024 * 1024  # pixels, as ImageScaleToTotalPixels counts
LARGEST = 2  # times MIN_MEGAPIXELS: small, because the number of shapes counts and not their size
IN_FLIGHT = 4  # one in each stage, and one that waits: the default of KAFKA_PREFETCH
MEGABYTE = 10**6

IN_MEGABYTES = ("resident", "anonymous", "of_files", "in_use", "held", "code", "code_mapped")
COLUMNS = dict.fromkeys(IN_MEGABYTES, MEGABYTE) | dict.fromkeys(("arenas", "python_blocks", "python_objects", "threads"), 1)
"""The parts that the report shows, each with its unit."""


class Encodes:
    """The stages of the service in this process, and the requests that they get."""

    def __init__(self, folder: Path, vaes: tuple[str, ...], *, one_shape: bool) -> None:
        self._folder, self._vaes, self._one_shape = folder, vaes, one_shape
        self._random = Random(0)  # noqa: S311  # nothing secret depends on it
        self._free = threading.Semaphore(IN_FLIGHT)
        self._number = 0
        settings = Settings(
            model_dir=folder / "models",
            vae_cache_size=max(len(vaes) - 1, 1),
            allowed_input_dirs=(folder,),
            allowed_output_dirs=(folder,),
        )
        self._stages = Stages[ImageJob](
            LatentEncoder.set_up(settings), self._ended, Health(settings.encode_timeout_s), reuse=False
        )
        self._failure: BaseException | None = None

    def run(self, count: int) -> None:
        """Encode that number of images, and wait until the last is written."""
        for _ in range(count):
            self._free.acquire()
            if self._failure is not None:
                raise self._failure
            self._stages.submit(ImageJob(self._number, self._request(), threading.Event()))
        for _ in range(IN_FLIGHT):
            self._free.acquire()
        self._free.release(IN_FLIGHT)

    def _request(self) -> EncodeRequest:
        vae = self._vaes[self._number % len(self._vaes)]
        megapixels = MIN_MEGAPIXELS * LARGEST ** (0.5 if self._one_shape else self._random.random())
        aspect = 1.0 if self._one_shape else 4 ** self._random.uniform(-1, 1)
        height = round((megapixels * MEGAPIXEL / aspect) ** 0.5)
        image = self._folder / f"{self._number % (2 * IN_FLIGHT)}.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, round(height * aspect), 3), np.uint8)).save(image)
        self._number += 1
        return EncodeRequest(
            image_path=str(image),
            vae_model_name=vae,
            megapixels=round(megapixels, 4),
            output_dir=str(self._folder / "output"),
            request_id=str(self._number % (2 * IN_FLIGHT)),
        )

    def _ended(self, _: ImageJob, result: SuccessResponse | BaseException) -> None:
        if isinstance(result, BaseException):
            self._failure = result
        self._free.release()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--encodes", type=click.IntRange(min=1), default=900, show_default=True)
@click.option(
    "--every", type=click.IntRange(min=1), default=90, show_default=True, help="Encodes between samples, a multiple of VAEs."
)
@click.option("--vaes", type=click.IntRange(1, len(VAES)), default=len(VAES), show_default=True, help="VAEs, in turn.")
@click.option("--one-shape", is_flag=True, help="Images of one size for each VAE. Otherwise all sizes differ.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all samples there.")
def main(encodes: int, every: int, vaes: int, one_shape: bool, json_file: Path | None) -> None:
    """Encode many images in this process, and show which part of its memory grows.

    Run it twice with one thing changed, for example with ONEDNN_PRIMITIVE_CACHE_CAPACITY=0 or MALLOC_ARENA_MAX=1 in the
    environment, to find the cause of a growth.
    """
    configure_logging("ERROR", "text")
    limit_torch_caches()
    with TemporaryDirectory(prefix="memory-growth-") as folder:
        if vaes > 1:  # the first is bundled
            stock("make-vaes", Path(folder) / "models", "kl", "taesd")
        running = Encodes(Path(folder), tuple(share.vae for share in VAES[:vaes]), one_shape=one_shape)
        samples = list(sampled(running, encodes, every))
    rows = [(str(count), f"{seconds:.0f}", *shown(sample)) for count, seconds, sample in samples]
    click.echo(markdown(("encodes", "seconds", *COLUMNS), rows))
    if json_file is not None:
        json_file.write_text(json.dumps([[n, s, asdict(sample)] for n, s, sample in samples]), encoding="utf-8")


def sampled(running: Encodes, encodes: int, every: int) -> Iterator[tuple[int, float, Parts]]:
    """Yield the encodes so far, the seconds so far and the parts of memory, while nothing is in flight."""
    began = time.monotonic()
    for done in range(every, encodes + 1, every):
        running.run(every)
        sample = parts()
        progress(f"{done} encodes: {', '.join(f'{name} {text}' for name, text in zip(COLUMNS, shown(sample), strict=True))}")
        yield done, time.monotonic() - began, sample


def shown(sample: Parts) -> list[str]:
    return [
        f"{getattr(sample, name) / unit:.1f}" if unit > 1 else str(getattr(sample, name)) for name, unit in COLUMNS.items()
    ]


if __name__ == "__main__":
    main()
