"""The PNGs that the service writes."""

from __future__ import annotations

from io import BytesIO

import torch
from PIL import Image

from latent_encoder.outputs.png import png_bytes


def test_png_clips_and_rounds() -> None:
    """Overshoot of bicubic scaling ends at 0 and 255; in between, the nearest 8-bit value is taken."""
    pixels = torch.tensor([-0.2, 1.3, 0.5, 100.4 / 255, 100.6 / 255, 1.0]).view(1, 1, 2, 3)
    with Image.open(BytesIO(png_bytes(pixels))) as png:
        assert list(png.tobytes()) == [0, 255, 128, 100, 101, 255]
