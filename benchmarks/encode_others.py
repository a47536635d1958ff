"""Other VAEs than Wan's: ComfyUI's own encode against ours with an SD-style VAE and with TAESD."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import Tensor

from benchmarks.encode_processes import OK, Bench, Job
from benchmarks.encode_report import Spread, gigabytes, markdown, megapixels_text, progress
from benchmarks.encode_sides import COMFYUI, OURS, Side, Workbench

VAES = {"SD-style KL": "random_kl.safetensors", "TAESD": "taesd"}
HEADER = (
    "VAE",
    "our encoder",
    "size",
    "ComfyUI, s",
    "ours, s",
    "ComfyUI's / ours",
    "max abs difference",
    "peak, ComfyUI",
    "ours",
)


@dataclass(frozen=True)
class OtherVae:
    """The results of one VAE on both sides."""

    vae: str
    encoder: str
    megapixels: float
    comfyui_s: Spread
    ours_s: Spread
    speedup: Spread
    max_abs: float
    comfyui_job: Job
    our_job: Job


def measure_others(bench: Workbench, processes: Bench, megapixels: float, pairs: int) -> list[OtherVae]:
    return [_measure(bench, processes, vae, megapixels, pairs) for vae in VAES]


def _measure(bench: Workbench, processes: Bench, vae: str, megapixels: float, pairs: int) -> OtherVae:
    file, pixels = VAES[vae], bench.pixels(megapixels)
    jobs = [processes.run(side, megapixels, file) for side in (COMFYUI, OURS)]
    latents = [bench.first(side, megapixels, file).latent for side in (COMFYUI, OURS)]
    stock, ours = bench.side(COMFYUI, file), bench.side(OURS, file)
    progress(f"time of {vae} at {megapixels_text(megapixels)}, {pairs} rounds")
    rounds = [(_seconds(stock, pixels), _seconds(ours, pixels)) for _ in range(pairs)]
    comfyui_s, ours_s = zip(*rounds, strict=True)
    speedup = Spread(tuple(theirs / mine for theirs, mine in rounds))
    max_abs = float((latents[0] - latents[1]).abs().max())
    return OtherVae(vae, ours.encoder, megapixels, Spread(comfyui_s), Spread(ours_s), speedup, max_abs, *jobs)


def _seconds(side: Side, pixels: Tensor) -> float:
    start = time.perf_counter()
    side.encode(pixels)
    return time.perf_counter() - start


def others_text(results: list[OtherVae]) -> str:
    return markdown(HEADER, [_row(result) for result in results])


def _row(result: OtherVae) -> tuple[str, ...]:
    return (
        result.vae,
        result.encoder,
        megapixels_text(result.megapixels),
        result.comfyui_s.text(),
        result.ours_s.text(),
        result.speedup.text(),
        f"{result.max_abs:.1e}",
        *(gigabytes(job.peak_bytes) if job.outcome == OK else job.outcome for job in (result.comfyui_job, result.our_job)),
    )
