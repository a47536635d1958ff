"""The latent space of a loaded VAE: ComfyUI's name for the meaning of its latents."""

from __future__ import annotations

from typing import Any

from latent_encoder.comfy_runtime import ComfyRuntime, Vae
from latent_encoder.vae.families import Family


def latent_space_of(family: Family | None, vae: Vae, runtime: ComfyRuntime) -> str | None:
    """Return the name of ComfyUI's class for a VAE's latents; None where it is not known, or this release has no such class.

    A release that is older than a family may load its VAE for another one. For example, 0.3.52 takes FLUX.2's for Stable
    Diffusion's, and gives 32 channels instead of 128.
    """
    space = _latent_space(family, vae.first_stage_model)
    return space if space is not None and runtime.latent_format(space) is not None else None


def _latent_space(family: Family | None, model: Any) -> str | None:
    """Return what the family says, and ComfyUI for the 16-channel TAEHVs.

    Those for HunyuanVideo and for Wan 2.1 have the same tensors. ComfyUI takes one in float16 for HunyuanVideo's, whatever its
    name, and scales its latents so. Where the name says otherwise, the latents are of neither model.
    """
    if family is None or type(model).__name__ != "TAEHV" or model.latent_channels != 16:
        return family.latent_space if family is not None else None
    taken_for = "Wan21" if model.latent_format is None else str(model.latent_format.__name__)
    return taken_for if family.latent_space in (None, taken_for) else None
