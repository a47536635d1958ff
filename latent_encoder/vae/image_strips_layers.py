"""The layers of the encoder of an SD-style VAE: each takes a whole image and makes the next one, strip after strip.

An image is `[height, width, channels]`, with the moments of its channels for the group normalisation behind it. A layer
normalises the rows of a strip into a small buffer, convolves that, and writes the result to its place. So at full size two
images are in memory: the input of a residual block, in whose place its result comes, and the image between its convolutions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from latent_encoder.vae import attention, winograd
from latent_encoder.vae.group_norm import GroupNorm, Moments
from latent_encoder.vae.single_frame_layers import Pointwise

STRIP_VALUES = 1024 * 1024
"""Values of a strip, pixels times channels: 4 MB, which stay in a CPU's cache. The measured optimum."""

KERNEL = 3
"""Rows and columns of a kernel."""


class Image(NamedTuple):
    """The activations of a layer."""

    pixels: Tensor
    """Contiguous float32 `[height, width, channels]`."""
    moments: Moments
    """The moments of its channels."""


def image_of(strips: Iterable[tuple[slice, Tensor]], pixels: Tensor) -> Image:
    """Write strips, with the rows that they belong to, to `pixels`, and return the image."""
    moments = Moments()
    for rows, strip in strips:
        pixels[rows] = strip
        moments.add(pixels[rows])
    return Image(pixels, moments)


def strip_rows(height: int, values: int) -> Iterator[slice]:
    """Yield the rows of an image with that height, and as many values in a row, in strips of about `STRIP_VALUES`."""
    count = max(1, STRIP_VALUES // values)
    return (slice(start, min(start + count, height)) for start in range(0, height, count))


class Convolution(nn.Module):
    """A 3 x 3 convolution, with group normalisation and SiLU before it if there is a norm.

    With stride 1 a border of zeros surrounds the image; with stride 2 zeros are only below and to the right of it.
    """

    def __init__(self, convolution: Any, norm: Any = None, stride: int = 1) -> None:
        super().__init__()
        weight = convolution.weight
        self.stride, self.border = stride, 1 if stride == 1 else 0
        self.outputs = weight.shape[0]
        self.winograd = stride == 1 and winograd.is_worth_it(weight)
        self.kernel = nn.Parameter(
            winograd.transformed_kernel(weight) if self.winograd else weight.contiguous(memory_format=torch.channels_last)
        )
        self.bias = nn.Parameter(convolution.bias)
        self.norm = GroupNorm(norm) if norm is not None else None

    def forward(self, image: Image) -> Image:
        """Return the result, `[height / stride, width / stride, outputs]`."""
        height, width, _ = image.pixels.shape
        result = image.pixels.new_empty(height // self.stride, width // self.stride, self.outputs)
        return image_of(self.strips(image), result)

    def strips(self, image: Image) -> Iterator[tuple[slice, Tensor]]:
        """Yield the result's rows and their values, strip after strip from the top."""
        normed = self.norm.of(image.moments) if self.norm is not None else None
        height, width, channels = image.pixels.shape
        parts = list(strip_rows(height // self.stride, width * max(channels, self.outputs)))
        window = self._window(parts[0].stop, image.pixels)
        kept = 0  # rows of the window that the last strip left for this one
        for rows in parts:
            first, end = rows.start * self.stride - self.border, (rows.stop - 1) * self.stride - self.border + KERNEL
            window[:kept] = window[window.shape[0] - kept :].clone()
            new = slice(max(0, first + kept), min(height, end))
            target = window[new.start - first : new.stop - first, self.border : self.border + width]
            if normed is None:
                target.copy_(image.pixels[new])
            else:
                normed.silu(image.pixels[new], target)
            window[new.stop - first :].zero_()
            yield rows, self._convolved(window[: end - first])[:, : width // self.stride]
            kept = KERNEL - self.stride

    def _window(self, count: int, pixels: Tensor) -> Tensor:
        """Return zeros for the rows and columns that `count` rows of the result depend on.

        Columns at the right fill the width up to whole Winograd tiles.
        """
        _, width, channels = pixels.shape
        right = 1 + (-width % winograd.TILE if self.winograd else 0)
        return pixels.new_zeros((count - 1) * self.stride + KERNEL, self.border + width + right, channels)

    def _convolved(self, window: Tensor) -> Tensor:
        if self.winograd:
            return winograd.convolve(window, self.kernel, self.bias)
        return functional.conv2d(window.permute(2, 0, 1)[None], self.kernel, self.bias, self.stride)[0].permute(1, 2, 0)


class Residual(nn.Module):
    """Two convolutions with a shortcut around them, whose values are added to theirs."""

    def __init__(self, first: Convolution, second: Convolution, shortcut: Pointwise | None) -> None:
        super().__init__()
        self.first, self.second, self.shortcut = first, second, shortcut

    def forward(self, image: Image) -> Image:
        """Return the sum. It takes the image's place, unless it has another number of channels."""
        between = self.first(image)
        pixels = image.pixels if self.shortcut is None else torch.empty_like(between.pixels)
        return image_of(self._sums(image.pixels, between), pixels)

    def _sums(self, pixels: Tensor, between: Image) -> Iterator[tuple[slice, Tensor]]:
        for rows, result in self.second.strips(between):
            yield rows, result.add_(pixels[rows] if self.shortcut is None else self.shortcut(pixels[rows]))


class Attention(nn.Module):
    """Attention of every pixel to every pixel, with one head, added to the pixels in their place."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm = GroupNorm(block.norm)
        self.query, self.key, self.value = Pointwise(block.q), Pointwise(block.k), Pointwise(block.v)
        self.proj = Pointwise(block.proj_out)

    def forward(self, image: Image) -> Image:
        """Return the sum."""
        normed, pixels = self.norm.of(image.moments), image.pixels.flatten(0, 1)
        size = attention.block_size(pixels)
        keys, values = attention.empty_like(pixels)
        for block, key, value in zip(*(torch.split(rows, size) for rows in (pixels, keys, values)), strict=True):
            key.copy_(self.key(normed(block)))
            value.copy_(self.value(normed(block)))
        for block in torch.split(pixels, size):
            block.add_(self.proj(attention.attended(self.query(normed(block)), keys, values)))
        height, width, channels = image.pixels.shape
        return image_of(((rows, image.pixels[rows]) for rows in strip_rows(height, width * channels)), image.pixels)
