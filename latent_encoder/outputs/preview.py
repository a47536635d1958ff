"""The preview: the latent as an image, one pixel for each cell, as ComfyUI shows it while it samples.

For most families ComfyUI knows the red, green and blue of each channel. These factors are for latents as the diffusion model
sees them. A VAE's latent becomes one when the family's mean and deviation, or its scaling, are applied. The colours of each
latent are stretched together: hues stay, and shapes are seen in a pale or dark image too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from latent_encoder.comfy_runtime import ComfyRuntime, LatentSpace, LatentSpaces
from latent_encoder.geometry import Box, cropped
from latent_encoder.outputs.encoded import Encoded
from latent_encoder.outputs.png import png_bytes
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.vae.loaded_vae import LoadedVae

log = get_logger("latent_encoder")

DARKEST = 0.01  # the part of an image's values that may become 0, and 1: single cells at edges would decide otherwise
MOST_STRETCH = 4.0  # the noise of an even area, 1 % of the range as a rule, stays under 5 %

DEVIATIONS_SHOWN = 3  # to either side of the middle grey: 99.7 % of normally distributed values are not clipped


def preview_png(runtime: ComfyRuntime, encoded: Encoded) -> bytes:
    """Return the preview of an encoded request as a PNG."""
    return preview_of(runtime, encoded.prepared.vae, encoded.image.latent, encoded.prepared.scaled, encoded.image.crop)


def preview_of(runtime: ComfyRuntime, vae: LoadedVae, latent: Tensor, scaled: Tensor, crop: Box) -> bytes:
    """Return a PNG of the part of the scaled image that the latent covers, with the latent as an image beside it."""
    shown = latent_image(runtime, latent, vae.latent_space)
    return png_bytes(preview_image(shown, scaled, crop, vae.cells.factor))


def latent_image(runtime: LatentSpaces, latent: Tensor, latent_space: str | None) -> Tensor:
    """Return a latent as an image: float32 `[1, height, width, 3]` in [0, 1], one pixel a cell (FLUX.2: four).

    `latent` is float32 `[1, channels, height, width]`, as the VAE gives it; values that are not finite count as 0.
    `latent_space` is the name of ComfyUI's class in `comfy.latent_formats`. If ComfyUI has no colours for it, the latent's own
    three principal components become the colours, and a warning is logged: shapes are right, colours are not.
    """
    latent = latent.nan_to_num(nan=0, posinf=0, neginf=0)
    known = runtime.latent_space(latent_space) if latent_space is not None else None
    if known is None or known.latent_rgb_factors is None or known.latent_channels != latent.shape[1]:
        log.warning("the preview has no true colours", latent_space=latent_space, channels=latent.shape[1])
        return _principal_components(latent)
    return stretched(comfyui_colours(latent, known))


def stretched(image: Tensor) -> Tensor:
    """Return an image whose values fill [0, 1], except for the lowest and the highest in a hundred, which are clipped.

    All colours get the same factor. It is `MOST_STRETCH` at most, so that an almost even image stays one and keeps its colour.
    """
    low, high = image.quantile(DARKEST).item(), image.quantile(1 - DARKEST).item()
    middle, share = (low + high) / 2, min((high - low) * MOST_STRETCH, 1)
    factor = 1 / max(high - low, 1 / MOST_STRETCH)
    return ((image - middle) * factor + share * 0.5 + (1 - share) * middle).clamp(0, 1)


def comfyui_colours(latent: Tensor, known: LatentSpace) -> Tensor:
    """Return the image by ComfyUI's own factors, as its `Latent2RGBPreviewer` makes it from a sampler's latents."""
    seen = known.process_in(latent.unsqueeze(2) if known.latent_dimensions == 3 else latent)
    if reshape := getattr(known, "latent_rgb_factors_reshape", None):  # older releases lack it
        seen = reshape(seen)
    if seen.ndim == 5:
        seen = seen[:, :, 0]
    bias = known.latent_rgb_factors_bias
    factors = torch.tensor(known.latent_rgb_factors).T
    colours = functional.linear(seen.movedim(1, -1), factors, torch.tensor(bias) if bias is not None else None)
    return ((colours + 1) / 2).clamp(0, 1)


def _principal_components(latent: Tensor) -> Tensor:
    """Show the three directions in which the cells differ most as red, green and blue (principal components, Pearson 1901)."""
    _, channels, height, width = latent.shape
    cells = latent[0].flatten(1).T.double()
    cells = cells - cells.mean(0)
    variances, directions = torch.linalg.eigh(cells.T @ cells / len(cells))  # the smallest first
    variances, directions = variances[-3:].flip(0), directions[:, -3:].flip(1)
    directions = torch.where(directions.sum(0) < 0, -directions, directions)  # fixes their sign, which is arbitrary
    deviations = variances.clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    values = cells @ directions / (2 * DEVIATIONS_SHOWN * deviations) + 0.5
    values = functional.pad(values, (0, max(0, 3 - channels)), value=0.5)
    return values.float().clamp(0, 1).reshape(1, height, width, 3)


def preview_image(latent: Tensor, scaled: Tensor | None, crop: Box | None, factor: int) -> Tensor:
    """Return the preview: the part of the scaled image that the latent covers, and right of it the latent's image, enlarged.

    All are float32 `[1, height, width, 3]` in [0, 1]; `latent` is the result of `latent_image`. Without a `crop` the latent
    covers all of the scaled image. Without a scaled image the latent's image stands alone, each pixel enlarged to `factor` a
    side.
    """
    if scaled is None:
        return _resized(latent, latent.shape[1] * factor, latent.shape[2] * factor)
    covered = cropped(scaled, crop) if crop is not None else scaled
    return torch.cat((covered, _resized(latent, covered.shape[1], covered.shape[2])), dim=2).clamp(0, 1)


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    resized = functional.interpolate(image.movedim(-1, 1), (height, width), mode="bicubic")
    return resized.clamp(0, 1).movedim(1, -1)
