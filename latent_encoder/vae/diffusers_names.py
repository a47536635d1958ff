"""Wan's VAEs in the names of diffusers, brought to the names that ComfyUI reads.

The repositories of Qwen-Image and Wan for diffusers have the same weights in a `diffusion_pytorch_model.safetensors`. ComfyUI
converts the names of Stable Diffusion's architecture by itself, but not these. Only names change, so the latents are the same
to the last bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
"""The layers of a residual block."""

MIDDLE = {"resnets.0": "middle.0", "attentions.0": "middle.1", "resnets.1": "middle.2"}
"""The layers between the encoder's or decoder's blocks."""

ENDS = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}
"""The first and last layers of the encoder and of the decoder."""

BESIDE = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
"""The convolutions beside encoder and decoder."""

LAYERS = {"down": 3, "up": 4}
"""Layers of a block: two residual blocks, three in the decoder, and one that changes the size."""

_BLOCK = re.compile(
    r"\.(down|up)_blocks\.(\d+)\.(?:resnets\.(\d+)|(?:down|up)samplers?(?:\.0)?(?=\.(?:resample|time_conv)\.))\."
)

Names = Mapping[str, object]
"""Anything by the name of a tensor."""


def has_wan_names(tensors: Names) -> bool:
    """Return whether these are the names of diffusers for one of Wan's VAEs."""
    return "decoder.mid_block.resnets.0.norm1.gamma" in tensors and "decoder.conv_in.weight" in tensors


def native_names(names: Iterable[str]) -> dict[str, str]:
    """Return ComfyUI's name for each of diffusers' names. A name that is unknown stays as it is.

    Wan 2.2 groups the layers by block; Wan 2.1 numbers all of them through.
    """
    names = list(names)
    grouped = any(".downsampler." in name or ".upsampler." in name for name in names)
    return {name: _native(name, grouped) for name in names}


def _native(name: str, grouped: bool) -> str:
    for layer, native in RESIDUAL.items():
        name = name.replace(f".{layer}.", f".{native}.")
    for layer, native in MIDDLE.items():
        name = name.replace(f".mid_block.{layer}.", f".{native}.")
    name = _BLOCK.sub(lambda found: _layer(found, grouped), name).replace(".down_blocks.", ".downsamples.")
    part, _, rest = name.partition(".")
    layer, _, end = rest.partition(".")
    if part in BESIDE:
        return f"{BESIDE[part]}.{rest}"
    return f"{part}.{ENDS[layer]}.{end}" if layer in ENDS else name


def _layer(found: re.Match[str], grouped: bool) -> str:
    """Return the native name of a layer in a block: `.down_blocks.1.resnets.0.` is `.downsamples.1.downsamples.0.`."""
    kind, block, layer = found[1], int(found[2]), int(found[3]) if found[3] else LAYERS[found[1]] - 1
    if grouped:
        return f".{kind}samples.{block}.{kind}samples.{layer}."
    return f".{kind}samples.{block * LAYERS[kind] + layer}."
