"""Transparency: the part of an image that it hides, and the image laid over a colour.

LoadImage's own mask decides if it has one: it belongs to LoadImage's pixels, turned as they are. LoadImage of ComfyUI 0.20 and
older gives none for a PNG with a transparent colour, so that is read from the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from latent_encoder.comfy_runtime import ComfyRuntime
from latent_encoder.images.features import Orientation, Transparency
from latent_encoder.images.png_metadata import DEPTH, chunks
from latent_encoder.images.source import SourceImage
from models import Alpha

COLOURS: Mapping[Alpha, float] = {"black": 0.0, "white": 1.0, "grey": 0.5}
"""The value of each of the three samples of a colour. Grey is the middle of the range, 127.5 of 255, which a VAE gets as 0."""

HIDING = 1 / 256
"""The least value of a mask that hides something. It lies between an alpha of 254/255 and one of 0xFF00/0xFFFF: an alpha of 16
bits hides something if its upper 8 bits do, because LoadImage keeps these alone in many releases."""


def hidden_part(
    runtime: ComfyRuntime, source: SourceImage, pixels: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Return how much of each pixel is hidden, float32 `[1, height, width]` in [0, 1]; None if the image is opaque.

    `pixels` and `mask` are LoadImage's.
    """
    transparency = next((feature for feature in source.features if isinstance(feature, Transparency)), None)
    if transparency is None:
        return None
    fits = mask is not None and mask.shape[-2:] == pixels.shape[1:3]
    if not fits or (transparency.is_colour and not _hides(mask)):  # an empty mask is one of 64 x 64 pixels
        mask = _mask_of_file(runtime, source)
    return mask[:1] if _hides(mask) and mask is not None else None


def laid_over(pixels: torch.Tensor, hidden: torch.Tensor, alpha: Alpha) -> torch.Tensor:
    """Return the image over a colour, as ComfyUI's ImageCompositeMasked has it: `pixels * (1 - hidden) + colour * hidden`.

    The values are those of the file, without a change of gamma, and are not rounded.
    """
    share = hidden.unsqueeze(-1)
    return (pixels * (1 - share)).add_(COLOURS[alpha] * share)


def _hides(mask: torch.Tensor | None) -> bool:
    return mask is not None and bool(mask.amax() >= HIDING)


def _mask_of_file(runtime: ComfyRuntime, source: SourceImage) -> torch.Tensor:
    """Return the mask in the file, loaded as a grey image with the file's orientation: LoadImage turns both the same way."""
    mask = _transparent(source.data)
    orientation = next((feature for feature in source.features if isinstance(feature, Orientation)), None)
    file = BytesIO()
    mask.save(file, "PNG", compress_level=1, **(orientation.metadata() if orientation is not None else {}))
    return runtime.load_image(file.getvalue(), ".png")[..., 0]


def _transparent(data: bytes) -> Image.Image:
    """Return the mask of a PNG, 255 where it is transparent."""
    with Image.open(BytesIO(data)) as image:
        if image.mode in ("RGBA", "LA", "P"):
            return image.convert("RGBA").getchannel("A").point(lambda alpha: 255 - alpha)
    samples, colour = _samples(data), _colour(data)
    return Image.fromarray(np.where((samples == colour).all(-1), np.uint8(255), np.uint8(0)))


def _colour(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    """Return the samples of the transparent colour. Of a depth below 16 bits, the lower bits count."""
    content = next(content for kind, content in chunks(data) if kind == b"tRNS")
    samples = np.frombuffer(content[: len(content) // 2 * 2], ">u2").astype(np.uint16)
    return samples & np.uint16((1 << data[DEPTH]) - 1)


def _samples(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    """Return the samples as they are stored, `[height, width, 1 or 3]`. Pillow scales shallow ones, and cuts deep colours."""
    depth = data[DEPTH]
    with Image.open(BytesIO(data)) as image:
        if image.mode == "RGB" and depth == 16:  # bits
            return _decoded(data, "RGB;16B") << np.uint16(8) | _decoded(data, "RGB;16L")
        samples = np.asarray(image.convert("L") if image.mode == "1" else image)
    step = 1 if depth >= 8 else 255 // ((1 << depth) - 1)
    return np.atleast_3d(samples).astype(np.uint16) // np.uint16(step)


def _decoded(data: bytes, raw_mode: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    """Return the upper bytes of 16-bit colours, or the lower ones if Pillow is told the other byte order."""
    with Image.open(BytesIO(data)) as image:
        image.tile = [tile._replace(args=raw_mode) for tile in image.tile]
        return np.asarray(image).astype(np.uint16)
