"""The choice of a VAE's encoder, and the memory that a VAE frees because it encodes one image at a time and nothing else."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from latent_encoder.telemetry.logs import get_logger
from latent_encoder.vae.freed_memory import give_back_freed_memory
from latent_encoder.vae.single_frame import SingleFrameEncoder, UnknownArchitecture

log = get_logger("latent_encoder")

# Beginnings of the tensors' names: SD-style and Wan decoders, the convolution in front of them in SD and in Wan, TAESD's
# decoder, Stable Cascade's previewer (its encoder is published in a file of its own), Mage's decoder.
DECODER_PARTS = ("decoder.", "post_quant_conv.", "conv2.", "taesd_decoder.", "previewer.", "decoder_model.")
"""Parts of ComfyUI's VAE classes that only decoding uses. Any other tensor counts as needed."""

ENCODER_PARTS = ("encoder.", "conv1.")
"""Parts of ComfyUI's `WanVAE` that the single-frame encoder replaces."""

WITHOUT_DECODER = ("WanVAE", "AutoencoderKL", "AutoencodingEngine", "TAESD")
"""ComfyUI's classes whose decoder's weights are dropped: their `encode` was read, and uses none of `DECODER_PARTS`."""

TEST_SIZE = (48, 80)
"""Height and width in pixels of the image for the check: not square, 6 x 10 cells of Wan 2.1 and 3 x 5 of Wan 2.2."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The largest allowed difference between the latents of both encoders, relative to the latent's largest value.

It allows another order of additions in each dtype. An encoder that does not fit is off by about the largest value itself.
"""


class ChosenEncoder(NamedTuple):
    """The encoder of a VAE."""

    single_frame: SingleFrameEncoder | None
    """The encoder that takes the place of the model's own `encode`; None if the model keeps it."""
    reason: str
    """The reason for the choice, for people."""


def prepare_for_encoding(model: nn.Module, name: str, *, target: torch.device, compiled: bool, decodes: bool) -> ChosenEncoder:
    """Return the encoder of a VAE's `first_stage_model`: the single-frame encoder, or its own if that one does not fit.

    `target` is the device on which ComfyUI will encode.

    Weights that are then not needed are dropped, except the decoder's if the VAE `decodes` later. The single-frame encoder
    becomes a part of the model, so that ComfyUI moves it to another device together with the model.
    """
    if type(model).__name__ in WITHOUT_DECODER and not decodes:
        drop_weights(model, DECODER_PARTS)
    chosen = _choose(model, name, compiled=compiled, target=target)
    if chosen.single_frame is not None:
        drop_weights(model, ENCODER_PARTS if decodes else ("",))
        model.single_frame = chosen.single_frame
    give_back_freed_memory()  # half of the memory that loading a VAE took
    return chosen


def _choose(model: nn.Module, name: str, **options: Any) -> ChosenEncoder:
    """Return the single-frame encoder if it passes the check, else the model's own. The log has the choice."""
    try:
        encoder = SingleFrameEncoder(model, **options)
    except UnknownArchitecture as exc:
        log.info("vae uses its own encoder", vae=name, reason=str(exc))
        return ChosenEncoder(None, f"the single-frame encoder is for other VAEs: {exc}")
    if wrong := difference(model, encoder):
        reason = f"the single-frame encoder does not fit: {wrong}"
        log.warning("vae uses its own encoder", vae=name, reason=reason)
        return ChosenEncoder(None, reason)
    log.info("vae uses the single-frame encoder", vae=name)
    return ChosenEncoder(encoder, f"{type(model).__name__} gave the same latent of a test image")


def difference(model: Any, encoder: SingleFrameEncoder) -> str | None:
    """Return the reason why `encoder` must not replace the model's own `encode`; None if both give the same latent.

    They are compared on a small image of fixed noise in [-1, 1], within `TOLERANCE`.
    """
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    try:
        colours = model.encoder.conv1.weight.shape[1] // encoder.patch**2
        pixels = torch.rand(1, colours, 1, *TEST_SIZE, generator=generator).to(parameter) * 2 - 1
        expected, given = model.encode(pixels), encoder(pixels)
    except Exception as exc:  # any failure has the same consequence: the model keeps its own `encode`
        return f"{type(exc).__name__}: {exc}"
    if expected.shape != given.shape:
        return f"a latent of shape {list(given.shape)} instead of {list(expected.shape)}"
    apart = float((expected - given).abs().max() / expected.abs().max())
    return None if apart <= TOLERANCE[parameter.dtype] else f"a latent that is off by {apart:.1e} of the largest value"


def drop_weights(model: nn.Module, prefixes: tuple[str, ...]) -> None:
    """Free the memory of the weights whose names begin with a prefix. The modules stay, because ComfyUI walks through them."""
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            parameter.data = parameter.new_empty(0)
