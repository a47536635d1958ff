"""ComfyUI's tiling when memory runs out: noticed, and refused or allowed by the policy.

When `VAEEncode` runs out of a GPU's memory, ComfyUI logs a line, encodes the image in overlapping tiles and blends them. That
gives a slightly different latent. So during a `VAEEncode` the model's `encode` is replaced by one that knows the size of the
image: anything smaller is a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from errors import OUT_OF_MEMORY, EncodingFailed, is_out_of_memory
from latent_encoder.geometry import Size

OomPolicy = Literal["fail", "tile"]
"""The setting OOM_POLICY: refuse an image that memory does not suffice for, or let ComfyUI encode it in tiles."""

ADVICE = "; or set OOM_POLICY=tile to have it encoded in tiles, which gives a slightly different latent"


class WatchedEncode:
    """A model's `encode` for images of one size, `[…, height, width]`, that notices or refuses tiles of them."""

    def __init__(self, encode: Callable[..., Tensor], whole: Size, policy: OomPolicy) -> None:
        self._encode = encode
        self._whole = whole
        self._policy = policy
        self._inside = False
        self.tiled = False
        """True if ComfyUI encoded in tiles."""
        self.seen: Size | None = None
        """The size of the image that was encoded as a whole; None before that."""

    def __call__(self, pixels: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return the latent of an image or a tile. Further arguments are the model's own.

        Raises:
            EncodingFailed: memory ran out, or ComfyUI passes a tile because it did; and the policy is `fail`.
            torch.OutOfMemoryError: memory ran out, a GPU's or the CPU's, and the policy is `tile`. ComfyUI then uses tiles.
        """
        if self._inside:  # a model that splits any image and calls its own `encode` for the parts: these are no tiles
            return self._encode(pixels, *args, **options)
        size = Size(width=pixels.shape[-1], height=pixels.shape[-2])
        if size.width < self._whole.width or size.height < self._whole.height:
            self.note_tiles()
        else:
            self.seen = size
        self._inside = True
        try:
            return self._encode(pixels, *args, **options)
        except (RuntimeError, MemoryError) as exc:
            if not is_out_of_memory(exc):
                raise
            if self._policy == "fail":
                raise self._failure() from exc
            raise torch.cuda.OutOfMemoryError(str(exc)) from exc
        finally:
            self._inside = False

    def note_tiles(self) -> None:
        """Record that ComfyUI encodes in tiles.

        Raises:
            EncodingFailed: the policy is `fail`.
        """
        if self._policy == "fail":
            raise self._failure()
        self.tiled = True

    def _failure(self) -> EncodingFailed:
        return EncodingFailed(f"Cannot encode a {self._whole} image: {OUT_OF_MEMORY}{ADVICE}")


@contextmanager
def watched(model: Any, encode: Callable[..., Tensor], whole: Size, policy: OomPolicy) -> Iterator[WatchedEncode]:
    """Replace the model's `encode` inside by `encode`, watched. `whole` is the size of the image that it will get.

    Some models have an `encode_tiled`, which ComfyUI calls when memory runs out. It is watched too.
    """
    watch = WatchedEncode(encode, whole, policy)
    replaced: dict[str, Any] = {"encode": watch}
    if callable(tiles := getattr(model, "encode_tiled", None)):

        def encode_tiled(*args: Any, **options: Any) -> Any:
            watch.note_tiles()
            return tiles(*args, **options)

        replaced["encode_tiled"] = encode_tiled
    before = {name: vars(model)[name] for name in replaced if name in vars(model)}
    vars(model).update(replaced)
    try:
        yield watch
    finally:
        for name in replaced:
            del vars(model)[name]  # uncovers the method of the class
        vars(model).update(before)
