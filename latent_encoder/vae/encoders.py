"""Which encoder a VAE gets, and what is done to a VAE that is only ever asked to encode one image at a time."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import nn

from latent_encoder.telemetry.logs import get_logger
from latent_encoder.vae.single_frame import SingleFrameEncoder, UnknownArchitecture

log = get_logger("latent_encoder")

# Parts of ComfyUI's VAE classes that only decoding uses: SD-style and Wan decoders, SD's and Wan's convolution in front of
# them, TAESD's decoder, Stable Cascade's previewer (its encoder is published in a file of its own), Mage's decoder. Any other
# tensor counts as needed.
DECODER_PARTS = ("decoder.", "post_quant_conv.", "conv2.", "taesd_decoder.", "previewer.", "decoder_model.")
ENCODER_PARTS = ("encoder.", "conv1.")  # those that the single-frame encoder stands in for
WITHOUT_DECODER = ("WanVAE", "AutoencoderKL", "AutoencodingEngine", "TAESD")

# How far the latents of the test picture may be apart, as a part of the largest value. An encoder that does not fit is off by
# about that value itself.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def prepare_for_encoding(model: nn.Module, name: str, *, compiled: bool, decodes: bool) -> SingleFrameEncoder | None:
    """Make a VAE's `first_stage_model` as small and fast as is known for its kind; it can decode after that if it `decodes`.

    Returns its single-frame encoder, which is a part of the model from now on, so that it moves with it to another device, and
    stands in for weights that are dropped; None where the model's own `encode` has to be used.
    """
    if type(model).__name__ in WITHOUT_DECODER and not decodes:
        drop_weights(model, DECODER_PARTS)
    single_frame = _single_frame_encoder(model, name, compiled)
    if single_frame is not None:
        drop_weights(model, ENCODER_PARTS if decodes else ("",))
        model.single_frame = single_frame
    give_back_freed_memory()
    return single_frame


def _single_frame_encoder(model: nn.Module, name: str, compiled: bool) -> SingleFrameEncoder | None:
    try:
        encoder = SingleFrameEncoder(model, compiled=compiled)
    except UnknownArchitecture as exc:
        log.info("vae uses its own encoder", vae=name, reason=str(exc))
        return None
    if reason := difference(model, encoder):
        log.warning("vae uses its own encoder", vae=name, reason=f"the single-frame encoder does not fit: {reason}")
        return None
    log.info("vae uses the single-frame encoder", vae=name)
    return encoder


def difference(model: Any, encoder: SingleFrameEncoder) -> str | None:
    """Why `encoder` must not stand in for the model's own `encode`; None where both give the same of a small picture."""
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    try:
        colours = model.encoder.conv1.weight.shape[1] // encoder.patch**2
        pixels = torch.rand(1, colours, 1, 48, 80, generator=generator).to(parameter) * 2 - 1
        expected, given = model.encode(pixels), encoder(pixels)
    except Exception as exc:  # whatever it is, the model's own `encode` is the way out
        return f"{type(exc).__name__}: {exc}"
    if expected.shape != given.shape:
        return f"a latent of shape {list(given.shape)} instead of {list(expected.shape)}"
    apart = float((expected - given).abs().max() / expected.abs().max())
    return None if apart <= TOLERANCE[parameter.dtype] else f"a latent that is off by {apart:.1e} of the largest value"


def drop_weights(model: nn.Module, prefixes: tuple[str, ...]) -> None:
    """Free the memory of the weights whose names begin so. The modules themselves stay, for ComfyUI walks through them."""
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            parameter.data = parameter.new_empty(0)


def give_back_freed_memory() -> None:
    """Let the C library return what was freed to the system: half of what loading took, which would stay otherwise."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc has it
        trim(0)
