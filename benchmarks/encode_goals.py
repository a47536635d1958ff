"""All results of one run, and the goals that they are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.encode_difference import BFLOAT16, FLOAT32, Difference, Differences
from benchmarks.encode_files import FileWork
from benchmarks.encode_others import OtherVae
from benchmarks.encode_processes import OK, Job
from benchmarks.encode_releases import SizeReleases
from benchmarks.encode_report import Spread, gigabytes, megapixels_text
from benchmarks.encode_sides import COMFYUI, OURS
from benchmarks.encode_start import Starts
from benchmarks.encode_time import SideTimes, SizeTimes

NOT_MEASURED = "not measured"
HEADER = ("measure", "goal", "measured")

SPEEDUP = 3.5
SPEEDUP_SIZES = (0.25, 1.0)  # megapixels
TO_FLOOR = 1.25
PEAK_GB = {1.0: 1.5, 4.0: 2.0, 16.0: 4.5}  # by megapixels
MAX_ABS = 2e-5
START_S = 3
FILES_MS = 100
FILES_SIZE = 1.0  # megapixels

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
    files: FileWork | None = None
    others: list[OtherVae] = field(default_factory=list)


def goal_rows(results: Results) -> list[Row]:
    """Return measure, goal and result of each goal; all are about the encoder that the service uses by default."""
    return [*_time_rows(results), *_memory_rows(results), *_difference_rows(results), *_other_rows(results)]


def _time_rows(results: Results) -> Iterator[Row]:
    times = {times.megapixels: times for times in results.time}
    for megapixels in SPEEDUP_SIZES:
        size = _size(megapixels)
        stock, ours = (times[megapixels].side(name) if megapixels in times else None for name in (COMFYUI, OURS))
        yield f"time of an encode, {size}: ComfyUI's / ours", f">= {SPEEDUP}", _speedup(stock, ours)
        to_floor = ours.to_floor.text() if ours else NOT_MEASURED
        yield f"time of an encode, {size}: ours / the convolutions' floor", f"<= {TO_FLOOR}", to_floor


def _speedup(stock: SideTimes | None, ours: SideTimes | None) -> str:
    if stock is None or ours is None:
        return NOT_MEASURED
    return f"{ours.speedup.text()} ({stock.seconds.median:.1f} s to {ours.seconds.median:.1f} s)"


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


def _other_rows(results: Results) -> Iterator[Row]:
    start, files = next(iter(results.start), None), results.files
    beside = f" s (ComfyUI's modules, plainly imported: {start.comfyui.seconds.text()} s)" if start else ""
    yield "start, until the nodes can be called", f"<= {START_S} s", _text(start.ours.seconds if start else None) + beside
    work = files if files and files.megapixels == FILES_SIZE else None
    measured = (
        f"{work.writing.text(0, 1e3)} ms, and {work.checking.text(0, 1e3)} ms to check the image" if work else NOT_MEASURED
    )
    yield f"work on files beside the nodes, {megapixels_text(FILES_SIZE)}", f"<= {FILES_MS} ms", measured


def _text(spread: Spread | None) -> str:
    return spread.text() if spread else NOT_MEASURED


def _size(megapixels: float) -> str:
    side = round(1024 * megapixels**0.5)
    return f"{side} x {side}"
