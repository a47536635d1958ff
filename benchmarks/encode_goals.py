"""All results of one run, and the goals that they are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.encode_difference import BFLOAT16, FLOAT32, Difference, Differences
from benchmarks.encode_files import FileWork
from benchmarks.encode_others import OtherVae
from benchmarks.encode_processes import OK, Job
from benchmarks.encode_releases import ReleaseTimes, SizeReleases
from benchmarks.encode_report import Spread, gigabytes, megapixels_text
from benchmarks.encode_sides import COMFYUI, HALF, OURS
from benchmarks.encode_start import Commands, Starts
from benchmarks.encode_time import SizeTimes

NOT_MEASURED = "not measured"
HEADER = ("measure", "goal", "measured")

RELEASE = "0.33"  # the ComfyUI whose own encode sets the goal of speed, given as --comfyui or --comfyui-path
SPEEDUP = 2.6
SPEEDUP_SIZES = (0.25, 1.0)  # megapixels
HALF_SPEEDUP, HALF_SIZE = 1.9, 1.0  # of bfloat16 over our float32; megapixels
PEAK_GB = {1.0: 1.2, 4.0: 1.6, 16.0: 2.5}  # by megapixels
MAX_ABS = 2e-5
START_S = 1.2  # the command line, beyond `import torch`
QUICK_S = 0.4  # --help and --mode health
FILES_MS = 40
FILES_SIZE = 1.0  # megapixels
OTHERS_SPEEDUP, OTHERS_MEMORY = 1.3, 0.5  # of ComfyUI's time and peak, with an SD-style VAE
OTHER_VAE = "SD-style KL"

Row = tuple[str, str, str]


@dataclass
class Results:
    """The measurements by section; empty or None for a section that did not run."""

    machine: dict[str, Any]
    pairs: int
    time: list[SizeTimes] = field(default_factory=list)
    releases: list[SizeReleases] = field(default_factory=list)
    difference: Differences | None = None
    memory: list[Job] = field(default_factory=list)
    start: list[Starts] = field(default_factory=list)
    commands: Commands | None = None
    files: FileWork | None = None
    others: list[OtherVae] = field(default_factory=list)


def goal_rows(results: Results) -> list[Row]:
    """Return measure, goal and result of each goal; all are about the encoder that the service uses by default."""
    groups = (_time_rows, _memory_rows, _difference_rows, _other_vae_rows, _start_rows, _file_rows)
    return [row for rows in groups for row in rows(results)]


def _time_rows(results: Results) -> Iterator[Row]:
    for megapixels in SPEEDUP_SIZES:
        found = _of_release(results, megapixels)
        measured = f"{found.speedup.text()} ({found.comfyui_s.median:.1f} s to {found.ours_s.median:.1f} s)" if found else None
        name = f"time of an encode, {_size(megapixels)}: ComfyUI {RELEASE}'s / ours"
        yield name, f">= {SPEEDUP}", measured or NOT_MEASURED
    times = next((times for times in results.time if times.megapixels == HALF_SIZE), None)
    ours, half = (times.side(name) if times else None for name in (OURS, HALF))
    measured = _ratio(ours.seconds, half.seconds).text() if ours and half else NOT_MEASURED
    yield f"time of an encode, {_size(HALF_SIZE)}: ours in float32 / in bfloat16", f">= {HALF_SPEEDUP}", measured


def _of_release(results: Results, megapixels: float) -> ReleaseTimes | None:
    sizes = (size for size in results.releases if size.megapixels == megapixels)
    return next((found for size in sizes for found in size.releases if found.release.startswith(RELEASE)), None)


def _ratio(above: Spread, below: Spread) -> Spread:
    """Return the ratios of the same rounds."""
    return Spread(tuple(one / other for one, other in zip(above.runs, below.runs, strict=True)))


def _memory_rows(results: Results) -> Iterator[Row]:
    for megapixels, limit in PEAK_GB.items():
        stock, ours = (_job(results, side, megapixels) for side in (COMFYUI, OURS))
        measured = NOT_MEASURED if ours is None else gigabytes(ours.peak_bytes) if ours.outcome == OK else ours.outcome
        beside = f" (ComfyUI's: {gigabytes(stock.peak_bytes)})" if stock and stock.outcome == OK else ""
        yield f"peak memory of the whole job, {megapixels_text(megapixels)}", f"<= {limit} GB", measured + beside


def _job(results: Results, side: str, megapixels: float) -> Job | None:
    return next((job for job in results.memory if (job.side, job.megapixels) == (side, megapixels)), None)


def _difference_rows(results: Results) -> Iterator[Row]:
    found = results.difference
    float32 = found.of(OURS, FLOAT32) if found else []
    measured = f"{max(row.max_abs for row in float32):.1e}" if float32 else NOT_MEASURED
    yield "difference from ComfyUI's latent, float32, max abs", f"<= {MAX_ABS:.0e}", measured
    ours, stock = ((found.of(side, BFLOAT16) if found else []) for side in (OURS, COMFYUI))
    for name, measure in (("max", "max_abs"), ("mean", "mean_abs")):
        ratios = _ratios(ours, stock, measure)
        measured = ", ".join(f"{ratio:.2f} ({size})" for size, ratio in ratios) or NOT_MEASURED
        yield f"distance from ComfyUI's float32 latent in bfloat16, {name} abs: ours / ComfyUI's", "<= 1", measured


def _ratios(ours: list[Difference], stock: list[Difference], measure: str) -> list[tuple[str, float]]:
    theirs = {row.megapixels: getattr(row, measure) for row in stock}
    return [
        (megapixels_text(row.megapixels), getattr(row, measure) / theirs[row.megapixels])
        for row in ours
        if row.megapixels in theirs
    ]


def _other_vae_rows(results: Results) -> Iterator[Row]:
    found = next((other for other in results.others if other.vae == OTHER_VAE), None)
    speedup, memory = NOT_MEASURED, NOT_MEASURED
    if found is not None:
        jobs = (found.our_job, found.comfyui_job)
        speedup = f"{found.speedup.text()} ({megapixels_text(found.megapixels)})"
        peaks = f"{found.our_job.peak_bytes / found.comfyui_job.peak_bytes:.2f} ({megapixels_text(found.megapixels)})"
        memory = peaks if all(job.outcome == OK for job in jobs) else NOT_MEASURED
    yield f"{OTHER_VAE}, time of an encode: ComfyUI's / ours", f">= {OTHERS_SPEEDUP}", speedup
    yield f"{OTHER_VAE}, peak memory: ours / ComfyUI's", f"<= {OTHERS_MEMORY}", memory


def _start_rows(results: Results) -> Iterator[Row]:
    found = results.commands
    measured = f"{found.beyond_torch.text()} s ({found.encode.text()} s)" if found else NOT_MEASURED
    yield "the command line, one small picture, tiny VAE, beyond `import torch`", f"<= {START_S} s", measured
    yield "`--help`", f"<= {QUICK_S} s", f"{found.help.text()} s" if found else NOT_MEASURED
    yield "`--mode health`", f"<= {QUICK_S} s", f"{found.health.text()} s" if found else NOT_MEASURED


def _file_rows(results: Results) -> Iterator[Row]:
    work = results.files if results.files and results.files.megapixels == FILES_SIZE else None
    measured = f"{work.writing.text(0, 1e3)} ms" if work else NOT_MEASURED
    yield f"writing of PNG, latent and JSON with checksums, {megapixels_text(FILES_SIZE)}", f"<= {FILES_MS} ms", measured


def _size(megapixels: float) -> str:
    side = round(1024 * megapixels**0.5)
    return f"{side} x {side}"
