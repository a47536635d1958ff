"""The latent space of a loaded VAE: the name of ComfyUI's class in `comfy.latent_formats` for the meaning of its latents."""

from __future__ import annotations

from typing import Any

from latent_encoder.comfy_runtime import ComfyRuntime, Vae
from latent_encoder.vae.families import Family


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
