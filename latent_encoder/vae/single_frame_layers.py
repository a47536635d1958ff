"""The layers of the single-frame encoder. Each takes a stream of strips of rows and gives one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from latent_encoder.vae import winograd
from latent_encoder.vae.row_strips import RowBuffer, Stream, joined, regrouped

Activation = Callable[[Tensor, Tensor, Tensor], None]
"""What `norm_silu` does."""


EPSILON = 1e-12  # the least length that is divided by, as in `torch.nn.functional.normalize`


def norm_silu(rows: Tensor, gamma: Tensor, out: Tensor) -> None:
    """SiLU of the RMS norm of `rows` over their channels, computed in float32 and written to `out`."""
    wide = rows.float()
    result = out if out.dtype == wide.dtype else torch.empty_like(wide)
    functional.silu(rms_norm(wide, gamma, result), inplace=True)
    if result is not out:
        out.copy_(result)


def rms_norm(rows: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
    """The RMS norm of float32 `rows` over their channels, written to `out`; `gamma` is a `scaled_gamma`."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min_(EPSILON)
    return torch.div(rows, length, out=out).mul_(gamma)


def scaled_gamma(norm: Any) -> Tensor:
    """A norm's `gamma` times the square root of the number of channels, in float32 whatever the model's dtype."""
    gamma: Tensor = norm.gamma.flatten().float()
    return gamma * math.sqrt(gamma.numel())


class Convolution(nn.Module):
    """RMS norm and SiLU, where there is a norm, and a 3 x 3 convolution.

    With stride 1 there are zeros around the picture, with stride 2 only below and to the right of it.
    """

    def __init__(self, convolution: Any, norm: Any = None, activate: Activation = norm_silu, stride: int = 1) -> None:
        super().__init__()
        kernel = convolution.weight if convolution.weight.ndim == 4 else convolution.weight[:, :, -1]
        self.stride = stride
        self.winograd = stride == 1 and winograd.is_worth_it(kernel)
        self.kernel = nn.Parameter(
            winograd.transformed_kernel(kernel) if self.winograd else kernel.contiguous(memory_format=torch.channels_last)
        )
        self.bias = nn.Parameter(convolution.bias)
        self.gamma = nn.Parameter(scaled_gamma(norm)) if norm is not None else None
        self.activate = activate

    def forward(self, stream: Stream) -> Stream:
        seen: RowBuffer | None = None
        for rows, last in stream:
            if seen is None:
                tiles = winograd.TILE if self.winograd else 1
                seen = RowBuffer(rows, left=self.stride % 2, right=1 + -rows.shape[1] % tiles)
                seen.add(self.stride % 2).zero_()
            self._take(rows, seen.add(rows.shape[0]))
            if last:
                seen.add(1).zero_()
            width = rows.shape[1] // self.stride
            del rows  # not to be kept in memory while the layers behind are at work
            if seen.rows.shape[0] >= 3:
                yield self._result(seen, last)[:, :width], last

    def _take(self, rows: Tensor, out: Tensor) -> None:
        if self.gamma is None:
            out.copy_(rows)
        else:
            self.activate(rows, self.gamma, out)

    def _result(self, seen: RowBuffer, last: bool) -> Tensor:
        window = seen.rows
        if self.winograd:
            result = winograd.convolve(window, self.kernel, self.bias)
        else:
            result = functional.conv2d(window.permute(2, 0, 1)[None], self.kernel, self.bias, self.stride)[0].permute(1, 2, 0)
        seen.discard(window.shape[0] if last else result.shape[0] * self.stride)
        return result


class Residual(nn.Module):
    """Some layers, and beside them a shortcut whose result is added to theirs; `shrink` is their stride."""

    def __init__(self, path: Iterable[nn.Module], shortcut: nn.Module, shrink: int = 1) -> None:
        super().__init__()
        self.path = nn.ModuleList(path)
        self.shortcut = shortcut
        self.shrink = shrink

    def forward(self, stream: Stream) -> Stream:
        waiting: list[RowBuffer] = []

        def remembered() -> Stream:
            for rows, last in stream:
                if not waiting:
                    waiting.append(RowBuffer(rows))
                waiting[0].add(rows.shape[0]).copy_(rows)
                yield rows, last

        results: Stream = remembered()
        for layer in self.path:
            results = layer(results)
        for result, last in results:
            taken = result.shape[0] * self.shrink
            result.add_(self.shortcut(waiting[0].rows[:taken]))
            waiting[0].discard(taken)
            yield result, last


class Pointwise(nn.Module):
    """A 1 x 1 convolution, of which only the first `outputs` results are wanted."""

    def __init__(self, convolution: Any, outputs: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(convolution.weight[:outputs].flatten(1))
        self.bias = nn.Parameter(convolution.bias[:outputs])

    def forward(self, rows: Tensor) -> Tensor:
        return functional.linear(rows, self.weight, self.bias)


class MeanOfPatches(nn.Module):
    """Wan 2.2's shortcut around a down-sampling, run as ComfyUI has it: it looks at each patch on its own."""

    def __init__(self, shortcut: nn.Module) -> None:
        super().__init__()
        self.shortcut = shortcut

    def forward(self, rows: Tensor) -> Tensor:
        mean: Tensor = self.shortcut(rows.permute(2, 0, 1)[None, :, None])
        return mean[0, :, 0].permute(1, 2, 0)


class Attention(nn.Module):
    """Attention of every pixel to every pixel, with one head, added to the pixels."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.gamma = nn.Parameter(scaled_gamma(block.norm))
        self.to_qkv = Pointwise(block.to_qkv)
        self.proj = Pointwise(block.proj)

    def forward(self, stream: Stream) -> Stream:
        picture = joined(stream)
        pixels = picture.flatten(0, 1).float()
        normed = rms_norm(pixels, self.gamma, torch.empty_like(pixels)).to(picture.dtype)
        q, k, v = self.to_qkv(normed)[None, None].chunk(3, dim=-1)
        del pixels, normed
        attended = functional.scaled_dot_product_attention(q, k, v)[0, 0]
        del q, k, v
        picture += self.proj(attended).view_as(picture)
        del attended
        yield from regrouped(iter([(picture, True)]))


class Regroup(nn.Module):
    """The same rows in strips of another height: those that come out of the down-sampling have very few."""

    def forward(self, stream: Stream) -> Stream:
        return regrouped(stream)


class Each(nn.Module):
    """A function of each pixel on its own."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, stream: Stream) -> Stream:
        for rows, last in stream:
            yield self.function(rows), last
