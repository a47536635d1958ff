"""Which family a VAE is of, by the names and shapes of its tensors: what its latents are, and whether ComfyUI encodes with it.

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
from latent_encoder.releases import is_older
from latent_encoder.vae.weights_files import SAFETENSORS, check_weights_file

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
    since: str | None = None
    """The oldest tested ComfyUI release that encodes with it; None where none does."""
    single_frame: bool = False
    """Whether `vae/single_frame.py` encodes it."""
    by_name: str | None = None
    """The part of the file's name that tells it from another family of the same tensors; None where the tensors decide."""
    no_images: str | None = None
    """A noun phrase for what it is instead of a VAE that encodes images; None for a VAE that does."""

    def fault(self, release: str) -> str | None:
        """Return why that ComfyUI release encodes no image with it; None where nothing speaks against it."""
        if self.no_images is not None:
            return f"it is {self.no_images} ({self.name}), which encodes no images"
        if self.since is None:
            return f"it is {self.name}, which ComfyUI does not load; get the file that is made for ComfyUI"
        if is_older(release, self.since):
            return f"it is {self.name}, which needs a newer ComfyUI than {release}; {self.since} is tested with it"
        return None


AUDIO = "a VAE for audio"
OBJECTS = "a VAE for 3-D objects"
DECODER = "a decoder without its encoder"


def _has(*tensors: str) -> Predicate:
    """All of these tensors are there."""
    return lambda shapes, _: all(tensor in shapes for tensor in tensors)


def _has_any(*tensors: str) -> Predicate:
    """One of these tensors is there."""
    return lambda shapes, _: any(tensor in shapes for tensor in tensors)


def _latent_channels(shapes: Shapes, tensor: str, dimensions: int) -> int | None:
    """How many channels the latents have, by the convolution that takes them in; None where there is no such one."""
    shape = shapes.get(tensor, ())
    return shape[1] if len(shape) == dimensions else None


def _takes(tensor: str, dimensions: int, channels: int, *others: str) -> Predicate:
    """The convolution of that name and number of dimensions takes so many channels, and the other tensors are there too."""
    return lambda shapes, _: (
        _latent_channels(shapes, tensor, dimensions) == channels and all(other in shapes for other in others)
    )


def _wan(channels: int, picture_channels: int) -> Predicate:
    """Wan's architecture in its own naming, which is ComfyUI's, for pictures or patches with so many channels."""
    latents = _takes("decoder.conv1.weight", 5, channels, "decoder.middle.0.residual.0.gamma")
    return lambda shapes, name: (
        latents(shapes, name) and _latent_channels(shapes, "encoder.conv1.weight", 5) in (picture_channels, None)
    )


def _wan_in_diffusers(channels: int) -> Predicate:
    """The same as AutoencoderKLWan and AutoencoderKLQwenImage name it."""
    return _takes("decoder.conv_in.weight", 5, channels, "decoder.mid_block.resnets.0.norm1.gamma")


def _kl(channels: int, word: str = "") -> Predicate:
    """Stable Diffusion's architecture, 8 pixels to a cell, in its own naming or diffusers'; and a word in the file's name.

    Models share the architecture and differ in their latents, so that only the name is left to go by.
    """
    marks = {"decoder.up.3.upsample.conv.weight", "decoder.up_blocks.2.upsamplers.0.conv.weight"}
    return lambda shapes, name: (
        not marks.isdisjoint(shapes) and _latent_channels(shapes, "decoder.conv_in.weight", 4) == channels and word in name
    )


def _x4_upscaler(shapes: Shapes, _: str) -> bool:
    """Stable Diffusion's architecture with one level less, so 4 pixels to a cell."""
    levels = [f"decoder.up.{level}.upsample.conv.weight" in shapes for level in (2, 3)]
    return levels == [True, False] and _latent_channels(shapes, "decoder.conv_in.weight", 4) == 4


def _flux2(decoder_channels: Callable[[int], bool]) -> Predicate:
    """FLUX.2, whose decoder has so many channels where it takes the latent in."""

    def recognises(shapes: Shapes, _: str) -> bool:
        shape = shapes.get("decoder.conv_in.weight", ())
        return "bn.running_mean" in shapes and len(shape) == 4 and shape[1] == 32 and decoder_channels(shape[0])

    return recognises


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


