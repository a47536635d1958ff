"""The layers of the single-frame encoder: `nn.Module`s that take a stream of strips and return one, or work on pixels.

Each takes its weights from a layer of ComfyUI's model, in that layer's dtype and on its device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from latent_encoder.vae import attention, winograd
from latent_encoder.vae.freed_memory import give_back_freed_memory
from latent_encoder.vae.matrix_products import linear
from latent_encoder.vae.row_strips import RowBuffer, Rows, Stream, joined, regrouped

Activation = Callable[[Tensor, Tensor, Tensor], None]
"""`norm_silu` or a compiled version of it."""

ALL = slice(None)

KEPT_ROWS = 2
"""Rows of its input that a 3 x 3 convolution keeps for the next strip."""

TRIM_BYTES = 16 * 1024**2
"""Least bytes of an attention's input for which freed memory is given back before it, 0.7 megapixels in float32. The strips
before it leave 0.1 to 0.3 GB. To take that anew costs 0.04 s, too much beside a smaller encode."""

EPSILON = 1e-12
"""The smallest length that is divided by, as in `torch.nn.functional.normalize`, which ComfyUI's Wan VAE uses."""


class Build(NamedTuple):
    """The ways to compute the layers that depend on the device on which they will run."""

    activate: Activation
    winograd: bool
    """Permission to use Winograd's convolution. It was measured on CPUs only, and a GPU's libraries have their own."""


def norm_silu(rows: Tensor, gamma: Tensor, out: Tensor) -> None:
    """Write SiLU of the RMS norm of `rows` over their channels to `out`, computed in float32. SiLU is x * sigmoid(x)."""
    wide = rows.float()
    result = out if out.dtype == wide.dtype else wide
    functional.silu(rms_norm(wide, gamma, result), inplace=True)
    if result is not out:
        out.copy_(result)


