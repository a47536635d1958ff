"""The images of a latent: those beside it, and the one that ComfyUI's colour factors make of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Literal

import torch

from config import Settings
from errors import EncodingFailed, ImageInvalid, ImageNotFound, SetupError
from latent_encoder.access import ANYWHERE
from latent_encoder.comfy_runtime import LatentSpaces, imported_latent_spaces, load_runtime
from latent_encoder.geometry import Box, Size, latent_crop
from latent_encoder.images.source import ImageLimits, read_image
from latent_encoder.inspection.findings import Inspection
from latent_encoder.outputs.png import pixels_of, png_bytes
from latent_encoder.outputs.preview import latent_image, preview_image

ImageName = Literal["scaled_image", "preview", "roundtrip"]

USUAL_FACTOR = 8
"""Pixels of a side for each cell of the latent, if neither metadata nor an image shows it; most VAEs have this factor."""


class Painter:
    """The maker of images of latents. The first image loads ComfyUI; if that fails, there are no images."""

    def __init__(self, settings: Settings, warn: Callable[[str], None], *, beside_encodes: bool = False) -> None:
        """With `beside_encodes`, a ComfyUI that other threads have loaded and use is taken as it is."""
        self._settings = settings
        self._beside_encodes = beside_encodes
        # A preview has two images beside each other.
        self._limits = ImageLimits(ANYWHERE, 2 * settings.max_image_bytes, 2 * settings.max_image_pixels)
        self._warn = warn
        # The image of the current file is needed up to three times: for the preview, the page and the drawing.
        self.image = lru_cache(maxsize=1)(self._image)

    def whole(self, inspection: Inspection, name: ImageName) -> bytes | None:
        """Return the bytes of an image file; None if it is missing, damaged, or not the one that the metadata names."""
        if inspection.state_of(name) == "differs":
            return None
        try:
            return read_image(str(inspection.copies.here(getattr(inspection.files, name))), self._limits).data
        except (OSError, ImageNotFound, ImageInvalid, EncodingFailed):
            return None

    def preview(self, inspection: Inspection) -> bytes | None:
        """Return the preview as a PNG: the latent at the right, and the scaled image at the left if there is one that fits."""
        image = self.image(inspection)
        if image is None:
            return None
        scaled = self._scaled_image(inspection)
        crop = fitting_crop(inspection, Size(scaled.shape[2], scaled.shape[1])) if scaled is not None else None
        return png_bytes(preview_image(image, scaled if crop else None, crop, USUAL_FACTOR))

    def _image(self, inspection: Inspection) -> torch.Tensor | None:
        """Return the first latent as an image `[1, height, width, 3]`, a pixel for each cell; None without ComfyUI."""
        if self._runtime is None:
            return None
        return latent_image(self._runtime, inspection.latent[:1].float(), inspection.space.name)

    @cached_property
    def _runtime(self) -> LatentSpaces | None:
        if self._beside_encodes and (imported := imported_latent_spaces()):
            return imported
        try:
            return load_runtime(self._settings.comfyui_path, self._settings.device, self._settings.vae_precision)
        except SetupError as exc:
            self._warn(f"No images of latents, which need ComfyUI's colours. {exc}")
            return None

    def _scaled_image(self, inspection: Inspection) -> torch.Tensor | None:
        data = self.whole(inspection, "scaled_image")
        return None if data is None else pixels_of(data)


def fitting_crop(inspection: Inspection, scaled: Size) -> Box | None:
    """Return the part of a scaled image that the latent covers; None if the image belongs to another latent."""
    metadata = inspection.metadata
    if metadata is not None and metadata.latent_shape == tuple(inspection.latent.shape):
        fits = metadata.scaled_image_shape[:2] == (scaled.height, scaled.width)
        return Box(*metadata.crop) if fits else None
    height, width = inspection.latent.shape[-2:]
    factor = _factor(scaled.width, width)
    crop = latent_crop(scaled, factor)
    return crop if crop.size == Size(width * factor, height * factor) else None


def _factor(pixels: int, cells: int) -> int:
    """Return the VAE's factor: the largest power of two with which the cells of a side do not exceed its pixels."""
    return 1 << max(pixels // cells, 1).bit_length() - 1
