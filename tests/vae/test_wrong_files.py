"""Files in the place of a VAE: each is refused by name with the next step, or encodes as it does in ComfyUI."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from config import Settings
from errors import ErrorCode
from latent_encoder.doctor.check import Check, State
from latent_encoder.doctor.models import check_file
from models import ErrorResponse
from service import LatentEncoder
from tests.helpers import Encode, load_latent
from tests.vae.test_files import whole

pytestmark = pytest.mark.core

Weights = dict[str, torch.Tensor]
Change = Callable[[Weights], object]


def with_change(change: Change) -> Callable[[Path], None]:
    """Return a function that writes the sound VAE with its tensors changed in place."""

    def make(path: Path) -> None:
        weights = load_file(whole(path))
        change(weights)
        save_file(weights, path)

    return make


def with_bytes(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def with_names(*names: str) -> Callable[[Path], None]:
    return lambda path: save_file({name: torch.ones(2, 2) for name in names}, path)


def kernels(weights: Weights) -> list[str]:
    return [name for name, tensor in weights.items() if name.endswith(".weight") and tensor.ndim > 3]


def scale(weights: Weights, suffix: str = "scale_weight") -> None:
    """Quantise the kernels to 8 bits with a scale beside each, as tools for diffusion models do."""
    for name in kernels(weights):
        factor = weights[name].float().abs().max() / 448
        weights[name] = (weights[name].float() / factor).to(torch.float8_e4m3fn)
        weights[f"{name.removesuffix('.weight')}.{suffix}"] = factor


def scale_and_lose_the_scales(weights: Weights) -> None:
    scale(weights)
    for name in [name for name in weights if name.endswith("scale_weight")]:
        del weights[name]


def cast(dtype: torch.dtype, factor: float = 1.0) -> Change:
    def change(weights: Weights) -> None:
        for name in kernels(weights):
            weights[name] = (weights[name].float() * factor).to(dtype)

    return change


def pack(weights: Weights) -> None:
    """Pack two numbers of 4 bits into a byte, with a table beside them, as bitsandbytes does."""
    for name in kernels(weights):
        weights[name] = torch.zeros(weights[name].numel() // 2, 1, dtype=torch.uint8)
        weights[f"{name}.absmax"] = torch.ones(4)


def mark_as_scaled(weights: Weights) -> None:
    cast(torch.float8_e4m3fn)(weights)
    weights["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)


def zero_the_end(path: Path) -> None:
    """Write zeros in place of the second half, as a download into a file of the full size does that is broken off."""
    data = whole(path).read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def scaled_up(weights: Weights) -> None:
    for name in ("conv1.weight", "conv1.bias"):
        weights[name] = weights[name].float() * 1e6


def constant(weights: Weights) -> None:
    weights["conv1.weight"] = weights["conv1.weight"] * 1e-6


def checkpoint(path: Path) -> None:
    weights = {f"first_stage_model.{name}": tensor for name, tensor in load_file(whole(path)).items()}
    save_file({**weights, "model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 2)}, path)


def zipped(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("vae.safetensors"))
    return buffer.getvalue()


def array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def torch_file(path: Path) -> None:
    torch.save(load_file(whole(path)), path)


def renamed(path: Path) -> None:
    path.write_bytes(whole(path).read_bytes())


def cut_in_the_header(path: Path) -> None:
    path.write_bytes(whole(path).read_bytes()[:500])


def with_bytes_behind(path: Path) -> None:
    path.write_bytes(whole(path).read_bytes() + bytes(10))


def part_of_two(path: Path) -> None:
    weights = load_file(whole(path))
    save_file({name: tensor for name, tensor in weights.items() if name.startswith("decoder.")}, path)


GGUF = b"GGUF\x03\x00\x00\x00" + bytes(range(1, 60))
ONNX = b"\x08\x08\x12\x07pytorch\x1a\x052.6.0:\x8a\x01"
HTML = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
INDEX = json.dumps({"metadata": {"total_size": 1}, "weight_map": {"encoder.conv_in.weight": "a-00001-of-00002"}}).encode()
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 253806246\n"
PLAIN = "get the file in bf16, fp16 or fp32"

WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    # quantised weights
    "fp8_scale_weight.safetensors": (with_change(scale), "ignore their scales (encoder.conv1.scale_weight, "),
    "fp8_weight_scale.safetensors": (with_change(lambda weights: scale(weights, "weight_scale")), PLAIN),
    "fp8_comfy_quant.safetensors": (with_change(lambda weights: scale(weights, "comfy_quant")), "its weights are quantised"),
    "fp8_scale_input.safetensors": (with_change(lambda weights: scale(weights, "scale_input")), "its weights are quantised"),
    "fp8_marked.safetensors": (with_change(mark_as_scaled), "ignore their scales (scaled_fp8)"),
    "int8.safetensors": (with_change(cast(torch.int8, 100)), "its weights are integers, so they are quantised: "),
    "uint8.safetensors": (with_change(cast(torch.uint8, 100)), "encoder.conv1.weight (uint8)"),
    "int4_packed.safetensors": (with_change(pack), "with scales or tables beside them"),
    "e8m0.safetensors": (with_change(cast(torch.float8_e8m0fnu)), "encoder.conv1.weight (float8_e8m0fnu)"),
    # tensors too many, too few and without sense
    "left_over.safetensors": (
        with_change(lambda weights: weights.update({"encoder.middle.3.weight": torch.ones(2)})),
        "it has tensors that ComfyUI's WanVAE does not use: encoder.middle.3.weight; ",
    ),
    "left_over_quant_conv.safetensors": (
        with_change(lambda weights: weights.update({"quant_conv.weight": torch.ones(2)})),
        "does not use: quant_conv.weight; ",
    ),
    "lora_in_encoder.safetensors": (
        with_change(lambda weights: weights.update({"encoder.conv1.lora_A.weight": torch.ones(2)})),
        "does not use: encoder.conv1.lora_A.weight; ",
    ),
    "infinite.safetensors": (
        with_change(lambda weights: weights["conv1.bias"].fill_(float("inf"))),
        "not finite in: conv1.bias",
    ),
    "zeros.safetensors": (zero_the_end, "it has nothing but zeros in: "),
    # weights that only their latent shows to be wrong
    "too_large.safetensors": (with_change(scaled_up), "from a test image it makes values of about "),
    "constant.safetensors": (with_change(constant), "from a test image it makes the same values everywhere"),
    # other models
    "checkpoint.safetensors": (checkpoint, "it is a full checkpoint, of which VAELoader reads no part; in ComfyUI, the nodes"),
    "lora_kohya.safetensors": (
        with_names("lora_unet_down_blocks_0.alpha", "lora_unet_down_blocks_0.lora_up.weight"),
        "a LoRA",
    ),
    "lora_peft.safetensors": (with_names("transformer_blocks.0.attn.to_q.lora_A.weight"), "it is a LoRA, not a VAE"),
    "clip.safetensors": (with_names("text_model.encoder.layers.0.mlp.fc1.weight"), "it is a text encoder"),
    "t5.safetensors": (with_names("encoder.block.0.layer.0.SelfAttention.q.weight"), "it is a text encoder"),
    "qwen.safetensors": (with_names("model.layers.0.self_attn.q_proj.weight"), "it is a text encoder"),
    "clip_vision.safetensors": (with_names("vision_model.encoder.layers.0.mlp.fc1.weight"), "it is a vision or text encoder"),
    "qwen_image.safetensors": (
        with_names("transformer_blocks.0.attn.to_q.weight", "img_in.weight"),
        "it is a diffusion model",
    ),
    "wan.safetensors": (with_names("blocks.0.self_attn.q.weight", "patch_embedding.weight"), "it is a diffusion model"),
    "flux.safetensors": (with_names("model.diffusion_model.double_blocks.0.img_attn.qkv.weight"), "it is a diffusion model"),
    "unet.safetensors": (with_names("down_blocks.0.attentions.0.norm.weight"), "it is a diffusion model"),
    "controlnet.safetensors": (with_names("controlnet_cond_embedding.conv_in.weight"), "it is a ControlNet"),
    "esrgan.safetensors": (with_names("conv_first.weight", "body.0.rdb1.conv1.weight"), "it is a model that enlarges images"),
    "latent.safetensors": (with_names("latent"), "it is a latent, not a VAE"),
    "unknown.safetensors": (with_names("weight"), "ComfyUI recognises no VAE in it"),
    "model-00001-of-00002.safetensors": (part_of_two, "it is part 1 of 2 of a model in several files, by its name"),
    "model-00002-of-00003.safetensors": (with_names("weight"), "it is part 2 of 3 of a model in several files, by its name"),
    # other formats, under each ending
    "gguf.gguf": (with_bytes(GGUF), "it is a GGUF file, which VAELoader does not read; get the VAE as a file of its own"),
    "gguf.safetensors": (with_bytes(GGUF), "it is a GGUF file"),
    "gguf.pt": (with_bytes(GGUF), "it is a GGUF file"),
    "onnx.onnx": (with_bytes(ONNX), "it is an ONNX model"),
    "onnx.safetensors": (with_bytes(ONNX), "it is an ONNX model"),
    "html.safetensors": (with_bytes(HTML), "it is a web page (HTML)"),
    "html.pt": (with_bytes(HTML), "it is a web page (HTML)"),
    "error.safetensors": (
        with_bytes(b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"),
        "it is an XML document",
    ),
    "json.safetensors": (with_bytes(b'{"error": "gated repository"}'), "it is a JSON document"),
    "index.safetensors.index.json": (with_bytes(INDEX), "it is the index of a model in several files"),
    "lfs.pt": (with_bytes(LFS), "it is a Git LFS pointer"),
    "annex.safetensors": (with_bytes(b"/annex/objects/SHA256E-s1--00.safetensors\n"), "it is a git-annex pointer"),
    "text.safetensors": (with_bytes(b"Access to this model is restricted.\n"), "it is a text, not a model"),
    "text.pt": (with_bytes(b"Not found"), "it is a text, not a model"),
    "empty.pt": (with_bytes(b""), "it is empty (0 bytes)"),
    "one_byte.safetensors": (with_bytes(b"\x08"), "it is no sound safetensors file"),
    "holes.safetensors": (
        with_bytes(bytes(100_000)),
        "it begins with 4096 zeros, as a download that was broken off leaves it",
    ),
    "holes.pt": (with_bytes(bytes(100_000)), "it begins with 4096 zeros"),
    "zip.safetensors": (with_bytes(zipped({"vae.bin": b"x"})), "it is a ZIP archive; unpack it"),
    "torch.safetensors": (
        torch_file,
        "it is a pickle of torch.save whose name ends like that of a safetensors file; rename it",
    ),
    "safetensors.pt": (renamed, "it is a safetensors file whose name ends in .pt; rename it"),
    "safetensors.ckpt": (renamed, "it is a safetensors file whose name ends in .ckpt; rename it"),
    "gzip.safetensors": (with_bytes(gzip.compress(b"x" * 100)), "it is a gzip archive"),
    "tar.pt": (with_bytes(tarred()), "it is a tar archive"),
    "array.pt": (with_bytes(array()), "it is a NumPy array"),
    "png.safetensors": (with_bytes(png()), "it is a PNG image, not a model"),
    "protocol.pt": (with_bytes(b"\x80\x06cbuiltins\nlist\n."), "it is a pickle that holds more than plain weights"),
    "keras.pt": (with_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "it is an HDF5 file"),
    "cut_in_the_header.safetensors": (cut_in_the_header, "it is truncated: it has 500 bytes, and its header alone takes "),
    "longer.safetensors": (with_bytes_behind, "it has 10 bytes too many; download it again"),
}

ONLY_VALUES = {"infinite.safetensors", "zeros.safetensors", "too_large.safetensors", "constant.safetensors"}
"""Files whose headers are right. The doctor reads the values of the default VAE alone."""


@pytest.mark.parametrize("name", WRONG)
def test_wrong_file_is_refused_by_name_with_the_next_step(
    name: str, model_dir: Path, respond: Encode, tmp_path: Path, encoder: LatentEncoder, settings: Settings
) -> None:
    """The request gets VAE_MODEL_INVALID with the reason, and the doctor reports no such file as one that can be loaded."""
    make, words = WRONG[name]
    path = model_dir / "vae" / name
    make(path)
    response = respond("photo.jpg", vae_model_name=name)
    assert isinstance(response, ErrorResponse)
    assert response.error_code == ErrorCode.VAE_MODEL_INVALID
    assert words in response.error_message
    assert response.error_message.startswith(f"VAE model {name} cannot be used ({path}): ")
    assert "\n" not in response.error_message
    assert list(tmp_path.iterdir()) == []
    check = check_file(encoder.runtime, name, path, settings)
    assert (isinstance(check, Check) and check.state is State.TICK) == (name in ONLY_VALUES)
    path.unlink()


HARMLESS: dict[str, Change] = {
    "loss of training": lambda weights: weights.update(
        {"loss.logvar": torch.ones(1), "loss.discriminator.0.weight": torch.ones(2)}
    ),
    "moving averages": lambda weights: weights.update(
        {"model_ema.decay": torch.ones(1), "model_ema.encoderconv1": torch.ones(2)}
    ),
    "scales of the decoder": lambda weights: weights.update({"decoder.conv1.scale_weight": torch.ones(1)}),
    "counter": lambda weights: weights.update({"encoder.norm.num_batches_tracked": torch.ones((), dtype=torch.int64)}),
    "integers in the decoder": lambda weights: weights.update({"decoder.head.2.bias": torch.ones(3, dtype=torch.int8)}),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_left_over_tensors_that_encoding_does_not_use_are_fine(name: str, model_dir: Path, encode: Encode) -> None:
    """Published files have them; the latent is that of the file without them."""
    path = model_dir / "vae" / f"{name}.safetensors"
    with_change(HARMLESS[name])(path)
    latent = load_latent(encode("photo.jpg", vae_model_name=path.name).latent_file_path)
    assert torch.equal(latent, load_latent(encode("photo.jpg").latent_file_path))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.float16])
def test_plain_casts_are_fine(dtype: torch.dtype, model_dir: Path, encode: Encode) -> None:
    """Weights that were only rounded to 8 bits, as ComfyUI loads them too, give a similar latent."""
    path = model_dir / "vae" / f"{str(dtype).removeprefix('torch.')}.safetensors"
    with_change(cast(dtype))(path)
    latent = load_latent(encode("photo.jpg", vae_model_name=path.name).latent_file_path)
    expected = load_latent(encode("photo.jpg").latent_file_path)
    assert (latent - expected).abs().mean() < 0.5 * expected.std()


def test_scales_that_are_lost_show_in_the_latent(model_dir: Path, respond: Encode) -> None:
    """A file of 8-bit weights without their scales passes each check of its tensors; its latent is far too large."""
    path = model_dir / "vae" / "lost_scales.safetensors"
    with_change(scale_and_lose_the_scales)(path)
    response = respond("photo.jpg", vae_model_name=path.name)
    assert isinstance(response, ErrorResponse), response
    assert "from a test image it makes values of about " in response.error_message
    assert "quantised without their scales; get the file in bf16, fp16 or fp32" in response.error_message
