"""The same weights in diffusers' AutoencoderKLQwenImage; as a process, the whole job and nothing else.

python -m benchmarks.encode_diffusers VAE.safetensors IMAGE MEGAPIXELS OUT.pt
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

HOW_TO_INSTALL = (
    "install it with .venv/bin/python -m pip install --require-hashes --no-deps -r requirements/lock/benchmark.txt"
)

# From the names in the VAE's file to the names of diffusers, replaced in this order.
RENAMED = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.downsamples\.", ".down_blocks."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)
RESNETS_IN_UP_BLOCK = 3  # and one layer that scales up; the file numbers all of them through


class Unavailable(Exception):
    """A side cannot run here; the text has the reason and the remedy."""


def diffusers_key(key: str) -> str:
    """Return the name that diffusers has for a tensor of the Wan 2.1 VAE."""
    for pattern, replacement in RENAMED:
        key = re.sub(pattern, replacement, key)
    return re.sub(r"\.upsamples\.(\d+)\.", _up_block, key)


def _up_block(match: re.Match[str]) -> str:
    block, layer = divmod(int(match[1]), RESNETS_IN_UP_BLOCK + 1)
    part = f"resnets.{layer}" if layer < RESNETS_IN_UP_BLOCK else "upsamplers.0"
    return f".up_blocks.{block}.{part}."


def diffusers_version() -> str:
    try:
        return version("diffusers")
    except PackageNotFoundError:
        return "not installed"


def load_diffusers(file: Path) -> Any:
    """Return diffusers' model with the weights of a full-size Wan 2.1 or Qwen-Image VAE, in float32.

    Raises:
        Unavailable: diffusers is not installed, or its model does not have the same tensors.
    """
    try:
        model_class = importlib.import_module("diffusers").AutoencoderKLQwenImage
    except (ImportError, AttributeError, RuntimeError) as exc:  # diffusers turns the first into the last
        raise Unavailable(f"no AutoencoderKLQwenImage ({exc}); {HOW_TO_INSTALL}") from exc
    with torch.device("meta"):
        model = model_class()
    weights = {diffusers_key(key): tensor.float() for key, tensor in load_file(file).items()}
    if different := weights.keys() ^ model.state_dict().keys():
        raise Unavailable(f"its model does not have the same tensors: {', '.join(sorted(different)[:3])}, …")
    model.load_state_dict(weights, assign=True)
    return model.eval()


def main() -> None:
    """Load the VAE, load the image, scale it, encode it, write the latent."""
    file, image_path, megapixels, out = sys.argv[1:]
    with torch.inference_mode():
        model = load_diffusers(Path(file))
        pixels = torch.from_numpy(scaled(Image.open(image_path), float(megapixels)))
        frame = (pixels * 2 - 1).permute(2, 0, 1)[None, :, None]
        torch.save(model.encode(frame).latent_dist.mean[:, :, 0], out)


def scaled(image: Image.Image, megapixels: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return an image as `[height, width, 3]`, float32 in [0, 1], scaled to sides that are multiples of 8 pixels."""
    factor = math.sqrt(megapixels * 1024 * 1024 / (image.width * image.height))
    size = (round(image.width * factor) // 8 * 8, round(image.height * factor) // 8 * 8)
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), dtype=np.float32) / np.float32(255)


if __name__ == "__main__":
    main()
