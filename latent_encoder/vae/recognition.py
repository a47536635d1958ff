"""Predicates that recognise a VAE's family by the names and shapes of its tensors, and by its file's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Shapes = Mapping[str, Sequence[int]]
"""The shape of each tensor in a file, by the tensor's name."""


Predicate = Callable[[Shapes, str], bool]
"""Whether a file is of a family: by its tensors, and its name in lower case."""


def has(*tensors: str) -> Predicate:
    """All of these tensors are there."""
    return lambda shapes, _: all(tensor in shapes for tensor in tensors)


def has_any(*tensors: str) -> Predicate:
    """One of these tensors is there."""
    return lambda shapes, _: any(tensor in shapes for tensor in tensors)


def _latent_channels(shapes: Shapes, tensor: str, dimensions: int) -> int | None:
    """How many channels the latents have, by the convolution that takes them in; None where there is no such one."""
    shape = shapes.get(tensor, ())
    return shape[1] if len(shape) == dimensions else None


def takes(tensor: str, dimensions: int, channels: int, *others: str) -> Predicate:
    """The convolution of that name and number of dimensions takes so many channels, and the other tensors are there too."""
    return lambda shapes, _: (
        _latent_channels(shapes, tensor, dimensions) == channels and all(other in shapes for other in others)
    )


def wan(channels: int, picture_channels: int) -> Predicate:
    """Wan's architecture in its own naming, which is ComfyUI's, for pictures or patches with so many channels."""
    latents = takes("decoder.conv1.weight", 5, channels, "decoder.middle.0.residual.0.gamma")
    return lambda shapes, name: (
        latents(shapes, name) and _latent_channels(shapes, "encoder.conv1.weight", 5) in (picture_channels, None)
    )


def wan_in_diffusers(channels: int) -> Predicate:
    """The same as AutoencoderKLWan and AutoencoderKLQwenImage name it."""
    return takes("decoder.conv_in.weight", 5, channels, "decoder.mid_block.resnets.0.norm1.gamma")


def kl(channels: int, word: str = "") -> Predicate:
    """Stable Diffusion's architecture, 8 pixels to a cell, in its own naming or diffusers'; and a word in the file's name.

    Models share the architecture and differ in their latents, so that only the name is left to go by.
    """
    marks = {"decoder.up.3.upsample.conv.weight", "decoder.up_blocks.2.upsamplers.0.conv.weight"}
    return lambda shapes, name: (
        not marks.isdisjoint(shapes) and _latent_channels(shapes, "decoder.conv_in.weight", 4) == channels and word in name
    )


def x4_upscaler(shapes: Shapes, _: str) -> bool:
    """Stable Diffusion's architecture with one level less, so 4 pixels to a cell."""
    levels = [f"decoder.up.{level}.upsample.conv.weight" in shapes for level in (2, 3)]
    return levels == [True, False] and _latent_channels(shapes, "decoder.conv_in.weight", 4) == 4


def flux2(decoder_channels: Callable[[int], bool]) -> Predicate:
    """FLUX.2, whose decoder has so many channels where it takes the latent in."""

    def recognises(shapes: Shapes, _: str) -> bool:
        shape = shapes.get("decoder.conv_in.weight", ())
        return "bn.running_mean" in shapes and len(shape) == 4 and shape[1] == 32 and decoder_channels(shape[0])

    return recognises


def taesd(channels: int, word: str = "") -> Predicate:
    """Encoder, decoder or both of a Tiny AutoEncoder; and a word in the file's name, for the reason that `kl` gives."""

    def recognises(shapes: Shapes, name: str) -> bool:
        decoders = (_latent_channels(shapes, f"{prefix}1.weight", 4) for prefix in ("", "taesd_decoder."))
        encoders = (_out_channels(shapes, f"{prefix}14.weight") for prefix in ("", "taesd_encoder."))
        return "tae" in name and channels in (*decoders, *encoders) and word in name

    return recognises


def _out_channels(shapes: Shapes, tensor: str) -> int | None:
    shape = shapes.get(tensor, ())
    return shape[0] if len(shape) == 4 else None


def taehv(channels: int, word: str = "") -> Predicate:
    """A Tiny AutoEncoder for video; and a word in the file's name, for the reason that `kl` gives."""
    decoder = takes("decoder.1.weight", 4, channels, "decoder.22.bias")
    return lambda shapes, name: decoder(shapes, name) and word in name


LTX_BLOCK = "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight"


def ltxv(shapes: Shapes, _: str) -> bool:
    """LTX-Video, whose decoder has 512 channels at first in 0.9.0, and is told the time step in later ones; LTX-2's is not."""
    return shapes.get(LTX_BLOCK, ())[:1] in ((512,), [512]) or (
        LTX_BLOCK in shapes and "decoder.timestep_scale_multiplier" in shapes
    )


def cogvideox(words: Sequence[str] = ("",)) -> Predicate:
    """CogVideoX, with one of the words in the file's name."""
    decoder = takes("decoder.conv_in.conv.weight", 5, 16, "decoder.mid_block.resnets.0.norm1.norm_layer.weight")
    return lambda shapes, name: decoder(shapes, name) and any(word in name for word in words)


def pixel_space(shapes: Shapes, name: str) -> bool:
    return not shapes and name == "pixel_space"
