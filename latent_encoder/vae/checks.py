"""What a VAE's header and ComfyUI's object tell of it: whether it encodes images, and what its latents mean."""

from __future__ import annotations

from typing import Any

import torch

from latent_encoder.comfy_runtime import ComfyRuntime, Vae
from latent_encoder.vae.families import Family

STEREO = 2

# VAELoader adds the factor and the shift of the other TAESD models; FLUX.2's latents need none, so the model's 1 and 0 hold.
TAEF2_DEFAULTS = ("vae_scale", "vae_shift")


def no_images(vae: Vae) -> str | None:
    """Return why a VAE that ComfyUI has loaded encodes no images, by ComfyUI's own attributes; None where it does.

    It catches VAEs of no known family. For some of those for audio ComfyUI states latents of two dimensions, as for images.
    """
    if vae.latent_dim not in (2, 3):
        return f"it does not encode images, its latents have {vae.latent_dim} dimension(s)"
    if getattr(vae, "extra_1d_channel", None) is not None or getattr(vae, "output_channels", None) == STEREO:
        return "it does not encode images, it is a VAE for audio"
    if not hasattr(vae.first_stage_model, "encode"):
        return "it does not encode images, it only decodes"
    return None


def with_defaults(model: torch.nn.Module) -> tuple[str, ...]:
    """Return the tensors that a file may lack, since the model has a value for them that is right."""
    encoder = getattr(model, "taesd_encoder", None)
    return TAEF2_DEFAULTS if type(encoder).__name__ == "EncoderFlux2" else ()


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
