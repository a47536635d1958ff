"""`norm_silu` as one Triton kernel: each number is read once and written once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096
"""Numbers that one program of the kernel computes at a time: 32 pixels of 96 channels, filled up to 128."""

WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def _kernel(  # noqa: PLR0913, PLR0917  # a kernel has no objects to put them in
    rows: Any,
    gamma: Any,
    out: Any,
    count: Any,
    width: Any,
    row_step: Any,
    column_step: Any,
    out_row_step: Any,
    out_column_step: Any,
    channels: tl.constexpr,
    block: tl.constexpr,
    pixels: tl.constexpr,
) -> None:
    pixel = (tl.program_id(0) * pixels + tl.arange(0, pixels)).to(tl.int64)[:, None]
    channel = tl.arange(0, block)[None, :]
    inside = (pixel < count) & (channel < channels)
    row, column = pixel // width, pixel % width
    x = tl.load(rows + row * row_step + column * column_step + channel, mask=inside, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(x * x, axis=1))[:, None]
    scale = tl.load(gamma + channel, mask=channel < channels, other=0.0)
    y = x / tl.maximum(length, 1e-12) * scale  # EPSILON of single_frame_layers.py
    y = y / (1.0 + tl.exp(-y))
    tl.store(out + row * out_row_step + column * out_column_step + channel, y.to(out.dtype.element_ty), mask=inside)


def norm_silu_kernel(rows: Tensor, gamma: Tensor, out: Tensor) -> None:
    """Write SiLU of the RMS norm of `rows` `[height, width, channels]` over their channels to `out`, computed in float32.

    The channels of a pixel of `out` are consecutive. Both may have rows and columns beside them that are not theirs.
    """
    height, width, channels = rows.shape
    if rows.stride(2) != 1:  # a library may prefer another layout for its result
        rows = rows.contiguous()
    assert out.stride(2) == 1
    block = triton.next_power_of_2(channels)
    pixels = max(1, ELEMENTS // block)
    programs = triton.cdiv(height * width, pixels)
    steps = (*rows.stride()[:2], *out.stride()[:2])
    with torch.cuda.device_of(rows):
        _kernel[(programs,)](rows, gamma, out, height * width, width, *steps, channels, block, pixels, num_warps=WARPS)
