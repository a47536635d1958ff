"""The size arithmetic of scaling and cropping, in whole pixels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width} x {self.height} px"

    @property
    def swapped(self) -> Size:
        """Size of the same image turned by 90 degrees."""
        return Size(self.height, self.width)

    @property
    def pixels(self) -> int:
        """Number of pixels."""
        return self.width * self.height


def size_of(images: Tensor) -> Size:
    """Return the size of images `[batch, height, width, channels]`."""
    return Size(width=images.shape[2], height=images.shape[1])


class Box(NamedTuple):
    """A rectangle in pixels as Pillow's `Image.crop` takes it: `right` and `lower` are the first ones outside."""

    left: int
    upper: int
    right: int
    lower: int

    @property
    def size(self) -> Size:
        return Size(self.right - self.left, self.lower - self.upper)


def scaled_size(original: Size, megapixels: float) -> Size:
    """Return the size that ImageScaleToTotalPixels aims at; one megapixel is 1024 * 1024 pixels.

    Both sides are multiplied by sqrt(int(megapixels * 1024 * 1024) / (width * height)) and rounded half to even. This is the
    formula of ComfyUI 0.3.75's `ImageScaleToTotalPixels.execute` in `comfy_extras/nodes_post_processing.py`. Later releases
    may differ by a pixel, so the result is only for error messages and estimates.
    """
    scale = math.sqrt(int(megapixels * 1024 * 1024) / (original.width * original.height))
    return Size(round(original.width * scale), round(original.height * scale))


def latent_crop(scaled: Size, factor: int) -> Box:
    """Return the part of the scaled image that the latent covers: the largest centred box with sides that `factor` divides.

    Of an odd remainder the larger half is cut off at the right or at the bottom, as by ComfyUI's `VAE.vae_encode_crop_pixels`
    in `comfy/sd.py`. `factor` is the VAE's spatial down-sampling factor (8 for most, 1 for `pixel_space`).
    """
    left, upper = (scaled.width % factor) // 2, (scaled.height % factor) // 2
    width, height = scaled.width // factor * factor, scaled.height // factor * factor
    return Box(left, upper, left + width, upper + height)


def covered(scaled: Size, seen: Size, latent: Size, factor: int) -> Box:
    """Return the part of the scaled image that the latent covers, by the sizes of the model's input `seen` and of its latent.

    ComfyUI cuts the image to the size `seen` around its centre and gives that part to the VAE's model. A cell of the latent
    covers `factor` pixels a side. If `seen` is no multiple of `factor`, the model adds or drops less than a cell at the right
    and at the bottom.

    Raises:
        ValueError: the size of the latent differs from that of `seen` by a cell or more.
    """
    for pixels, cells in zip(seen, latent, strict=True):
        if abs(cells * factor - pixels) >= factor:
            raise ValueError(f"{cells} cells of {factor} pixels do not fit {pixels} pixels")
    left, upper = (scaled.width - seen.width) // 2, (scaled.height - seen.height) // 2
    return Box(left, upper, left + seen.width, upper + seen.height)


def factor_of(seen: Size, latent: Size) -> int | None:
    """Return the pixels that a side of a latent's cell covers, a power of two; None if not exactly one fits both sides."""
    fitting = [
        factor
        for factor in (1, 2, 4, 8, 16, 32, 64)
        if all(abs(cells * factor - pixels) < factor for pixels, cells in zip(seen, latent, strict=True))
    ]
    return fitting[0] if len(fitting) == 1 else None


def cropped(images: Tensor, box: Box) -> Tensor:
    """Return that part of each of the images `[batch, height, width, channels]`, as a view."""
    return images[:, box.upper : box.lower, box.left : box.right]
