"""An image as a stream of strips of rows, and the memory that such rows wait in."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Rows = tuple[Tensor, bool]
"""Some rows of a picture, `[height, width, channels]`, and whether they are its last."""


Stream = Iterator[Rows]


# How many pixels a strip has: on a CPU 6 MB of 96 float32 channels; a GPU wants fewer and larger pieces of work.
STRIP_PIXELS = {"cpu": 16 * 1024}


STRIP_PIXELS_ELSEWHERE = 1024 * 1024


def strips(pixels: Tensor, patch: int) -> Stream:
    """The rows of a picture `[colours, height, width]`; for Wan 2.2, of `patch` x `patch` pixels, side by side as channels."""
    colours, height, width = pixels.shape
    rows = max(1, _strip_pixels(pixels.device) // width // patch) * patch
    for start in range(0, height, rows):
        strip = pixels[:, start : start + rows]
        # Of a patch's numbers, the channel comes first, then the column, then the row.
        patches = strip.view(colours, -1, patch, width // patch, patch).permute(1, 3, 0, 4, 2)
        yield patches.flatten(2), start + rows >= height


def joined(stream: Stream) -> Tensor:
    return torch.cat([rows for rows, _ in stream])


def regrouped(stream: Stream) -> Stream:
    waiting: list[Tensor] = []
    for rows, last in stream:
        waiting.append(rows)
        height = sum(strip.shape[0] for strip in waiting)
        wanted = max(1, _strip_pixels(rows.device) // 4 // rows.shape[1])  # their pixels have four times the channels
        if last or height >= wanted:
            joined = torch.cat(waiting) if len(waiting) > 1 else rows
            waiting.clear()
            pieces = torch.split(joined, wanted)
            for number, piece in enumerate(pieces, 1):
                yield piece, last and number == len(pieces)


def _strip_pixels(device: torch.device) -> int:
    return STRIP_PIXELS.get(device.type, STRIP_PIXELS_ELSEWHERE)


class RowBuffer:
    """Rows of a picture that wait to be used, in one piece of memory that is used again and again.

    `left` and `right` columns of zeros stand beside them.
    """

    def __init__(self, first: Tensor, left: int = 0, right: int = 0) -> None:
        """An empty buffer for rows like `first`: of its width, channels, dtype and device."""
        self._like, self._left, self._right = first.new_empty(0, *first.shape[1:]), left, right
        self._memory = self._zeros(first.shape[0])
        self._count = 0

    @property
    def rows(self) -> Tensor:
        """What is there, `[height, left + width + right, channels]`."""
        return self._memory[: self._count]

    def add(self, height: int) -> Tensor:
        """So many further rows, `[height, width, channels]`, for the caller to write; what is in them is not defined."""
        start, self._count = self._count, self._count + height
        if self._count > self._memory.shape[0]:
            memory = self._zeros(self._count)
            memory[:start] = self._memory[:start]
            self._memory = memory
        return self._memory[start : self._count, self._left : self._left + self._like.shape[1]]

    def discard(self, height: int) -> None:
        """The first so many rows are not needed any more; without any row left, the memory is given back."""
        rest = self.rows[height:].clone()
        self._count -= height
        if self._count == 0:
            self._memory = rest
        self._memory[: self._count] = rest

    def _zeros(self, height: int) -> Tensor:
        _, width, channels = self._like.shape
        return self._like.new_zeros(height, self._left + width + self._right, channels)
