"""ComfyUI's way out where a picture does not fit into memory, noticed and, if wanted, allowed.

When `VAEEncode` runs out of a GPU's memory, ComfyUI logs a line, encodes the picture in overlapping tiles and blends them,
which gives a slightly different latent. So for the length of a `VAEEncode`, the model's `encode` is one that knows how large
the picture is: whatever is smaller is a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from errors import OUT_OF_MEMORY, EncodingFailed, is_out_of_memory
from geometry import Size

OomPolicy = Literal["fail", "tile"]

WAY_OUT = "; or set OOM_POLICY=tile to have it encoded in tiles, which gives a slightly different latent"


class WatchedEncode:
    """Encodes pictures of one size, `[…, height, width]`, and notices or refuses tiles of them."""

    def __init__(self, encode: Callable[[Tensor], Tensor], whole: Size, policy: OomPolicy) -> None:
        self._encode = encode
        self._whole = whole
        self._policy = policy
        self.tiled = False

    def __call__(self, pixels: Tensor) -> Tensor:
        """The latent.

        Raises:
            EncodingFailed: memory ran out, here or before, and the policy is `fail`.
            torch.OutOfMemoryError: memory ran out, the CPU's too, and the policy is `tile`: what ComfyUI waits for.
        """
        height, width = pixels.shape[-2:]
        if width < self._whole.width or height < self._whole.height:
            if self._policy == "fail":
                raise self._failure()
            self.tiled = True
        try:
            return self._encode(pixels)
        except (RuntimeError, MemoryError) as exc:
            if not is_out_of_memory(exc):
                raise
            if self._policy == "fail":
                raise self._failure() from exc
            raise torch.cuda.OutOfMemoryError(str(exc)) from exc

    def _failure(self) -> EncodingFailed:
        return EncodingFailed(f"Cannot encode a {self._whole} image: {OUT_OF_MEMORY}{WAY_OUT}")


@contextmanager
def watched(model: Any, encode: Callable[[Tensor], Tensor], whole: Size, policy: OomPolicy) -> Iterator[WatchedEncode]:
    """Let the model's `encode` be that function inside, watched."""
    before = vars(model).get("encode")
    model.encode = watch = WatchedEncode(encode, whole, policy)
    try:
        yield watch
    finally:
        if before is None:
            del model.encode  # the class' own is back
        else:
            model.encode = before
