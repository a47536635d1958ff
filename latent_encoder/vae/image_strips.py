"""The encoder of SD-style VAEs in strips: the numbers of ComfyUI's own `Encoder`, in about half of its time and memory.

The VAEs of Stable Diffusion and FLUX share one class of encoder: residual blocks of group normalisation, SiLU and convolution,
with an attention in the middle. Group normalisation needs mean and variance of the whole image, so the image cannot flow
through the layers in strips as through Wan's. Each layer makes its whole image. Its inner steps are done strip by strip, in
the processor's cache, and mean and variance are gathered on the way. See
`vae/image_strips_layers.py` and `vae/group_norm.py`.

Only the `Encoder` inside the model is replaced. The steps behind it, such as `quant_conv` and FLUX.2's normalisation of the
latent, are the model's own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from latent_encoder.vae.group_norm import Moments
from latent_encoder.vae.image_strips_layers import Attention, Convolution, Image, Residual
from latent_encoder.vae.single_frame import UnknownArchitecture
from latent_encoder.vae.single_frame_layers import Pointwise
from models import EncoderKind


class ImageStripsEncoder(nn.Module):
    """The `encode` of an SD-style VAE, made from ComfyUI's model of that VAE: for float32 on a CPU."""

    kind: EncoderKind = "image-strips"

    compiled = False

    def __init__(self, model: nn.Module) -> None:
        """Take the weights of the model's `encoder`. Other parts that `encode` needs are shared with the model.

        Raises:
            UnknownArchitecture: the model's encoder is of another class, or has an unknown part.
        """
        super().__init__()
        self.model: Any = copy.copy(model)
        parts = {name: part for name, part in model.named_children() if name != "decoder"}
        self.model._modules = {**parts, "encoder": StripsEncoder(getattr(model, "encoder", None))}

    def forward(self, pixels: Tensor, **_: Any) -> Tensor:
        """Return the latent that the model's own `encode` gives for images `[count, colours, height, width]` in [-1, 1].

        Further options, which ComfyUI gives to the `encode` of some models, are ignored.
        """
        latent: Tensor = self.model.encode(pixels)
        return latent


class StripsEncoder(nn.Module):
    """The counterpart of ComfyUI's `comfy.ldm.modules.diffusionmodules.model.Encoder`."""

    def __init__(self, encoder: Any) -> None:
        """Take the weights of a ComfyUI `Encoder`.

        Raises:
            UnknownArchitecture: it is of another class, is not float32 on a CPU, or has an unknown part.
        """
        super().__init__()
        try:
            self.layers = nn.ModuleList(_layers(encoder))
        except (AttributeError, ValueError) as exc:
            raise UnknownArchitecture(f"{type(encoder).__name__} is not built like an SD-style encoder: {exc}") from exc
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return mean and log variance of the latents' distributions, `[count, 2 * channels, height / 8, width / 8]`."""
        return torch.stack([self._encoded(image) for image in images])

    def _encoded(self, pixels: Tensor) -> Tensor:
        image = Image(pixels.permute(1, 2, 0).contiguous(), Moments())
        for layer in self.layers:
            image = layer(image)
        return image.pixels.permute(2, 0, 1)


def _layers(encoder: Any) -> Iterator[nn.Module]:
    """Yield the layers of an `Encoder` in their order.

    Raises:
        UnknownArchitecture: a layer is of an unknown class.
        ValueError, AttributeError: a layer is not built like the known ones of its class.
    """
    yield _convolution(encoder.conv_in)
    for level in encoder.down:
        if len(level.attn) > 0:
            raise UnknownArchitecture("its encoder has attention before its middle")
        yield from map(_residual, level.block)
        if hasattr(level, "downsample"):
            yield _convolution(_known(level.downsample, "Downsample").conv, stride=2)
    yield _residual(encoder.mid.block_1)
    yield _attention(encoder.mid.attn_1)
    yield _residual(encoder.mid.block_2)
    yield _convolution(encoder.conv_out, encoder.norm_out)


def _residual(block: Any) -> Residual:
    _known(block, "ResnetBlock")
    shortcut = _pointwise(block.nin_shortcut) if block.in_channels != block.out_channels else None
    return Residual(_convolution(block.conv1, block.norm1), _convolution(block.conv2, block.norm2), shortcut)


def _attention(block: Any) -> Attention:
    _known(block, "AttnBlock")
    for convolution in (block.q, block.k, block.v, block.proj_out):
        _pointwise(convolution)
    _known(block.norm, "GroupNorm")
    return Attention(block)


def _convolution(convolution: Any, norm: Any = None, stride: int = 1) -> Convolution:
    expected = ((3, 3), (stride, stride), (1, 1) if stride == 1 else (0, 0))
    if norm is not None:
        _known(norm, "GroupNorm")
    return Convolution(_conv2d(convolution, *expected), norm, stride)


def _pointwise(convolution: Any) -> Pointwise:
    return Pointwise(_conv2d(convolution, (1, 1), (1, 1), (0, 0)))


def _conv2d(convolution: Any, *expected: tuple[int, int]) -> Any:
    """Return a convolution that has the expected kernel size, stride and padding.

    Raises:
        UnknownArchitecture: it is another one, or its weights are not float32 on a CPU.
    """
    weight = _known(convolution, "Conv2d").weight
    shape = (convolution.kernel_size, convolution.stride, convolution.padding)
    ways = (convolution.dilation, convolution.groups, convolution.padding_mode)
    if shape != expected or ways != ((1, 1), 1, "zeros") or convolution.bias is None:
        raise UnknownArchitecture(f"it has an unknown convolution, {convolution}")
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise UnknownArchitecture(
            f"its weights are {weight.dtype} on {weight.device}, and strips were measured on float32 only"
        )
    return convolution


def _known(layer: Any, name: str) -> Any:
    """Return a layer of the class with that name.

    Raises:
        UnknownArchitecture: it is of another class.
    """
    if type(layer).__name__ != name:
        raise UnknownArchitecture(f"it has an unknown layer, {type(layer).__name__} in place of {name}")
    return layer
