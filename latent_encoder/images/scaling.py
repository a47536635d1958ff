"""Scaling an image with ImageScaleToTotalPixels."""

from __future__ import annotations

import torch

from errors import ScalingFailed, translated
from latent_encoder.comfy_runtime import ComfyRuntime
from latent_encoder.geometry import scaled_size, size_of
from models import EncodeRequest

COMFYUI_METHODS = {"nearest": "nearest-exact"}
"""ComfyUI's names of the upscale methods that the specification names differently."""


def scale_image(runtime: ComfyRuntime, image: torch.Tensor, request: EncodeRequest, factor: int) -> torch.Tensor:
    """Scale an image `[1, height, width, 3]` to the request's megapixels; both sides get at least `factor` pixels.

    With an exact fit, both sides are multiples of `factor`, the pixels that a side of the VAE's cell covers.

    Raises:
        ScalingFailed: the node fails, or a side would be shorter.
    """
    original = size_of(image)
    goal = f"the {original} image to {request.megapixels} megapixels ({scaled_size(original, request.megapixels)})"
    method = COMFYUI_METHODS.get(request.upscale_method, request.upscale_method)
    steps = factor if request.fit == "exact" else None
    with translated(ScalingFailed, f"Cannot scale {goal}"):
        scaled = runtime.scale(image, method, request.megapixels, steps)
    if min(size_of(scaled)) < factor:
        raise ScalingFailed(
            f"Cannot encode after scaling {goal}: the VAE needs at least {factor} px a side. "
            "Ask for more megapixels, or crop the image."
        )
    return scaled
