"""A VAE that is ready to encode, and the encoding of one image with it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from latent_encoder.comfy_runtime import ComfyRuntime, Vae
from latent_encoder.geometry import Size, latent_crop
from latent_encoder.vae.single_frame import SingleFrameEncoder
from latent_encoder.vae.tiling import OomPolicy, watched
from models import EncoderKind

ENCODING = threading.Lock()
"""Held while a VAE encodes or decodes: a model's `encode` is replaced meanwhile, and ComfyUI moves models between devices."""


class Encoding(NamedTuple):
    """What VAEEncode gave of an image, and how."""

    samples: torch.Tensor
    """In the VAE's own number of dimensions, float32 on the CPU."""
    tiled: bool
    """Whether the image was encoded in tiles."""
    seen: Size
    """The size of the image that the model was given: ComfyUI cuts most images a little."""
    encoder: EncoderKind
    """What ran."""


class Cells(NamedTuple):
    """What a VAE's latents consist of, found out by a trial."""

    factor: int
    """How many pixels a side of one cell covers: 8 for most VAEs, 1 for `pixel_space`. ComfyUI states it wrong for a few."""
    channels: int
    frames: bool
    """Whether latents have a dimension for frames, as those of VAEs for video do."""


@dataclass(frozen=True)
class LoadedVae:
    """A VAE ready to encode."""

    name: str
    vae: Vae
    sha256: str | None
    """Of its file's bytes; of the encoder's and the decoder's one after the other for a TAESD pair; None without a file."""
    single_frame: SingleFrameEncoder | None
    """What encodes in place of the model's own `encode`; None where nothing does."""
    latent_space: str | None
    """ComfyUI's name for what its latents mean; None where its family is not known."""
    cells: Cells

    @property
    def encoder(self) -> EncoderKind:
        return _kind(self.single_frame)

    def encode(self, runtime: ComfyRuntime, pixels: torch.Tensor, oom_policy: OomPolicy) -> Encoding:
        """Encode an image `[1, height, width, 3]` with VAEEncode. Threads wait for each other here.

        Raises:
            EncodingFailed: memory ran out, and the policy is `fail`.
        """
        if self.single_frame is not None and pixels.shape[0] > 1:
            # Several frames are a matter for ComfyUI's own encoder, with all its weights.
            return encode_with(runtime, runtime.load_vae(self.name), None, pixels, oom_policy)
        return encode_with(runtime, self.vae, self.single_frame, pixels, oom_policy)

    def decode(self, runtime: ComfyRuntime, latent: torch.Tensor) -> torch.Tensor:
        """The image that VAEDecode gives of a latent `[1, channels, height, width]`; only where ROUNDTRIP is set."""
        with ENCODING:
            return runtime.decode(self.vae, latent.unsqueeze(2) if self.cells.frames else latent)

    @property
    def dtype(self) -> str:
        return str(self.vae.vae_dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        return str(self.vae.device)


def encode_with(
    runtime: ComfyRuntime,
    vae: Vae,
    single_frame: SingleFrameEncoder | None,
    pixels: torch.Tensor,
    oom_policy: OomPolicy,
) -> Encoding:
    size = Size(width=pixels.shape[2], height=pixels.shape[1])
    whole = latent_crop(size, int(vae.spacial_compression_encode())).size if getattr(vae, "crop_input", True) else size
    model: Any = vae.first_stage_model
    with ENCODING, watched(model, single_frame or model.encode, whole, oom_policy) as watch:
        samples = runtime.encode(vae, pixels)
    return Encoding(samples, watch.tiled, watch.seen or whole, _kind(single_frame))


def _kind(single_frame: SingleFrameEncoder | None) -> EncoderKind:
    return "single-frame" if single_frame is not None else "stock"
