"""Which family a VAE is of, by the names and shapes of its tensors: what its latents are, and how to show them.

Another family is one more row in `FAMILIES`. What a family's latents mean (their scaling, their colours) is not here: ComfyUI
knows it, under the name of the class in `comfy.latent_formats` that a row has as its `latent_space`.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import one_line
from weights_files import SAFETENSORS, check_weights_file

Shapes = Mapping[str, Sequence[int]]
"""The shape of each tensor in a file, by the tensor's name."""

Predicate = Callable[[Shapes, str], bool]
"""Whether a file is of a family: by its tensors, and its name in lower case."""


@dataclass(frozen=True)
class Family:
    """VAEs whose latents mean the same to a diffusion model."""

    name: str
    latent_space: str | None
    """ComfyUI's class in `comfy.latent_formats`; None where it has none."""
    recognises: Predicate = field(repr=False, compare=False)


def _latent_channels(shapes: Shapes, tensor: str, dimensions: int) -> int | None:
    """How many channels the latents have, by the convolution that takes them in; None where there is no such one."""
    shape = shapes.get(tensor, ())
    return shape[1] if len(shape) == dimensions else None


def _wan(channels: int) -> Predicate:
    """Wan's architecture in its own naming, which is ComfyUI's."""
    return lambda shapes, _: (
        "decoder.middle.0.residual.0.gamma" in shapes and _latent_channels(shapes, "decoder.conv1.weight", 5) == channels
    )


def _wan_in_diffusers(channels: int) -> Predicate:
    """The same as AutoencoderKLWan and AutoencoderKLQwenImage name it."""
    return lambda shapes, _: (
        "decoder.mid_block.resnets.0.norm1.gamma" in shapes
        and _latent_channels(shapes, "decoder.conv_in.weight", 5) == channels
    )


def _kl(channels: int, word: str = "") -> Predicate:
    """Stable Diffusion's architecture, 8 pixels to a cell, in its own naming or diffusers'; and a word in the file's name.

    Models share the architecture and differ in their latents, so that only the name is left to go by.
    """
    marks = {"decoder.up.3.upsample.conv.weight", "decoder.up_blocks.2.upsamplers.0.conv.weight"}
    return lambda shapes, name: (
        not marks.isdisjoint(shapes) and _latent_channels(shapes, "decoder.conv_in.weight", 4) == channels and word in name
    )


def _taesd(channels: int, word: str = "") -> Predicate:
    """Encoder, decoder or both of a Tiny AutoEncoder; and a word in the file's name, for the reason that `_kl` gives."""

    def recognises(shapes: Shapes, name: str) -> bool:
        decoders = (_latent_channels(shapes, f"{prefix}1.weight", 4) for prefix in ("", "taesd_decoder."))
        encoders = (_out_channels(shapes, f"{prefix}14.weight") for prefix in ("", "taesd_encoder."))
        return "tae" in name and channels in (*decoders, *encoders) and word in name

    return recognises


def _out_channels(shapes: Shapes, tensor: str) -> int | None:
    shape = shapes.get(tensor, ())
    return shape[0] if len(shape) == 4 else None


def _flux2(shapes: Shapes, _: str) -> bool:
    return "bn.running_mean" in shapes and _latent_channels(shapes, "decoder.conv_in.weight", 4) == 32


def _pixel_space(shapes: Shapes, name: str) -> bool:
    return not shapes and name == "pixel_space"


# The first that recognises a file wins; so where a word in the name decides, the one without a word comes last.
FAMILIES = (
    Family("Wan 2.1 / Qwen-Image", "Wan21", _wan(16)),
    Family("Wan 2.2", "Wan22", _wan(48)),
    Family("Wan 2.1 / Qwen-Image, as diffusers names it", "Wan21", _wan_in_diffusers(16)),
    Family("Wan 2.2, as diffusers names it", "Wan22", _wan_in_diffusers(48)),
    Family("FLUX.2", "Flux2", _flux2),
    Family("SDXL (by the file's name)", "SDXL", _kl(4, "xl")),
    Family("SD 1.x / 2.x (SDXL has 'xl' in the file's name)", "SD15", _kl(4)),
    Family("SD3 (by the file's name)", "SD3", _kl(16, "sd3")),
    Family("FLUX.1 (SD3 has 'sd3' in the file's name)", "Flux", _kl(16)),
    Family("TAESD for SDXL", "SDXL", _taesd(4, "xl")),
    Family("TAESD for SD 1.x / 2.x", "SD15", _taesd(4)),
    Family("TAESD for SD3", "SD3", _taesd(16, "sd3")),
    Family("TAESD for FLUX.1", "Flux", _taesd(16)),
    Family("pixel space", "ChromaRadiance", _pixel_space),
)


def family_of(shapes: Shapes, file_name: str) -> Family | None:
    """The family of the VAE whose tensors have these shapes, or None where it is none that is known.

    `file_name` may be a path or a VAE's name; it decides where the tensors do not: between SD 1.x and SDXL, SD3 and FLUX.1.
    """
    name = Path(file_name).name.lower()
    return next((family for family in FAMILIES if family.recognises(shapes, name)), None)


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a file of weights; of a safetensors file, no more than its header is read.

    Raises:
        SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, OSError: as `check_weights_file`.
    """
    check_weights_file(path)
    if path.suffix.lower() not in SAFETENSORS:
        return {name: tuple(value.shape) for name, value in _unpickled(path).items() if hasattr(value, "shape")}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # it is no dict


def _unpickled(path: Path) -> Mapping[str, Any]:
    """The tensors by name in what torch.save wrote, without their values; under `state_dict` as ComfyUI looks for them."""
    import torch

    try:
        content = torch.load(path, weights_only=True, map_location="meta", mmap=zipfile.is_zipfile(path))
    except (RuntimeError, EOFError, ValueError, KeyError) as exc:
        raise pickle.UnpicklingError(one_line(exc)) from exc
    if not isinstance(content, Mapping):
        raise pickle.UnpicklingError(f"it holds a {type(content).__name__}, not tensors by name")
    inner = content.get("state_dict", content)
    return inner if isinstance(inner, Mapping) else content
