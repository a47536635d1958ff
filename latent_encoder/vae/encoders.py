"""The choice of a VAE's encoder, and the memory that a VAE frees because it encodes one image at a time and nothing else."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import nn

from latent_encoder.telemetry.logs import get_logger
from latent_encoder.vae.image_strips import ImageStripsEncoder
from latent_encoder.vae.single_frame import SingleFrameEncoder, UnknownArchitecture

FastEncoder = SingleFrameEncoder | ImageStripsEncoder

log = get_logger("latent_encoder")

# Beginnings of the tensors' names: SD-style and Wan decoders, the convolution in front of them in SD and in Wan, TAESD's
# decoder, Stable Cascade's previewer (its encoder is published in a file of its own), Mage's decoder.
DECODER_PARTS = ("decoder.", "post_quant_conv.", "conv2.", "taesd_decoder.", "previewer.", "decoder_model.")
"""Parts of ComfyUI's VAE classes that only decoding uses. Any other tensor counts as needed."""

ENCODER_PARTS = {"single-frame": ("encoder.", "conv1."), "image-strips": ("encoder.",)}
"""Parts of ComfyUI's models that each of our encoders replaces."""

WITHOUT_DECODER = ("WanVAE", "AutoencoderKL", "AutoencodingEngine", "TAESD")
"""ComfyUI's classes whose decoder's weights are dropped: their `encode` was read, and uses none of `DECODER_PARTS`."""

TEST_SIZE = (48, 80)
"""Height and width in pixels of the image for the check: not square, 6 x 10 cells of Wan 2.1 and 3 x 5 of Wan 2.2."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The largest allowed difference between the latents of both encoders, relative to the latent's largest value.

It allows another order of additions in each dtype. An encoder that does not fit is off by about the largest value itself.
"""


def prepare_for_encoding(
    model: nn.Module, name: str, device: torch.device, *, compiled: bool, decodes: bool
) -> FastEncoder | None:
    """Return our encoder of a VAE's `first_stage_model`, which encodes on `device`; None if its own `encode` has to be used.

    Weights that are then not needed are dropped, except the decoder's if the VAE `decodes` later. Our encoder becomes a part
    of the model, so that ComfyUI moves it to another device together with the model.
    """
    if type(model).__name__ in WITHOUT_DECODER and not decodes:
        drop_weights(model, DECODER_PARTS)
    encoder = _checked_encoder(model, name, device, compiled)
    if encoder is not None:
        drop_weights(model, ENCODER_PARTS[encoder.kind])
        model.fast_encoder = encoder
    give_back_freed_memory()
    return encoder


def _checked_encoder(model: nn.Module, name: str, device: torch.device, compiled: bool) -> FastEncoder | None:
    """Return an encoder of ours that passed the check; None, with the reason in the log, if there is none."""
    try:
        encoder = fast_encoder(model, device, compiled=compiled)
    except UnknownArchitecture as exc:
        log.info("vae uses its own encoder", vae=name, reason=str(exc))
        return None
    if reason := difference(model, encoder):
        log.warning("vae uses its own encoder", vae=name, reason=f"the {encoder.kind} encoder does not fit: {reason}")
        return None
    log.info(f"vae uses the {encoder.kind} encoder", vae=name)
    return encoder


def fast_encoder(model: nn.Module, device: torch.device, *, compiled: bool = False) -> FastEncoder:
    """Return our encoder for a model that encodes on `device`.

    Raises:
        UnknownArchitecture: there is none.
    """
    try:
        return SingleFrameEncoder(model, compiled=compiled, target=device)
    except UnknownArchitecture as exc:
        reason = str(exc)
    if device.type != "cpu":
        raise UnknownArchitecture(f"{reason}; other VAEs have a faster encoder on a CPU only")
    try:
        return ImageStripsEncoder(model)
    except UnknownArchitecture as exc:
        raise UnknownArchitecture(f"{reason}; {exc}") from exc


def difference(model: Any, encoder: FastEncoder) -> str | None:
    """Return the reason why `encoder` must not replace the model's own `encode`; None if both give the same latent.

    They are compared on a small image of fixed noise in [-1, 1], within `TOLERANCE`.
    """
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    try:
        pixels = torch.rand(*_test_shape(model, encoder), generator=generator).to(parameter) * 2 - 1
        expected, given = model.encode(pixels), encoder(pixels)
    except Exception as exc:  # any failure has the same consequence: the model keeps its own `encode`
        return f"{type(exc).__name__}: {exc}"
    if expected.shape != given.shape:
        return f"a latent of shape {list(given.shape)} instead of {list(expected.shape)}"
    apart = float((expected - given).abs().max() / expected.abs().max())
    return None if apart <= TOLERANCE[parameter.dtype] else f"a latent that is off by {apart:.1e} of the largest value"


def _test_shape(model: Any, encoder: FastEncoder) -> tuple[int, ...]:
    """Return the shape of an image of `TEST_SIZE` in the form that the model's `encode` takes."""
    if isinstance(encoder, SingleFrameEncoder):
        return (1, model.encoder.conv1.weight.shape[1] // encoder.patch**2, 1, *TEST_SIZE)
    return (1, model.encoder.conv_in.weight.shape[1], *TEST_SIZE)


def drop_weights(model: nn.Module, prefixes: tuple[str, ...]) -> None:
    """Free the memory of the weights whose names begin with a prefix. The modules stay, because ComfyUI walks through them."""
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            parameter.data = parameter.new_empty(0)


def give_back_freed_memory() -> None:
    """Let the C library return freed memory to the system: half of the memory that loading a VAE took, which it would keep."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # only glibc has it
        trim(0)
