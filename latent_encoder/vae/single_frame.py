"""The single-frame encoder: the latent that a Wan VAE's own encoder gives for one image, in a fraction of its time and memory.

**One frame needs no third dimension.** The Wan VAEs encode video. Their convolutions over time are causal: output frame t
depends on the input frames t-2, t-1 and t, and frames before the first count as zero. An image is a first frame without
others. So the first two time slices of a kernel `[out, in, 3, 3, 3]` only ever meet zeros:

    conv3d(x, kernel)[:, :, 0] == conv2d(x[:, :, 0], kernel[:, :, -1])

For a first frame ComfyUI also skips the convolutions over time alone, in the down-sampling layers, and the cache of earlier
frames. The rest is a 2-D network, and this module builds it from the model's weights.

**Rows come in strips.** Nearly all layers look at a pixel and its eight neighbours. So the image flows through them as through
pipes: a layer takes some rows, keeps the last two for the next strip, and hands on the rows that are complete. No row is
computed twice and nothing is approximated. The memory for it does not grow with the image's height. Only the attention in the
middle, at 1/64 of the pixels, needs all rows at once. See `vae/row_strips.py`.

**Memory is read and written seldom.** Tensors are `[height, width, channels]`. So the normalisation over channels reads
consecutive numbers, `conv2d` gets its channels-last layout without a copy, and a strip stays in the processor's cache.
Normalisation and activation are computed in the buffer from which the convolution reads. See `vae/single_frame_layers.py`.

In float32 on a CPU, the convolutions with many channels take half the multiplications: see `vae/winograd.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from latent_encoder.vae.activation import activation_for
from latent_encoder.vae.gpu import strip_pixels
from latent_encoder.vae.row_strips import joined, strips
from latent_encoder.vae.single_frame_layers import (
    Attention,
    Build,
    Convolution,
    Each,
    MeanOfPatches,
    Pointwise,
    Regroup,
    Residual,
)

TENSORS_AT_ONCE = 22
"""Tensors of a strip at full size, with the channels and the dtype of the first level, that take as much memory as all that is
alive at the peak. Counted on the full-size models in half precision: 18 to 21.4 for Wan 2.1 in several strips, 7.1 in one."""


class UnknownArchitecture(Exception):
    """A model that the single-frame encoder cannot be made from; the text names the unknown part."""


class SingleFrameEncoder(nn.Module):
    """The encoder of a Wan 2.1 or Wan 2.2 VAE for one image, made from ComfyUI's model of that VAE."""

    def __init__(self, model: nn.Module, *, compiled: bool = False, target: torch.device | None = None) -> None:
        """Take the weights from a ComfyUI `WanVAE`, in their dtype and on their device.

        ComfyUI moves a VAE to a GPU when it first encodes. `target` is the device on which it will encode; if absent, the one
        that its weights are on.

        With `compiled`, `torch.compile` makes one kernel of normalisation and SiLU when they first run.

        Raises:
            UnknownArchitecture: the model is of another class, or has an unknown part.
        """
        super().__init__()
        self.compiled = compiled
        try:
            self.patch = _patch_side(model)
            weight = next(model.parameters())
            target = target or weight.device
            build = Build(activation_for(target, weight.dtype, compiled=compiled), winograd=target.type == "cpu")
            self.layers = nn.ModuleList(_layers(model, build))
        except (AttributeError, ValueError) as exc:
            raise UnknownArchitecture(f"{type(model).__name__} is not built like a Wan VAE: {exc}") from exc
        self.requires_grad_(False)

    def forward(self, pixels: Tensor, *, free: bool = False, **_: Any) -> Tensor:
        """Return the mean of the latent's distribution, `[1, channels, 1, height / 8, width / 8]` (Wan 2.2: / 16).

        `pixels` are `[1, colours, 1, height, width]` in [-1, 1], in the weights' dtype. Both sides are multiples of 8 (Wan
        2.2: of 16). They are moved to the weights' device. Further options, which ComfyUI gives to
        the `encode` of some models, are ignored.

        With `free`, `pixels` are left empty: their memory is free before the attention begins. VAEEncode makes them for
        the model alone and keeps them until it has the latent, 0.2 GB of a 16-megapixel image.
        """
        height = strip_pixels(self.device, self.bytes_per_pixel)
        stream = strips(pixels[0, :, 0].to(self.device), self.patch, height)
        if free:
            pixels.data = pixels.new_empty(0)
        for layer in self.layers:
            stream = layer(stream)
        return joined(stream).permute(2, 0, 1)[None, :, None]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def bytes_per_pixel(self) -> int:
        """Memory that the layers take for a pixel of a strip, if the norm has temporary tensors in float32."""
        kernel = next(self.parameters())
        return TENSORS_AT_ONCE * kernel.shape[0] * kernel.element_size() // self.patch**2


def _patch_side(model: Any) -> int:
    """Return the side in pixels of the patches that a model takes: 1 with RGB or RGBA (Wan 2.1), 2 with RGB (Wan 2.2).

    Raises:
        UnknownArchitecture: its first convolution takes another number of channels.
    """
    channels = model.encoder.conv1.weight.shape[1]
    sides = {3: 1, 4: 1, 12: 2}
    if channels not in sides:
        raise UnknownArchitecture(f"{type(model).__name__} takes {channels} channels")
    return sides[channels]


def _layers(model: Any, build: Build) -> Iterator[nn.Module]:
    """Yield the layers of a `WanVAE`'s encoder in their order, and the convolution behind it that makes the mean.

    Behind the last down-sampling the strips are regrouped, because they have lost most of their rows.
    """
    encoder = model.encoder
    yield Convolution(encoder.conv1, build)
    shrinking = [number for number, layer in enumerate(encoder.downsamples) if _stride(layer) > 1]
    for number, layer in enumerate(encoder.downsamples):
        yield _layer(layer, build)
        if number == shrinking[-1]:
            yield Regroup()
    for layer in encoder.middle:
        yield _layer(layer, build)
    norm, _, convolution = encoder.head
    yield Convolution(convolution, build, norm)
    yield Each(Pointwise(model.conv1, slice(model.conv1.weight.shape[0] // 2)))  # the other half is the log variance


def _layer(layer: Any, build: Build) -> nn.Module:
    """Return the counterpart of a layer of ComfyUI's.

    Raises:
        UnknownArchitecture: layers of its class are unknown.
        ValueError, AttributeError: it is not built like the known layers of its class.
    """
    match type(layer).__name__:
        case "ResidualBlock":
            norm1, _, convolution1, norm2, _, _, convolution2 = layer.residual
            shortcut = layer.shortcut if isinstance(layer.shortcut, nn.Identity) else Pointwise(layer.shortcut)
            return Residual([Convolution(convolution1, build, norm1), Convolution(convolution2, build, norm2)], shortcut)
        case "AttentionBlock":
            return Attention(layer)
        case "Resample":
            _, convolution = layer.resample
            return Convolution(convolution, build, stride=2)
        case "Down_ResidualBlock":
            path = [_layer(inner, build) for inner in layer.downsamples]
            return Residual(path, MeanOfPatches(layer.avg_shortcut), shrink=_stride(layer))
        case name:
            raise UnknownArchitecture(f"it has an unknown layer, {name}")


def _stride(layer: Any) -> int:
    """Return the factor by which a layer divides height and width."""
    match type(layer).__name__:
        case "Resample":
            return 2
        case "Down_ResidualBlock":
            return max(map(_stride, layer.downsamples))
        case _:
            return 1
