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
from latent_encoder.geometry import Size

OomPolicy = Literal["fail", "tile"]

WAY_OUT = "; or set OOM_POLICY=tile to have it encoded in tiles, which gives a slightly different latent"


class WatchedEncode:
    """Encodes pictures of one size, `[…, height, width]`, and notices or refuses tiles of them."""

    def __init__(self, encode: Callable[..., Tensor], whole: Size, policy: OomPolicy) -> None:
        self._encode = encode
        self._whole = whole
        self._policy = policy
        self._inside = False
        self.tiled = False
        self.seen: Size | None = None
        """The size of the picture that was encoded as a whole; None before that."""

    def __call__(self, pixels: Tensor, *args: Any, **options: Any) -> Tensor:
        """The latent. Further arguments are the model's own.

        Raises:
            EncodingFailed: memory ran out, here or before, and the policy is `fail`.
            torch.OutOfMemoryError: memory ran out, the CPU's too, and the policy is `tile`: what ComfyUI waits for.
        """
        if self._inside:  # a model that encodes parts of a picture by itself does so for any picture
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
        """Note that ComfyUI encodes in tiles.

        Raises:
            EncodingFailed: the policy is `fail`.
        """
        if self._policy == "fail":
            raise self._failure()
        self.tiled = True

    def _failure(self) -> EncodingFailed:
        return EncodingFailed(f"Cannot encode a {self._whole} image: {OUT_OF_MEMORY}{WAY_OUT}")


@contextmanager
def watched(model: Any, encode: Callable[..., Tensor], whole: Size, policy: OomPolicy) -> Iterator[WatchedEncode]:
    """Let the model's `encode` be that function inside, watched; `whole` is the size of the picture that it will get.

    A model that tiles by itself has an `encode_tiled`, to which ComfyUI turns when memory runs out. It is watched too.
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
            del vars(model)[name]  # the class' own is back
        vars(model).update(before)
