"""The latent of one image: VAEEncode's output, checked and brought to one shape, and the part of the image that it covers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from errors import EncodingFailed, translated
from latent_encoder.comfy_runtime import ComfyRuntime
from latent_encoder.geometry import Box, Size, covered, size_of
from latent_encoder.vae.loaded_vae import LoadedVae
from latent_encoder.vae.tiling import OomPolicy
from models import EncoderKind


class EncodedImage(NamedTuple):
    """The latent of an image."""

    latent: torch.Tensor
    """Contiguous float32 `[1, channels, height, width]` on the CPU."""
    crop: Box
    """The part of the image that the latent covers."""
    tiled: bool
    """True if the image was encoded in tiles because memory ran out."""
    encoder: EncoderKind


def encode_image(runtime: ComfyRuntime, vae: LoadedVae, image: torch.Tensor, oom_policy: OomPolicy) -> EncodedImage:
    """Encode an image `[1, height, width, 3]` with VAEEncode.

    Raises:
        EncodingFailed: VAEEncode fails, memory ran out, or the result is not the finite latent of one image of that size.
    """
    size, factor = size_of(image), vae.cells.factor
    ragged = any(side % factor for side in size)
    advice = f" (its sides are no multiples of {factor}; fit=exact makes them so if this ComfyUI can)" if ragged else ""
    with translated(EncodingFailed, f"VAE {vae.name} failed to encode a {size} image{advice}"):
        encoding = vae.encode(runtime, image, oom_policy)
    samples = _checked(encoding.samples, vae)
    with translated(EncodingFailed, f"The part of a {size} image that the latent of VAE {vae.name} covers is unknown"):
        crop = covered(size, encoding.seen, Size(width=samples.shape[3], height=samples.shape[2]), factor)
    latent = samples.to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
    return EncodedImage(latent, crop, encoding.tiled, encoding.encoder)


def _checked(samples: torch.Tensor, vae: LoadedVae) -> torch.Tensor:
    """Return the samples as `[1, channels, height, width]`, without the dimension for frames that VAEs for video add."""
    if samples.ndim == 5 and samples.shape[2] == 1:
        samples = samples.squeeze(2)
    if samples.ndim != 4:
        raise EncodingFailed(f"VAE {vae.name} gave a tensor of shape {list(samples.shape)}, not the latent of one image.")
    if not torch.isfinite(samples).all():
        raise EncodingFailed(f"VAE {vae.name} gave values that are not finite in {vae.dtype}; try VAE_PRECISION=fp32.")
    return samples
