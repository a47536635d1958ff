"""Draw docs/sample.png: the portrait, its latent, and the portrait decoded from it.

    python scripts/draw_sample.py

The latent is that of the tiny VAE; its three principal components are shown as red, green and blue.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from config import Settings
from models import EncodeRequest, SuccessResponse
from service import LatentEncoder

PANEL = 384
CAPTION = 30
GAP = 12
VAE = "tiny_qwen_vae.safetensors"


def main() -> None:
    encoder = LatentEncoder.set_up(Settings(_env_file=None))
    with tempfile.TemporaryDirectory() as folder:
        request = EncodeRequest(
            image_path=str(PROJECT / "tests/fixtures/test_images/astronaut.png"),
            vae_model_name=VAE,
            megapixels=0.25,
            output_dir=folder,
        )
        response = encoder.encode(request)
        photo = Image.open(response.scaled_image_path).crop(response.metadata.crop)
        latent = torch.load(response.latent_file_path, weights_only=True)
    rows, columns = latent.shape[2:]
    panels = {
        f"photo, {photo.width} x {photo.height}": photo,
        f"latent, 16 x {columns} x {rows}": principal_colours(latent),
        "decoded from the latent": decoded(encoder, latent),
    }
    joined(panels).save(PROJECT / "docs" / "sample.png", optimize=True)
    print(describe(response))


def principal_colours(latent: torch.Tensor) -> Image.Image:
    """Return an image of the three principal components of a latent `[1, channels, height, width]`.

    Each component is stretched so that its 1 % and 99 % quantiles become 0 and 255.
    """
    channels, height, width = latent.shape[1:]
    cells = latent[0].reshape(channels, -1).T
    _, _, directions = torch.pca_lowrank(cells, q=3, niter=8)
    values = (cells - cells.mean(0)) @ directions
    low, high = values.quantile(0.01, 0), values.quantile(0.99, 0)
    return as_image(((values - low) / (high - low)).view(height, width, 3))


def decoded(encoder: LatentEncoder, latent: torch.Tensor) -> Image.Image:
    """Return the image that ComfyUI's VAEDecode makes of a latent of one frame."""
    decode: Any = encoder.runtime.nodes["VAEDecode"]()
    with torch.inference_mode():
        pixels = decode.decode(encoder.vaes.get(VAE).vae, {"samples": latent.unsqueeze(2)})[0]
    return as_image(pixels.reshape(pixels.shape[-3:]))


def as_image(pixels: torch.Tensor) -> Image.Image:
    """Return a tensor `[height, width, 3]` in [0, 1] as an image."""
    return Image.fromarray(pixels.clamp(0, 1).mul(255).round().to(torch.uint8).numpy())


def joined(panels: dict[str, Image.Image]) -> Image.Image:
    """Return the panels side by side, each with its caption."""
    canvas = Image.new("RGB", (len(panels) * (PANEL + GAP) - GAP, PANEL + CAPTION), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=18)
    for number, (caption, image) in enumerate(panels.items()):
        left = number * (PANEL + GAP)
        resampling = Image.Resampling.NEAREST if image.width < PANEL else Image.Resampling.LANCZOS  # cells stay visible
        canvas.paste(image.resize((PANEL, PANEL), resampling), (left, 0))
        draw.text((left + PANEL / 2, PANEL + CAPTION / 2), caption, fill="black", font=font, anchor="mm")
    return canvas


def describe(response: SuccessResponse) -> str:
    return f"docs/sample.png drawn from a latent of shape {list(response.latent_shape)}"


if __name__ == "__main__":
    main()