def _taehv(channels: int, word: str = "") -> Predicate:
    """A Tiny AutoEncoder for video; and a word in the file's name, for the reason that `_kl` gives."""
    takes = _takes("decoder.1.weight", 4, channels, "decoder.22.bias")
    return lambda shapes, name: takes(shapes, name) and word in name


LTX_BLOCK = "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight"


def _ltxv(shapes: Shapes, _: str) -> bool:
    """LTX-Video, whose decoder has 512 channels at first in 0.9.0, and is told the time step in later ones; LTX-2's is not."""
    return shapes.get(LTX_BLOCK, ())[:1] in ((512,), [512]) or (
        LTX_BLOCK in shapes and "decoder.timestep_scale_multiplier" in shapes
    )


def _cogvideox(words: Sequence[str] = ("",)) -> Predicate:
    """CogVideoX, with one of the words in the file's name."""
    takes = _takes("decoder.conv_in.conv.weight", 5, 16, "decoder.mid_block.resnets.0.norm1.norm_layer.weight")
    return lambda shapes, name: takes(shapes, name) and any(word in name for word in words)


def _pixel_space(shapes: Shapes, name: str) -> bool:
    return not shapes and name == "pixel_space"


# The first that recognises a file wins; so where a word in the name decides, the one without a word comes last.
FAMILIES = (
    Family("Wan 2.1 / Qwen-Image", "Wan21", _wan(16, 3), "0.3.52", single_frame=True),
    Family("Wan 2.1 with alpha / Qwen-Image-Layered", "Wan21", _wan(16, 4), "0.33.0", single_frame=True),
    Family("Wan 2.2", "Wan22", _wan(48, 12), "0.3.52", single_frame=True),
    Family("Wan 2.1 / Qwen-Image, as diffusers names it", "Wan21", _wan_in_diffusers(16)),
    Family("Wan 2.2, as diffusers names it", "Wan22", _wan_in_diffusers(48)),
    Family("FLUX.2", "Flux2", _flux2(lambda channels: channels == 512), "0.3.75"),
    Family("FLUX.2 with a small decoder", "Flux2", _flux2(lambda channels: channels != 512), "0.33.0"),
    Family("Mage", "Flux2", _has("student.dconv_encoder.proj_out.weight"), "0.33.0"),
    Family("Stable Video Diffusion", "SD15", _has("decoder.mid.block_1.mix_factor"), "0.3.52"),
    Family("SD x4 upscaler", "SD_X4", _x4_upscaler, "0.3.52"),
    Family("SDXL (by the file's name)", "SDXL", _kl(4, "xl"), "0.3.52", by_name="xl"),
    Family("SD 1.x / 2.x (SDXL has 'xl' in the file's name)", "SD15", _kl(4), "0.3.52"),
    Family("SD3 (by the file's name)", "SD3", _kl(16, "sd3"), "0.3.52", by_name="sd3"),
    Family("FLUX.1 (SD3 has 'sd3' in the file's name)", "Flux", _kl(16), "0.3.52"),
    Family("HunyuanImage 2.1", "HunyuanImage21", _takes("decoder.conv_in.weight", 4, 64), "0.3.64"),
    Family("HunyuanImage 2.1's refiner", "HunyuanImage21Refiner", _takes("decoder.conv_in.conv.weight", 5, 32), "0.3.75"),
    Family("LTX-Video", "LTXV", _ltxv, "0.3.52"),
    Family("LTX-2", "LTXAV", _has(LTX_BLOCK), "0.33.0"),
    Family("LTX 2.4 / 2.5", "LTXAV", _has("decoder.conv_in_x_t.weight"), "0.33.0"),
    Family(
        "CogVideoX 5B / 1.5 (by the file's name)",
        "CogVideoX1_5",
        _cogvideox(("5b", "1_5", "1.5")),
        "0.33.0",
        by_name="5b, 1.5 or 1_5",
    ),
    Family("CogVideoX 2B (5B and 1.5 have that in the file's name)", "CogVideoX", _cogvideox(), "0.33.0"),
    Family("HunyuanVideo", "HunyuanVideo", _takes("decoder.conv_in.conv.weight", 5, 16), "0.3.52"),
    Family("HunyuanVideo 1.5", "HunyuanVideo15", _takes("decoder.conv_in.weight", 5, 32), "0.3.64"),
    Family("Cosmos 1", "Cosmos1CV8x8x8", _has("decoder.unpatcher3d.wavelets"), "0.3.52"),
    Family(
        "Mochi",
        "Mochi",
        _has_any(
            "decoder.blocks.2.blocks.3.stack.5.weight",
            "encoder.layers.4.layers.1.attn_block.attn.qkv.weight",
            "layers.4.layers.1.attn_block.attn.qkv.weight",
        ),
        "0.3.52",
    ),
    Family("SeedVR2", "SeedVR2", _has("decoder.up_blocks.2.upsamplers.0.upscale_conv.weight"), "0.33.0"),
    Family(
        "MiniMax H3",
        "MiniMaxH3Video",
        _has("decoder.transformer_blocks.0.scale1", "encoder.down.5.block.0.conv1.weight"),
        "0.33.0",
    ),
    Family("Stable Cascade, stage A", "SC_B", _has("vquantizer.codebook.weight"), "0.3.52"),
    Family(
        "Stable Cascade, stage C",
        "SC_Prior",
        _has_any("encoder.backbone.1.0.block.0.1.num_batches_tracked", "backbone.1.0.block.0.1.num_batches_tracked"),
        "0.3.52",
    ),
    Family("TAESD for SDXL", "SDXL", _taesd(4, "xl"), "0.3.52", by_name="xl"),
    Family("TAESD for SD 1.x / 2.x", "SD15", _taesd(4), "0.3.52"),
    Family("TAESD for SD3", "SD3", _taesd(16, "sd3"), "0.3.52", by_name="sd3"),
    Family("TAESD for FLUX.1", "Flux", _taesd(16), "0.3.52"),
    Family("TAESD for FLUX.2", "Flux2", _taesd(32), "0.33.0"),
    Family("TAEHV for HunyuanVideo", "HunyuanVideo", _taehv(16, "taehv"), "0.3.75", by_name="taehv"),
    Family("TAEHV for Wan 2.1", "Wan21", _taehv(16, "taew2_1"), "0.3.75", by_name="taew2_1"),
    Family("TAEHV for Wan 2.2", "Wan22", _taehv(48), "0.33.0"),
    Family("TAEHV for HunyuanVideo 1.5", "HunyuanVideo15", _taehv(32), "0.33.0"),
    Family("TAEHV for LTX-2", "LTXAV", _taehv(128), "0.33.0"),
    Family("TAEHV for MiniMax H3", "MiniMaxH3Video", _taehv(24), "0.33.0"),
    Family("TAEHV of 16 channels (the file's name tells no model)", None, _taehv(16), "0.3.75"),
    Family("pixel space", "ChromaRadiance", _pixel_space, "0.3.64"),
    Family("ACE-Step", None, _has("vocoder.backbone.channel_layers.0.0.bias"), no_images=AUDIO),
    Family("Stable Audio / ACE-Step 1.5", None, _has("decoder.layers.1.layers.0.beta"), no_images=AUDIO),
    Family("Stable Audio 3", None, _has("decoder.layers.3.transformers.0.pre_norm.alpha"), no_images=AUDIO),
    Family("MMAudio", None, _has("vocoder.activation_post.downsample.lowpass.filter"), no_images=AUDIO),
    Family(
        "LTX-2 audio",
        None,
        _has_any("vocoder.resblocks.0.convs1.0.weight", "vocoder.vocoder.resblocks.0.convs1.0.weight"),
        no_images=AUDIO,
    ),
    Family("MiniMax Music 3", None, _has("dec_in_proj.weight", "decoder.model.0.weight_g"), no_images=AUDIO),
    Family("MiniMax H3 audio", None, _has("pre_block.attn.zero_k_bias"), no_images=AUDIO),
    Family("Hunyuan3D 2", None, _has("geo_decoder.cross_attn_decoder.ln_1.bias"), no_images=OBJECTS),
    Family("Trellis 2 shape", None, _has("shape_dec.blocks.1.16.to_subdiv.weight"), no_images=OBJECTS),
    Family("Trellis 2 texture", None, _has("txt_dec.blocks.3.4.conv2.weight"), no_images=OBJECTS),
    Family("TripoSplat", None, _has("gs.base_offset_scale", "octree.out_proj.weight"), no_images=OBJECTS),
    Family("Stable Cascade's previewer", None, _has("blocks.11.num_batches_tracked"), no_images=DECODER),
    Family("Mochi's decoder", None, _has("blocks.2.blocks.3.stack.5.weight"), no_images=DECODER),
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
