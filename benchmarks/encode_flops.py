"""The least work of an encode, counted from the model by shape, and the rate at which this machine does such work.

Work is counted in floating-point operations, a multiplication and an addition as two, that one frame needs. Of a kernel with
three slices in time, only the last one counts: the others meet only the zeros in front of the first frame.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

GEMM_SHAPE = (8192, 3456, 384)  # as the VAE's widest convolution, 384 channels in and out: rows of pixels, 384 * 9, 384
GEMM_REPEATS = 5


@dataclass(frozen=True)
class Flops:
    """The floating-point operations of the encode of one image, by kind."""

    convolutions: int
    """Convolutions with kernels of more than one pixel; only these make the floor."""
    linear: int
    """Convolutions with kernels of one pixel: shortcuts, the attention's projections, the last layer."""
    attention: int
    """The attention's scores and their products with the values, of all pairs of tokens."""


def count_flops(model: nn.Module, frame: Sequence[int]) -> Flops:
    """Count the work of `model.encode`, of a plain ComfyUI model, for a frame of that shape, without computing anything."""
    shapes: Any = copy.deepcopy(model).to("meta")
    counts = {"convolutions": 0, "linear": 0, "attention": 0}

    def convolution(module: nn.Module, _: object, out: Tensor) -> None:
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim >= 4:
            kind = "linear" if prod(weight.shape[2:]) == 1 else "convolutions"
            counts[kind] += convolution_flops(weight.shape, out.shape)

    def attention(query: Tensor, *_: Tensor) -> Tensor:
        counts["attention"] += attention_flops(prod(query.shape[2:]), query.shape[1])
        return query

    for module in shapes.modules():
        module.register_forward_hook(convolution)
        if hasattr(module, "optimized_attention"):  # ComfyUI's name for it, in every VAE
            module.optimized_attention = attention
    shapes.encode(torch.empty(frame, device="meta"))
    return Flops(**counts)


def convolution_flops(weight: Sequence[int], out: Sequence[int]) -> int:
    """Return the work of a convolution: 2 * output elements * input channels * kernel pixels.

    `weight` is `[out, in, (frames,) height, width]`, `out` is `[batch, channels, (frames,) height, width]`.
    """
    return 2 * prod(out) * weight[1] * weight[-2] * weight[-1]


def attention_flops(tokens: int, channels: int) -> int:
    return 2 * (2 * tokens * tokens * channels)


class Gemm:
    """A product of two float32 matrices, to measure the highest rate of the machine."""

    def __init__(self) -> None:
        rows, inner, columns = GEMM_SHAPE
        self._left, self._right = torch.randn(rows, inner), torch.randn(inner, columns)
        self._flops = 2 * prod(GEMM_SHAPE)

    def rate(self) -> float:
        """Return operations per second, the best of GEMM_REPEATS products."""
        return self._flops / min(self._seconds() for _ in range(GEMM_REPEATS))

    def _seconds(self) -> float:
        start = time.perf_counter()
        torch.mm(self._left, self._right)
        return time.perf_counter() - start
