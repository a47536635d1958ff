"""Photos as cameras and editors write them, made from the portrait of the tests: three kinds of files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

PORTRAIT = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "test_images" / "astronaut.png"

KINDS = {"12 MP JPEG": (4000, 3000), "3 MP PNG": (2048, 1536), "1 MP PNG": (1024, 1024)}
"""Width and height in pixels by the name of a kind."""

NOISE = 8  # standard deviation in steps of 256, as of a phone's camera indoors; it makes a file as large as a photo's

JPEG_QUALITY = 92  # of 100, as phones write


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return the portrait at that size, with noise like a camera's."""
    with Image.open(PORTRAIT) as portrait:
        pixels = np.asarray(portrait.convert("RGB").resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    noise = np.random.default_rng(seed).normal(0, NOISE, pixels.shape)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


def make_photos(folder: Path, shrink: int = 1) -> dict[str, Path]:
    """Write a file of each kind, each side divided by `shrink`, and return the files by kind."""
    files = {}
    for kind, (width, height) in KINDS.items():
        file = folder / (kind.replace(" ", "_") + (".jpg" if kind.endswith("JPEG") else ".png"))
        photo(width // shrink, height // shrink).save(
            file, quality=JPEG_QUALITY, compress_level=1
        )  # each format takes its own
        files[kind] = file
    return files
