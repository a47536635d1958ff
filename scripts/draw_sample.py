"""Draw docs/sample.png: the portrait, its latent, and the portrait decoded from it.

    python scripts/draw_sample.py

The latent is that of the tiny VAE. The first two are the halves of the preview that `--preview` writes, the third is the image
that `--roundtrip` writes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

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
    encoder = LatentEncoder.set_up(Settings(_env_file=None, preview=True, roundtrip=True))
    with tempfile.TemporaryDirectory() as folder:
        request = EncodeRequest(
            image_path=str(PROJECT / "tests/fixtures/test_images/astronaut.png"),
            vae_model_name=VAE,
            megapixels=0.25,
            output_dir=folder,
        )
        response = encoder.encode(request)
        photo, latent = halves(Image.open(str(response.preview_path)))
        decoded = Image.open(str(response.roundtrip_path)).copy()
    _, channels, rows, columns = response.latent_shape
    panels = {
        f"photo, {photo.width} x {photo.height}": photo,
        f"latent, {channels} x {columns} x {rows}": latent,
        "decoded from the latent": decoded,
    }
    joined(panels).save(PROJECT / "docs" / "sample.png", optimize=True)
    print(describe(response))


def halves(preview: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Return the left and the right half of a preview."""
    middle = preview.width // 2
    return preview.crop((0, 0, middle, preview.height)), preview.crop((middle, 0, preview.width, preview.height))


def joined(panels: dict[str, Image.Image]) -> Image.Image:
    """Return the panels side by side, each with its caption."""
    canvas = Image.new("RGB", (len(panels) * (PANEL + GAP) - GAP, PANEL + CAPTION), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=18)
    for number, (caption, image) in enumerate(panels.items()):
        left = number * (PANEL + GAP)
        canvas.paste(image.resize((PANEL, PANEL), Image.Resampling.LANCZOS), (left, 0))
        draw.text((left + PANEL / 2, PANEL + CAPTION / 2), caption, fill="black", font=font, anchor="mm")
    return canvas


def describe(response: SuccessResponse) -> str:
    return f"docs/sample.png drawn from a latent of shape {list(response.latent_shape)}"


if __name__ == "__main__":
    main()