def rms_norm(rows: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
    """Write the RMS norm of float32 `rows` `[…, channels]` over their channels to `out`, and return it.

    It is x / |x| * sqrt(channels) * gamma (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019). `gamma` is a
    `scaled_gamma`, which contains the square root.
    """
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min_(EPSILON)
    return torch.div(rows, length, out=out).mul_(gamma)


def scaled_gamma(norm: Any) -> Tensor:
    """Return a norm's `gamma` times the square root of its channels, `[channels]`, in float32 whatever the model's dtype."""
    gamma: Tensor = norm.gamma.flatten().float()
    return gamma * math.sqrt(gamma.numel())


class Convolution(nn.Module):
    """A 3 x 3 convolution, with RMS norm and SiLU before it if there is a norm.

    With stride 1 a border of zeros surrounds the image; with stride 2 zeros are only below and to the right of it. Of a kernel
    over time, `[out, in, 3, 3, 3]`, the last time slice is taken: see `vae/single_frame.py`.
    """

    def __init__(self, convolution: Any, build: Build, norm: Any = None, stride: int = 1) -> None:
        super().__init__()
        kernel = convolution.weight if convolution.weight.ndim == 4 else convolution.weight[:, :, -1]
        self.stride = stride
        self.winograd = build.winograd and stride == 1 and winograd.is_worth_it(kernel)
        self.kernel = nn.Parameter(
            winograd.transformed_kernel(kernel) if self.winograd else kernel.contiguous(memory_format=torch.channels_last)
        )
        self.bias = nn.Parameter(convolution.bias)
        self.gamma = nn.Parameter(scaled_gamma(norm)) if norm is not None else None
        self.activate = build.activate

    def forward(self, stream: Stream) -> Stream:
        """Return rows of the result, `[rows / stride, width / stride, out]`, as soon as their input is complete."""
        return Stream(self._convolved(stream), stream.height // self.stride)

    def _convolved(self, stream: Stream) -> Iterator[Rows]:
        seen: RowBuffer | None = None
        for rows, last in stream:
            if seen is None:
                seen = self._empty_buffer(rows)
            self._take(rows, seen.add(rows.shape[0]))
            if last:
                seen.add(1).zero_()
            width = rows.shape[1] // self.stride
            del rows  # frees its memory while the next layers work on the result
            if seen.rows.shape[0] >= 3:
                yield self._result(seen, last)[:, :width], last

    def _empty_buffer(self, rows: Tensor) -> RowBuffer:
        """Return a buffer with the zeros around the image, and with columns that fill the width up to whole Winograd tiles."""
        border = 1 if self.stride == 1 else 0
        tile = winograd.TILE if self.winograd else 1
        seen = RowBuffer(rows, left=border, right=1 + -rows.shape[1] % tile, spare=KEPT_ROWS)
        seen.add(border).zero_()
        return seen

    def _take(self, rows: Tensor, out: Tensor) -> None:
        """Write the rows to the buffer, normalised and activated."""
        if self.gamma is None:
            out.copy_(rows)
        else:
            self.activate(rows, self.gamma, out)

    def _result(self, seen: RowBuffer, last: bool) -> Tensor:
        """Convolve the rows in the buffer, and remove those that no later row depends on."""
        window = seen.rows
        if self.winograd:
            result = winograd.convolve(window, self.kernel, self.bias)
        else:
            result = functional.conv2d(window.permute(2, 0, 1)[None], self.kernel, self.bias, self.stride)[0].permute(1, 2, 0)
        seen.discard(window.shape[0] if last else result.shape[0] * self.stride)
        return result


class Residual(nn.Module):
    """Layers with a shortcut around them, whose result is added to theirs. `shrink` is the stride of the layers together."""

    def __init__(self, path: Iterable[nn.Module], shortcut: nn.Module, shrink: int = 1) -> None:
        super().__init__()
        self.path = nn.ModuleList(path)
        self.shortcut = shortcut
        self.shrink = shrink

    def forward(self, stream: Stream) -> Stream:
        """Return the sum of both. The input's rows wait in a buffer for the layers' result, which comes some rows later."""
        return Stream(self._summed(stream), stream.height // self.shrink)

    def _summed(self, stream: Stream) -> Iterator[Rows]:
        waiting: list[RowBuffer] = []

        def remembered() -> Iterator[Rows]:
            for rows, last in stream:
                if not waiting:
                    waiting.append(RowBuffer(rows))
                waiting[0].add(rows.shape[0]).copy_(rows)
                yield rows, last

        results = Stream(remembered(), stream.height)
        for layer in self.path:
            results = layer(results)
        for result, last in results:
            taken = result.shape[0] * self.shrink
            result.add_(self.shortcut(waiting[0].rows[:taken]))
            waiting[0].discard(taken)
            yield result, last


class Pointwise(nn.Module):
    """A 1 x 1 convolution of `[…, in]` to `[…, out]`; with `outputs`, only these of its channels are computed."""

    def __init__(self, convolution: Any, outputs: slice = ALL) -> None:
        super().__init__()
        self.weight = nn.Parameter(convolution.weight[outputs].flatten(1))
        self.bias = nn.Parameter(convolution.bias[outputs])

    def forward(self, rows: Tensor) -> Tensor:
        return linear(rows.flatten(0, -2), self.weight, self.bias).view(*rows.shape[:-1], -1)


class MeanOfPatches(nn.Module):
    """Wan 2.2's shortcut around a down-sampling: means within patches, by ComfyUI's own module.

    Each patch depends on itself alone, so that strips of whole patches need no neighbours.
    """

    def __init__(self, shortcut: nn.Module) -> None:
        super().__init__()
        self.shortcut = shortcut

    def forward(self, rows: Tensor) -> Tensor:
        """Return the means of rows `[height, width, in]`, for example `[height / 2, width / 2, out]`."""
        mean: Tensor = self.shortcut(rows.permute(2, 0, 1)[None, :, None])
        return mean[0, :, 0].permute(1, 2, 0)


class Attention(nn.Module):
    """Attention of every pixel to every pixel, with one head, added to the pixels.

    It needs all rows at once. It goes over the queries in blocks, so that only the pixels, their keys and their values are in
    memory as a whole, and a block takes the place of its pixels.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.gamma = nn.Parameter(scaled_gamma(block.norm))
        self.query, self.key, self.value = (Pointwise(block.to_qkv, part) for part in _thirds(block.to_qkv))
        self.proj = Pointwise(block.proj)

    def forward(self, stream: Stream) -> Stream:
        """Return the sum in strips."""
        return regrouped(Stream(self._attended(stream), stream.height))

    def _attended(self, stream: Stream) -> Iterator[Rows]:
        """Yield the sum as one strip."""
        image = joined(stream)
        if image.nbytes >= TRIM_BYTES and image.device.type == "cpu":
            give_back_freed_memory()
        pixels = image.flatten(0, 1)
        size = attention.block_size(pixels)
        keys, values = attention.empty_like(pixels)
        for block, key, value in zip(*(torch.split(rows, size) for rows in (pixels, keys, values)), strict=True):
            normed = self._normed(block)
            key.copy_(self.key(normed))
            value.copy_(self.value(normed))
        for block in torch.split(pixels, size):
            block.add_(self.proj(attention.attended(self.query(self._normed(block)), keys, values)))
        del keys, values
        yield image, True

    def _normed(self, block: Tensor) -> Tensor:
        wide = block.float()
        return rms_norm(wide, self.gamma, torch.empty_like(wide)).to(block.dtype)


def _thirds(convolution: Any) -> Iterator[slice]:
    """Yield the outputs of a convolution that are queries, keys and values."""
    channels = convolution.weight.shape[0] // 3
    return (slice(start, start + channels) for start in range(0, 3 * channels, channels))


class Regroup(nn.Module):
    """The same rows in strips of another height: see `regrouped`."""

    def forward(self, stream: Stream) -> Stream:
        return regrouped(stream)


class Each(nn.Module):
    """A function of each pixel on its own."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, stream: Stream) -> Stream:
        return Stream(((self.function(rows), last) for rows, last in stream), stream.height)
