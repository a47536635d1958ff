"""An image as a stream of strips of rows, and the buffer in which rows wait for their neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from latent_encoder.vae.freed_memory import give_back_freed_memory
from latent_encoder.vae.gpu import MOST_STRIP_PIXELS

Rows = tuple[Tensor, bool]
"""A strip, `[height, width, channels]`: consecutive rows of an image, and whether they are the image's last."""


@dataclass(frozen=True)
class Stream:
    """An image, strip after strip from the top. Every strip has at least one row; the heights may differ."""

    strips: Iterable[Rows]
    height: int
    """The rows of the whole image."""

    def __iter__(self) -> Iterator[Rows]:
        return iter(self.strips)


STRIP_PIXELS = {"cpu": 16 * 1024}
"""Pixels of a strip at the image's full size, by the kind of device. With the 96 float32 channels of Wan 2.1's first level
this is 6 MB, which stays in a CPU's cache from one layer to the next."""

TRIM_PIXELS = 384 * 1024
"""Pixels of an image after which a CPU's freed memory is given back. Strips come and go in tensors of many sizes, and after
half a megapixel 0.1 GB lies free between them. To give it back and take it anew costs 0.04 s."""

REGROUPED_PIXELS = 256 * 1024
"""Pixels of a regrouped strip on other devices: all of an image of 16 megapixels, at 1/64 of its pixels."""

CHANNELS_GAINED = 4
"""The factor between the channels at the lowest level and at full size (96 to 384 in Wan 2.1). Strips there have fewer
pixels by that factor, so that they take the same memory."""


def strips(pixels: Tensor, patch: int, elsewhere: int = MOST_STRIP_PIXELS) -> Stream:
    """Return an image `[colours, height, width]` in strips of whole rows of patches, `[rows, width / patch, channels]`.

    The `patch` x `patch` pixels of a patch (2 x 2 for Wan 2.2, else 1 x 1) become `colours` * `patch` * `patch` channels.
    `height` and `width` are multiples of `patch`. `elsewhere` is the count of pixels in a strip if the device is no CPU.
    """
    return Stream(_strips(pixels, patch, elsewhere), pixels.shape[1] // patch)


def _strips(pixels: Tensor, patch: int, elsewhere: int) -> Iterator[Rows]:
    colours, height, width = pixels.shape
    rows = max(1, STRIP_PIXELS.get(pixels.device.type, elsewhere) // width // patch) * patch
    kept = 0
    for start in range(0, height, rows):
        if pixels.device.type == "cpu" and kept >= TRIM_PIXELS:
            give_back_freed_memory()
            kept = 0
        kept += rows * width
        strip = pixels[:, start : start + rows]
        # ComfyUI's order of a patch's numbers: the colour varies slowest, then the column, then the row.
        patches = strip.view(colours, -1, patch, width // patch, patch).permute(1, 3, 0, 4, 2)
        yield patches.flatten(2), start + rows >= height


def joined(stream: Stream) -> Tensor:
    """Return all rows of a stream as one tensor. A strip's own memory is free again before the next strip is made."""
    image: Tensor | None = None
    start = 0
    for rows, _ in stream:
        if image is None:
            image = rows.new_empty(stream.height, *rows.shape[1:])
        image[start : start + rows.shape[0]] = rows
        start += rows.shape[0]
    assert image is not None, "an image has at least one row"
    return image


def regrouped(stream: Stream) -> Stream:
    """Return the same rows in strips of a good height: strips that come out of the down-sampling have very few rows."""
    return Stream(_regrouped(stream), stream.height)


def _regrouped(stream: Stream) -> Iterator[Rows]:
    waiting: RowBuffer | None = None
    for rows, last in stream:
        wanted = max(1, _regrouped_pixels(rows.device) // rows.shape[1])
        if waiting is None:
            if last or rows.shape[0] >= wanted:
                yield from _split(rows, wanted, last)
                continue
            waiting = RowBuffer(rows, spare=min(wanted, stream.height))
        waiting.add(rows.shape[0]).copy_(rows)
        if last or waiting.rows.shape[0] >= wanted:
            yield from _split(waiting.rows, wanted, last)
            waiting = None


def _split(rows: Tensor, wanted: int, last: bool) -> Iterator[Rows]:
    """Yield rows in strips of `wanted` rows; the last strip has the rest."""
    pieces = torch.split(rows, wanted)
    for number, piece in enumerate(pieces, 1):
        yield piece, last and number == len(pieces)


def _regrouped_pixels(device: torch.device) -> int:
    return STRIP_PIXELS[device.type] // CHANNELS_GAINED if device.type in STRIP_PIXELS else REGROUPED_PIXELS


class RowBuffer:
    """Rows of an image that wait to be used, in one piece of memory that is used again for later rows.

    `left` and `right` columns of zeros stand beside them.
    """

    def __init__(self, first: Tensor, left: int = 0, right: int = 0, spare: int = 0) -> None:
        """Make an empty buffer for rows like `first`: with its width, channels, dtype and device.

        It has room for as many rows, and for `spare` more. With less room than is needed, it is made and copied again.
        """
        self._like, self._left, self._right = first.new_empty(0, *first.shape[1:]), left, right
        self._memory = self._zeros(first.shape[0] + spare)
        self._count = 0

    @property
    def rows(self) -> Tensor:
        """The rows that wait, `[height, left + width + right, channels]`: a view, valid until the next `add` or `discard`."""
        return self._memory[: self._count]

    def add(self, height: int) -> Tensor:
        """Add `height` rows and return them, `[height, width, channels]`, with undefined values for the caller to replace."""
        start, self._count = self._count, self._count + height
        if self._count > self._memory.shape[0]:
            memory = self._zeros(self._count)
            memory[:start] = self._memory[:start]
            self._memory = memory
        return self._memory[start : self._count, self._left : self._left + self._like.shape[1]]

    def discard(self, height: int) -> None:
        """Remove the first `height` rows. If no row is left, give the memory back."""
        rest = self.rows[height:].clone()
        self._count -= height
        if self._count == 0:
            self._memory = rest
        self._memory[: self._count] = rest

    def _zeros(self, height: int) -> Tensor:
        _, width, channels = self._like.shape
        return self._like.new_zeros(height, self._left + width + self._right, channels)
