"""Distances of latents from ComfyUI's own: ours in float32, and ComfyUI's and ours in bfloat16."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.encode_diffusers import Unavailable
from benchmarks.encode_report import markdown, megapixels_text, progress
from benchmarks.encode_sides import COMFYUI, OURS, SIDES, Workbench, as_frame
from latent_encoder.vae.single_frame import SingleFrameEncoder, UnknownArchitecture

FLOAT32, BFLOAT16 = "float32", "bfloat16"
HEADER = ("size", "dtype", "side", "encoder", "max abs", "mean abs", "standard deviation of ComfyUI's latent")


@dataclass(frozen=True)
class Difference:
    """One side's latent against ComfyUI's own in float32."""

    megapixels: float
    dtype: str
    side: str
    encoder: str
    max_abs: float
    mean_abs: float
    latent_std: float


@dataclass(frozen=True)
class Differences:
    rows: list[Difference]
    unavailable: dict[str, str]

    def of(self, side: str, dtype: str) -> list[Difference]:
        return [row for row in self.rows if (row.side, row.dtype) == (side, dtype)]


def measure_differences(bench: Workbench, sizes: Sequence[float]) -> Differences:
    rows: list[Difference] = []
    unavailable: dict[str, str] = {}
    for megapixels in sizes:
        expected = bench.first(COMFYUI, megapixels).latent
        for name in SIDES[1:]:
            try:
                given = bench.first(name, megapixels).latent
            except Unavailable as exc:
                unavailable[name] = str(exc)
                continue
            rows.append(Difference(megapixels, FLOAT32, name, bench.side(name).encoder, *distance(given, expected)))
        for name, encoder, given in _bfloat16(bench, megapixels):
            rows.append(Difference(megapixels, BFLOAT16, name, encoder, *distance(given, expected)))
    return Differences(rows, unavailable)


def distance(given: Tensor, expected: Tensor) -> tuple[float, float, float]:
    """Return the largest and the mean absolute difference, and the standard deviation of the expected latent."""
    apart = (given.float() - expected).abs()
    return float(apart.max()), float(apart.mean()), float(expected.std())


def _bfloat16(bench: Workbench, megapixels: float) -> list[tuple[str, str, Tensor]]:
    """Return side, encoder and latent of ComfyUI's model in bfloat16, and of the single-frame encoder made from it."""
    progress(f"bfloat16 at {megapixels_text(megapixels)}")
    model: Any = copy.deepcopy(bench.side(COMFYUI).model).to(torch.bfloat16)
    frame = as_frame(bench.pixels(megapixels), torch.bfloat16)
    latents = [(COMFYUI, "stock", model.encode(frame))]
    try:
        latents.append((OURS, "single-frame", SingleFrameEncoder(model)(frame)))
    except UnknownArchitecture as exc:
        progress(f"no single-frame encoder in bfloat16: {exc}")
    return latents


def difference_text(result: Differences) -> str:
    return "\n".join(
        [
            markdown(HEADER, [_row(row) for row in result.rows]),
            *[f"\n{name}: not measured, {reason}" for name, reason in result.unavailable.items()],
        ]
    )


def _row(row: Difference) -> tuple[str, ...]:
    figures = (f"{value:.2e}" for value in (row.max_abs, row.mean_abs))
    return (megapixels_text(row.megapixels), row.dtype, row.side, row.encoder, *figures, f"{row.latent_std:.3f}")
