"""A latent as a picture: what ComfyUI shows while it samples, one small pixel for each of the latent's cells.

ComfyUI knows for most families how much red, green and blue each channel stands for. They hold for latents as the diffusion
model sees them, which is not how a VAE gives them: the family's mean and deviation, or its scaling, come in between.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from latent_encoder.comfy_runtime import ComfyRuntime, LatentSpace
from latent_encoder.geometry import Box, cropped
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder")

DEVIATIONS_SHOWN = 3  # of a principal component, to either side of the middle grey


def latent_picture(runtime: ComfyRuntime, latent: Tensor, latent_space: str | None) -> Tensor:
    """The picture of a latent: float32 `[1, height, width, 3]` in [0, 1], one pixel a cell (FLUX.2: four).

    `latent` is float32 `[1, channels, height, width]`, as the VAE gives it; what is not finite in it counts as 0.
    `latent_space` is the name of ComfyUI's class in `comfy.latent_formats`. Where ComfyUI has no colours for it, they are the
    latent's own three principal components, and the log warns: such a picture shows what is where, but in no true colours.
    """
    latent = latent.nan_to_num(nan=0, posinf=0, neginf=0)
    known = runtime.latent_format(latent_space) if latent_space is not None else None
    if known is None or known.latent_rgb_factors is None or known.latent_channels != latent.shape[1]:
        log.warning("the preview has no true colours", latent_space=latent_space, channels=latent.shape[1])
        return _principal_components(latent)
    return _in_colours(latent, known)


def _in_colours(latent: Tensor, known: LatentSpace) -> Tensor:
    """The picture by ComfyUI's own factors, as its `Latent2RGBPreviewer` makes it of a sampler's latents."""
    seen = known.process_in(latent.unsqueeze(2) if known.latent_dimensions == 3 else latent)
    if reshape := getattr(known, "latent_rgb_factors_reshape", None):  # older releases know none
        seen = reshape(seen)
    if seen.ndim == 5:
        seen = seen[:, :, 0]
    bias = known.latent_rgb_factors_bias
    factors = torch.tensor(known.latent_rgb_factors).T
    colours = functional.linear(seen.movedim(1, -1), factors, torch.tensor(bias) if bias is not None else None)
    return ((colours + 1) / 2).clamp(0, 1)


def _principal_components(latent: Tensor) -> Tensor:
    """The three directions in which the cells differ most, as red, green and blue (principal components, Pearson 1901)."""
    _, channels, height, width = latent.shape
    cells = latent[0].flatten(1).T.double()
    cells = cells - cells.mean(0)
    variances, directions = torch.linalg.eigh(cells.T @ cells / len(cells))  # the smallest first
    variances, directions = variances[-3:].flip(0), directions[:, -3:].flip(1)
    directions = torch.where(directions.sum(0) < 0, -directions, directions)  # their sign is arbitrary otherwise
    deviations = variances.clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    values = cells @ directions / (2 * DEVIATIONS_SHOWN * deviations) + 0.5
    values = functional.pad(values, (0, max(0, 3 - channels)), value=0.5)
    return values.float().clamp(0, 1).reshape(1, height, width, 3)


def preview_image(picture: Tensor, scaled: Tensor | None, crop: Box | None, factor: int) -> Tensor:
    """What the latent covers of the scaled image at the left, and its picture in that size at the right; in [0, 1].

    `scaled` is `[1, height, width, 3]`, and all of it is covered where there is no `crop`. Where there is no scaled image, the
    picture stands alone, and each of its pixels becomes `factor` a side.
    """
    if scaled is None:
        return _resized(picture, picture.shape[1] * factor, picture.shape[2] * factor)
    covered = cropped(scaled, crop) if crop is not None else scaled
    return torch.cat((covered, _resized(picture, covered.shape[1], covered.shape[2])), dim=2).clamp(0, 1)


def _resized(picture: Tensor, height: int, width: int) -> Tensor:
    resized = functional.interpolate(picture.movedim(-1, 1), (height, width), mode="bicubic")
    return resized.clamp(0, 1).movedim(1, -1)
