"""Predicates that recognise a family of VAEs by the names and shapes of a file's tensors, and by the file's name.

A convolution's weight is `[out, in, …]`, so its number of dimensions is 4 for images and 5 for video, and the second dimension
of a decoder's first convolution is the number of latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Shapes = Mapping[str, Sequence[int]]
"""The shape of each tensor in a file, by the tensor's name."""

Predicate = Callable[[Shapes, str], bool]
"""A function that recognises a family by the tensors of a file and by its name in lower case."""

LTX_BLOCK = "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight"
"""A tensor that the VAEs of LTX-Video and of LTX-2 have, and no others."""


def has(*tensors: str) -> Predicate:
    """Recognise files that have all of these tensors."""
    return lambda shapes, _: all(tensor in shapes for tensor in tensors)


def has_any(*tensors: str) -> Predicate:
    """Recognise files that have one of these tensors or more."""
    return lambda shapes, _: any(tensor in shapes for tensor in tensors)


def takes(tensor: str, dimensions: int, channels: int, *others: str) -> Predicate:
    """Recognise files with a convolution `tensor` of these dimensions and input channels, and with all the other tensors."""
    return lambda shapes, _: _inputs(shapes, tensor, dimensions) == channels and all(other in shapes for other in others)


def wan(channels: int, colours: int) -> Predicate:
    """Recognise Wan's architecture in the original naming, which is ComfyUI's, by its latent channels and its encoder's input.

    `colours` is 3 for RGB, 4 for RGBA and 12 for RGB in patches of 2 x 2 pixels. A file without an encoder is recognised too.
    """
    latents = takes("decoder.conv1.weight", 5, channels, "decoder.middle.0.residual.0.gamma")
    return lambda shapes, name: latents(shapes, name) and _inputs(shapes, "encoder.conv1.weight", 5) in (colours, None)


def kl(channels: int, word: str = "") -> Predicate:
    """Recognise Stable Diffusion's architecture (8 pixels to a cell) in its own naming or diffusers', and a word in the name.

    Several models share the architecture and differ only in their latents. So only the file's name can distinguish them.
    """
    marks = {"decoder.up.3.upsample.conv.weight", "decoder.up_blocks.2.upsamplers.0.conv.weight"}
    return lambda shapes, name: (
        not marks.isdisjoint(shapes) and _inputs(shapes, "decoder.conv_in.weight", 4) == channels and word in name
    )


def x4_upscaler(shapes: Shapes, _: str) -> bool:
    """Recognise Stable Diffusion's architecture with one level less, which is 4 pixels to a cell."""
    levels = [f"decoder.up.{level}.upsample.conv.weight" in shapes for level in (2, 3)]
    return levels == [True, False] and _inputs(shapes, "decoder.conv_in.weight", 4) == 4


def flux2(decoder_channels: Callable[[int], bool]) -> Predicate:
    """Recognise FLUX.2, and its decoder by the number of channels that its first convolution makes of the latent's 32."""

    def recognises(shapes: Shapes, _: str) -> bool:
        shape = shapes.get("decoder.conv_in.weight", ())
        return "bn.running_mean" in shapes and len(shape) == 4 and shape[1] == 32 and decoder_channels(shape[0])

    return recognises


def taesd(channels: int, word: str = "") -> Predicate:
    """Recognise the encoder, the decoder or both of a Tiny AutoEncoder, and a word in the name for the reason in `kl`."""

    def recognises(shapes: Shapes, name: str) -> bool:
        decoders = (_inputs(shapes, f"{prefix}1.weight", 4) for prefix in ("", "taesd_decoder."))
        encoders = (_outputs(shapes, f"{prefix}14.weight", 4) for prefix in ("", "taesd_encoder."))
        return "tae" in name and channels in (*decoders, *encoders) and word in name

    return recognises


def taehv(channels: int, word: str = "") -> Predicate:
    """Recognise a Tiny AutoEncoder for video, and a word in the name for the reason in `kl`."""
    decoder = takes("decoder.1.weight", 4, channels, "decoder.22.bias")
    return lambda shapes, name: decoder(shapes, name) and word in name


def ltxv(shapes: Shapes, _: str) -> bool:
    """Recognise LTX-Video. LTX-2 has the same block, but more channels than 0.9.0 and no time step as later releases have."""
    return shapes.get(LTX_BLOCK, ())[:1] in ((512,), [512]) or (
        LTX_BLOCK in shapes and "decoder.timestep_scale_multiplier" in shapes
    )


def cogvideox(words: Sequence[str] = ("",)) -> Predicate:
    """Recognise CogVideoX, and one of the words in the name, for the reason in `kl`."""
    decoder = takes("decoder.conv_in.conv.weight", 5, 16, "decoder.mid_block.resnets.0.norm1.norm_layer.weight")
    return lambda shapes, name: decoder(shapes, name) and any(word in name for word in words)


def pixel_space(shapes: Shapes, name: str) -> bool:
    """Recognise the VAE that ComfyUI offers under this name and that has no file."""
    return not shapes and name == "pixel_space"


def _inputs(shapes: Shapes, tensor: str, dimensions: int) -> int | None:
    """Return the input channels of a convolution; None if there is none with that name and number of dimensions."""
    shape = shapes.get(tensor, ())
    return shape[1] if len(shape) == dimensions else None


def _outputs(shapes: Shapes, tensor: str, dimensions: int) -> int | None:
    """Return the output channels of a convolution; None if there is none with that name and number of dimensions."""
    shape = shapes.get(tensor, ())
    return shape[0] if len(shape) == dimensions else None
