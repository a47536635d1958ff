"""Thumbnails: small images, each within its share of the size that all may have together."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Self

from PIL import Image

PAGE_BYTES = 60_000_000
"""The most bytes of all thumbnails in a page. With 10,000 images, each thumbnail then has about 100 pixels a side."""

PER_IMAGE = 3
"""The image, its latent, its round trip."""

LADDER = ((256, 75), (192, 70), (128, 65), (96, 60), (64, 55), (48, 50), (32, 45), (16, 40))
"""The longest side in pixels and the quality of WebP, from the largest thumbnail to the smallest."""

LEAST_BYTES_A_PIXEL = 0.03
"""Bytes for each pixel of a smooth photo with these qualities. A step that cannot fit by this figure is not tried."""


def share_of(images: int) -> int:
    """Return the most bytes of one thumbnail in a page of that many images. Base64 makes four bytes of three."""
    return PAGE_BYTES * 3 // 4 // (PER_IMAGE * max(images, 1))


def thumbnail(image: Image.Image, most_bytes: int) -> bytes | None:
    """Return the image as a WebP of at most that many bytes and 256 pixels a side; None if the smallest has more."""
    for side, quality in LADDER:
        if side * side * LEAST_BYTES_A_PIXEL > most_bytes and min(image.size) >= side:
            continue
        small = image.convert("RGB")
        small.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=None)
        data = BytesIO()
        small.save(data, "WEBP", quality=quality, method=2)
        if data.tell() <= most_bytes:
            return data.getvalue()
    return None


@dataclass(frozen=True)
class Stored:
    """The place of a thumbnail in the store."""

    offset: int
    length: int


class ThumbnailStore:
    """Thumbnails in a temporary file without a name, which the system removes with the process. Memory has their places."""

    def __init__(self, folder: Path) -> None:
        """Make the file in that folder.

        Raises:
            OSError: it cannot be made.
        """
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # `close` closes it
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, data: bytes) -> Stored:
        """Store a thumbnail.

        Raises:
            OSError: the disk is full.
        """
        self._file.seek(self._end)
        self._file.write(data)
        self._file.flush()
        place = Stored(self._end, len(data))
        self._end += len(data)
        return place

    def read(self, place: Stored, most_bytes: int) -> bytes | None:
        """Return a thumbnail, made smaller if it has more than that many bytes."""
        self._file.seek(place.offset)
        data = self._file.read(place.length)
        if len(data) <= most_bytes:
            return data
        with Image.open(BytesIO(data), formats=("WEBP",)) as image:
            return thumbnail(image, most_bytes)
