"""The time of one VAEEncode, side against side, and its ratio to the least possible time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil
from torch import Tensor

from benchmarks.encode_diffusers import Unavailable
from benchmarks.encode_flops import Flops, Gemm, count_flops
from benchmarks.encode_report import Spread, markdown, megapixels_text, progress
from benchmarks.encode_sides import COMFYUI, COMPILED, HALF, OURS, SIDES, Side, Workbench, as_frame

HEADER = ("side", "encoder", "seconds", "ComfyUI's / this", "this / floor", "first encode, more s", "loading the VAE, s")


@dataclass(frozen=True)
class Run:
    """One encode, and the best rate of matrix products just before and just after it."""

    seconds: float
    gemm_per_s: float


@dataclass(frozen=True)
class SideTimes:
    """All rounds of one side at one size."""

    side: str
    encoder: str
    load_s: float
    first_s: float
    """The first encode of this size, in a process in which the side has encoded the smaller sizes."""
    seconds: Spread
    speedup: Spread
    """ComfyUI's time divided by this side's, of the same round."""
    to_floor: Spread
    """This side's time divided by that of the convolutions at the rate of matrix products."""

    @property
    def cold_s(self) -> float:
        """The additional seconds of the first encode."""
        return self.first_s - self.seconds.median


@dataclass(frozen=True)
class SizeTimes:
    """All sides at one size."""

    megapixels: float
    height: int
    width: int
    flops: Flops
    gemm_per_s: Spread
    cpu_share_of_others: float
    """Share of the CPUs that other processes had."""
    sides: list[SideTimes]
    unavailable: dict[str, str]

    def side(self, name: str) -> SideTimes | None:
        return next((side for side in self.sides if side.side == name), None)


def measure_time(bench: Workbench, sizes: Sequence[float], pairs: int) -> list[SizeTimes]:
    gemm = Gemm()
    gemm.rate()
    return [_measure_size(bench, gemm, megapixels, pairs) for megapixels in sizes]


def _measure_size(bench: Workbench, gemm: Gemm, megapixels: float, pairs: int) -> SizeTimes:
    pixels = bench.pixels(megapixels)
    first, unavailable = _warm_up(bench, megapixels)
    sides = [bench.side(name) for name in first]  # ComfyUI's own is the first; an error in it ends the run
    start, others = time.perf_counter(), cpu_s_of_others()
    rounds = []
    for n in range(pairs):
        progress(f"time at {megapixels_text(megapixels)}, round {n + 1} of {pairs}")
        rounds.append(one_round(sides, pixels, gemm))
    cpu_s = (time.perf_counter() - start) * (os.cpu_count() or 1)
    others_share = (cpu_s_of_others() - others) / cpu_s
    flops = count_flops(bench.side(COMFYUI).model, as_frame(pixels).shape)
    return SizeTimes(
        megapixels=megapixels,
        height=pixels.shape[1],
        width=pixels.shape[2],
        flops=flops,
        gemm_per_s=Spread(tuple(run.gemm_per_s for runs in rounds for run in runs)),
        cpu_share_of_others=others_share,
        sides=[
            side_times(side, first[side.name], [runs[n] for runs in rounds], [runs[0] for runs in rounds], flops)
            for n, side in enumerate(sides)
        ],
        unavailable=unavailable,
    )


def cpu_s_of_others() -> float:
    """Return the CPU seconds so far of all processes except this one, and those that the host took from this machine."""
    times, own = psutil.cpu_times(), os.times()
    return times.user + times.nice + times.system + getattr(times, "steal", 0.0) - own.user - own.system


def _warm_up(bench: Workbench, megapixels: float) -> tuple[dict[str, float], dict[str, str]]:
    """Let each side encode once; return the seconds of each, and the reasons of those that cannot."""
    first, unavailable = {}, {}
    for name in (*SIDES, HALF):
        try:
            first[name] = bench.first(name, megapixels).seconds
        except Unavailable as exc:
            unavailable[name] = str(exc)
    return first, unavailable


def one_round(sides: Sequence[Side], pixels: Tensor, gemm: Gemm) -> list[Run]:
    """Let each side encode once, with the matrix product between them."""
    runs, before = [], gemm.rate()
    for side in sides:
        start = time.perf_counter()
        side.encode(pixels)
        seconds = time.perf_counter() - start
        after = gemm.rate()
        runs.append(Run(seconds, max(before, after)))
        before = after
    return runs


def side_times(side: Side, first_s: float, runs: Sequence[Run], stock: Sequence[Run], flops: Flops) -> SideTimes:
    """Return the figures of one side from its rounds; `stock` are ComfyUI's runs in the same rounds."""
    return SideTimes(
        side=side.name,
        encoder=side.encoder,
        load_s=side.load_s,
        first_s=first_s,
        seconds=Spread(tuple(run.seconds for run in runs)),
        speedup=Spread(tuple(other.seconds / run.seconds for run, other in zip(runs, stock, strict=True))),
        to_floor=Spread(tuple(run.seconds * run.gemm_per_s / flops.convolutions for run in runs)),
    )


def time_text(results: Sequence[SizeTimes]) -> str:
    """Return all sizes as Markdown."""
    return "\n\n".join([*map(_size_text, results), *_compile_text(results)])


def compile_s(result: SizeTimes) -> float | None:
    """Return the seconds that compiling added to loading the VAE and to the first encode; None unless it was measured."""
    ours, compiled = result.side(OURS), result.side(COMPILED)
    return compiled.load_s - ours.load_s + compiled.cold_s if ours and compiled else None


def _compile_text(results: Sequence[SizeTimes]) -> Iterator[str]:
    if results and (seconds := compile_s(results[0])) is not None:
        yield (
            f"Compiling took {seconds:.1f} s, once in a process: what loading the VAE took longer with it than without, and "
            f"the first encode of {megapixels_text(results[0].megapixels)} longer than later ones."
        )


def _size_text(result: SizeTimes) -> str:
    flops, others = result.flops, result.cpu_share_of_others
    floor = flops.convolutions / result.gemm_per_s.median
    return "\n".join(
        [
            f"{result.width} x {result.height}. Convolutions with kernels of more than one pixel, computed directly: "
            f"{flops.convolutions / 1e9:.0f} GFLOP; matrix products: {result.gemm_per_s.text(0, 1e-9)} GFLOP/s; "
            f"so the floor is {floor:.2f} s. Not in it: {flops.linear / 1e9:.0f} GFLOP of linear layers, "
            f"{flops.attention / 1e9:.0f} GFLOP of attention, everything that is done to each element, and memory. "
            f"Other processes had {others:.1%} of the CPUs meanwhile.",
            "",
            markdown(HEADER, [_row(side) for side in result.sides]),
            *[f"\n{name}: not measured, {reason}" for name, reason in result.unavailable.items()],
        ]
    )


def _row(side: SideTimes) -> tuple[str, ...]:
    return (
        side.side,
        side.encoder,
        side.seconds.text(),
        side.speedup.text(),
        side.to_floor.text(),
        f"{side.cold_s:.2f}",
        f"{side.load_s:.1f}",
    )
