"""The latent space of a loaded VAE: the name of ComfyUI's class in `comfy.latent_formats`, and its mean and deviation."""

from __future__ import annotations

from typing import Any

import torch

from latent_encoder.comfy_runtime import ComfyRuntime, LatentSpace, Vae
from latent_encoder.vae.families import Family
from models import LatentStatistics

SIDE = 3  # cells; enough to notice a class that moves numbers from one cell to another


def latent_space_of(family: Family | None, vae: Vae, runtime: ComfyRuntime) -> str | None:
    """Return the name of ComfyUI's class for a VAE's latents; None if it is unknown or this release has no such class.

    Without the class the latents may mean something else: a release older than a family may load its VAE as one of another
    family. For example, 0.3.52 loads FLUX.2's VAE as Stable Diffusion's and makes latents with 32 channels instead of 128.
    """
    space = _latent_space(family, vae.first_stage_model)
    return space if space is not None and runtime.latent_space(space) is not None else None


def _latent_space(family: Family | None, model: Any) -> str | None:
    """Return the family's latent space, except for TAEHVs with 16 channels: the one that ComfyUI chose for their latents.

    The TAEHVs for HunyuanVideo and for Wan 2.1 have the same tensors. ComfyUI takes a file in float16 for HunyuanVideo's,
    regardless of its name, and scales the latents accordingly. If the name means Wan 2.1, the latents fit neither model: None.
    """
    if family is None or type(model).__name__ != "TAEHV" or model.latent_channels != 16:
        return family.latent_space if family is not None else None
    taken_for = "Wan21" if model.latent_format is None else str(model.latent_format.__name__)
    return taken_for if family.latent_space in (None, taken_for) else None


def statistics_of(space: LatentSpace, channels: int) -> LatentStatistics | None:
    """Return the mean and the deviation by which `process_in` scales a latent of that many channels: `(latent - mean) / std`.

    They are read from `process_in` itself: it is called with zeros and with ones, in float64, and the results are rounded to
    float32, which is the precision of ComfyUI's own numbers. None if it does something else than scale and shift each channel.
    For example, that of HunyuanImage 2.1's refiner doubles the channels.
    """
    if channels != space.latent_channels:
        return None
    shape = (1, channels, 1, SIDE, SIDE) if space.latent_dimensions == 3 else (1, channels, SIDE, SIDE)
    zeros, ones = torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
    shift = space.process_in(zeros)
    scale = space.process_in(ones) - shift
    if not _scales_and_shifts(space, scale, shift):
        return None
    scale, shift = (values.flatten(2)[0, :, 0] for values in (scale, shift))  # the first cell's: all cells have the same
    return LatentStatistics(mean=_float32(-shift / scale), std=_float32(1 / scale))


def _scales_and_shifts(space: LatentSpace, scale: torch.Tensor, shift: torch.Tensor) -> bool:
    """Return whether `process_in` multiplies each channel by its `scale`, which is not 0, and adds its `shift`."""
    latent = torch.linspace(-2, 2, scale.numel(), dtype=torch.float64).reshape(scale.shape)
    first = (slice(None), slice(None), *(slice(1) for _ in scale.shape[2:]))
    expected = latent * scale[first] + shift[first]
    seen = space.process_in(latent)
    return bool((scale != 0).all()) and seen.shape == latent.shape and torch.allclose(seen, expected, rtol=1e-9, atol=1e-9)


def _float32(values: torch.Tensor) -> tuple[float, ...]:
    """Return the numbers rounded to float32, each as the shortest decimal that gives it: 0.7571, not 0.7570999860763550."""
    return tuple(float(str(value)) + 0.0 for value in values.float().numpy())  # + 0.0 makes a 0 of a -0
