"""A VAE that is ready: how it encodes one image and decodes one latent."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from latent_encoder.comfy_runtime import ComfyRuntime, Vae
from latent_encoder.geometry import Size, latent_crop
from latent_encoder.vae.gpu import uploaded
from latent_encoder.vae.single_frame import SingleFrameEncoder
from latent_encoder.vae.tiling import OomPolicy, watched
from models import EncoderKind

ENCODING = threading.Lock()
"""Held while a VAE encodes or decodes: a model's `encode` is replaced meanwhile, and ComfyUI moves models between devices."""


class Encoding(NamedTuple):
    """The result of VAEEncode for one image, and how it was computed."""

    samples: torch.Tensor
    """Float32 on the CPU, with the VAE's own number of dimensions: `[1, channels, height, width]`, or 5 with frames."""
    tiled: bool
    """True if the image was encoded in tiles."""
    seen: Size
    """The size of the image that the model was given. ComfyUI crops most images to multiples of the VAE's factor first."""
    encoder: EncoderKind
    """The encoder that ran."""


class Cells(NamedTuple):
    """The grid of a VAE's latents, measured by encoding a small image."""

    factor: int
    """Pixels along one side of a cell: 8 for most VAEs, 1 for `pixel_space`. ComfyUI's own figure is wrong for a few VAEs."""
    channels: int
    frames: bool
    """True if latents have a dimension for frames, `[1, channels, frames, height, width]`, as VAEs for video make them."""


@dataclass(frozen=True)
class LoadedVae:
    """A VAE ready to encode."""

    name: str
    vae: Vae
    load: Callable[[], Vae]
    """A function that loads it again, with all of its weights."""
    sha256: str | None
    """SHA-256 of its file, in hexadecimal; for a TAESD pair, of the encoder's bytes followed by the decoder's. None if it has
    no file."""
    single_frame: SingleFrameEncoder | None
    """The encoder that takes the place of the model's own `encode`; None if the model keeps it."""
    encoder_reason: str
    """The reason for that choice, for people."""
    latent_space: str | None
    """The name of ComfyUI's class in `comfy.latent_formats` for its latents; None if its family is unknown."""
    cells: Cells

    @property
    def encoder(self) -> EncoderKind:
        """The name of its encoder in the metadata."""
        return _kind(self.single_frame)

    @property
    def compiled(self) -> bool:
        """True if its encoder is compiled, which changes the order of additions."""
        return self.single_frame is not None and self.single_frame.compiled

    def encode(self, runtime: ComfyRuntime, pixels: torch.Tensor, oom_policy: OomPolicy) -> Encoding:
        """Encode an image, float32 `[1, height, width, 3]` in [0, 1], with VAEEncode. One thread at a time encodes.

        Several images at once are the frames of a video to ComfyUI. They get a fresh VAE with all of its weights, because the
        single-frame encoder takes one frame and its model has lost the weights for more.

        Raises:
            EncodingFailed: memory ran out, and the policy is `fail`.
        """
        if self.single_frame is not None and pixels.shape[0] > 1:
            return encode_with(runtime, self.load(), None, pixels, oom_policy)
        on_device = uploaded(pixels, self.vae.device) if self.single_frame is not None else pixels
        return encode_with(runtime, self.vae, self.single_frame, on_device, oom_policy)

    def decode(self, runtime: ComfyRuntime, latent: torch.Tensor) -> torch.Tensor:
        """Return the image that VAEDecode makes of a latent `[1, channels, height, width]`: `[1, height, width, 3]`.

        It needs a VAE that was loaded with ROUNDTRIP set; others have lost their decoder's weights.
        """
        with ENCODING:
            return runtime.decode(self.vae, latent.unsqueeze(2) if self.cells.frames else latent)

    @property
    def dtype(self) -> str:
        """The dtype of its weights, for example `float32`."""
        return str(self.vae.vae_dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        """The device that it encodes on, for example `cuda:0`."""
        return str(self.vae.device)


def encode_with(
    runtime: ComfyRuntime,
    vae: Vae,
    single_frame: SingleFrameEncoder | None,
    pixels: torch.Tensor,
    oom_policy: OomPolicy,
) -> Encoding:
    """Encode `pixels` `[frames, height, width, 3]` with VAEEncode, which calls `single_frame` if there is one.

    Raises:
        EncodingFailed: memory ran out, and the policy is `fail`.
    """
    size = Size(width=pixels.shape[2], height=pixels.shape[1])
    whole = latent_crop(size, int(vae.spacial_compression_encode())).size if getattr(vae, "crop_input", True) else size
    model: Any = vae.first_stage_model
    encode = model.encode if single_frame is None else partial(single_frame, free=True)
    with ENCODING, watched(model, encode, whole, oom_policy) as watch:
        samples = runtime.encode(vae, pixels)
    return Encoding(samples, watch.tiled, watch.seen or whole, _kind(single_frame))


def _kind(single_frame: SingleFrameEncoder | None) -> EncoderKind:
    return "single-frame" if single_frame is not None else "stock"
