"""Input images: read once and checked strictly by their content, before ComfyUI gets them.

LoadImage accepts a truncated file silently and takes an animation for a video. So the bytes are judged first, in a process
apart (see `images/judging.py`). LoadImage then reads the same bytes from a file of ours (see `images/input_folder.py`). A
change to the source file meanwhile does not matter: the checked bytes are encoded, and the checksum is theirs.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Self

from PIL import Image, ImageFile, UnidentifiedImageError

from config import DamagedImages, Settings
from errors import ImageInvalid, ImageNotFound, translated
from latent_encoder.access import AllowedFolders
from latent_encoder.geometry import Size
from latent_encoder.images.faults import ImageDamage, ImageFault
from latent_encoder.images.features import ENDINGS, Feature, FurtherImages, features_of
from latent_encoder.images.input_folder import Ending
from latent_encoder.images.jpeg_markers import without_further_images
from latent_encoder.images.judge import is_judged
from latent_encoder.images.judging import JUDGES

FORMATS = ("JPEG", "PNG")  # a JPEG with further images, which Pillow calls MPO, is opened as a JPEG

PILLOW_LOCK = threading.Lock()
"""Held while LoadImage runs and while a header is read: LoadImage sets Pillow's process-wide LOAD_TRUNCATED_IMAGES."""

IMAGE_TIMEOUT_S = 60.0
"""The default of the setting."""


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings about odd files: faults that matter are refused, changes are noted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        yield


@dataclass(frozen=True)
class ImageLimits:
    """Allowed folders, sizes and damage of input images."""

    folders: AllowedFolders
    max_bytes: int
    max_pixels: int
    timeout_s: float = IMAGE_TIMEOUT_S
    """Seconds that the judgement of an image may take."""
    damaged: DamagedImages = "refuse"

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Return the limits of the settings."""
        return cls(
            AllowedFolders("ALLOWED_INPUT_DIRS", settings.allowed_input_dirs),
            settings.max_image_bytes,
            settings.max_image_pixels,
            settings.image_timeout_s,
            settings.damaged_images,
        )


@dataclass(frozen=True)
class SourceImage:
    """An image file that passed every check."""

    data: bytes
    """Bytes of the file. A JPEG with further images lacks its index of them: LoadImage would decode them all."""
    sha256: str
    """Checksum of the file, with the index."""
    ending: Ending
    """Ending of a file name for its format."""
    size: Size
    """Size in the header, before any EXIF orientation."""
    features: tuple[Feature, ...]
    """Features that LoadImage treats differently in each release."""
    damage: ImageDamage | None = None
    """Damage that DAMAGED_IMAGES lets pass."""


def read_image(path: str, limits: ImageLimits) -> SourceImage:
    """Read and check the image file at `path`. Do not hold `PILLOW_LOCK`.

    Raises:
        AccessDenied: it is in none of the allowed folders.
        ImageNotFound: there is no such file.
        ImageInvalid: it cannot be read, is not a JPEG or PNG by its content, is animated, is larger than the limits allow,
            would take too much time or memory, or is damaged and the limits refuse that.
        EncodingFailed: no process can judge it.
    """
    data = read_file(path, limits)
    damage = _judge(path, data, limits)
    tolerance = _tolerance(damage is not None)
    with PILLOW_LOCK, quiet_pillow(), tolerance, translated(ImageInvalid, f"Image file is damaged: {path}"):
        ending, size, features = _inspect(path, data, limits.max_pixels)
    shown = without_further_images(data) if FurtherImages() in features else data
    return SourceImage(shown, hashlib.sha256(data).hexdigest(), ending, size, features, damage)


def _judge(path: str, data: bytes, limits: ImageLimits) -> ImageDamage | None:
    """Return the damage of a file that is encoded all the same, None of a whole one. Other formats are refused later."""
    if not is_judged(data):
        return None
    try:
        damage = JUDGES.judge(data, limits.max_pixels, limits.timeout_s)
    except ImageFault as exc:
        raise ImageInvalid(f"Image file {exc}: {path}") from exc
    if damage is not None and limits.damaged == "refuse":
        raise ImageInvalid(f"Image file {damage}: {path}") from damage
    return damage


@contextmanager
def _tolerance(is_damaged: bool) -> Iterator[None]:
    """Let Pillow read a damaged file, and be strict with each other one. Some custom node packages set it permanently."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, is_damaged
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def read_file(path: str, limits: ImageLimits) -> bytes:
    """Return the bytes of the image file. Only their number is checked.

    Raises:
        AccessDenied: it is in none of the allowed folders.
        ImageNotFound: there is no such file.
        ImageInvalid: it is empty, too large, growing, not a regular file, or cannot be read.
    """
    try:
        with limits.folders.open_file(path) as descriptor:
            return _read_regular(path, descriptor, limits.max_bytes)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise ImageNotFound(f"Image file not found: {path}") from exc
    except OSError as exc:
        raise ImageInvalid(f"Image file cannot be read: {path} ({exc.strerror})") from exc


def _read_regular(path: str, descriptor: int, max_bytes: int) -> bytes:
    state = os.fstat(descriptor)
    if stat.S_ISDIR(state.st_mode):
        raise ImageInvalid(f"Image path is a folder: {path}")
    if not stat.S_ISREG(state.st_mode):
        raise ImageInvalid(f"Image path is not a regular file: {path}")
    if state.st_size > max_bytes:
        raise ImageInvalid(
            f"Image file has {state.st_size} bytes, more than MAX_IMAGE_BYTES={max_bytes}; "
            f"make it smaller, or raise the limit: {path}"
        )
    with open(descriptor, "rb", closefd=False) as file:
        data = file.read(state.st_size + 1)  # one byte more shows that it grew; the rest of an endless file is not read
    if len(data) > state.st_size:
        raise ImageInvalid(f"Image file grew while it was read; send the request again when it is whole: {path}")
    if not data:
        raise ImageInvalid(f"Image file is empty: {path}")
    return data


def _inspect(path: str, data: bytes, max_pixels: int) -> tuple[Ending, Size, tuple[Feature, ...]]:
    """Check format, size and number of frames from the header, without decoding; return ending, size and features."""
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as exc:
        raise ImageInvalid(f"Image file is not a JPEG or PNG, {_guess(data)}: {path}") from exc
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise ImageInvalid(_too_large(path, max_pixels)) from exc
    with image:
        size, frames = Size(*image.size), getattr(image, "n_frames", 1)
        if size.width * size.height > max_pixels:
            raise ImageInvalid(f"{_too_large(path, max_pixels)} It has {size}.")
        if image.format == "PNG" and frames > 1:
            raise ImageInvalid(f"Image file is animated, {frames} frames; give one of them as an image of its own: {path}")
        return ENDINGS["PNG" if image.format == "PNG" else "JPEG"], size, features_of(image, data)


def _too_large(path: str, max_pixels: int) -> str:
    return f"Image file has more than MAX_IMAGE_PIXELS={max_pixels} pixels; scale it down, or raise the limit: {path}."


def _guess(data: bytes) -> str:
    """Name the format of a file that is neither JPEG nor PNG, by the first bytes that Pillow's other formats look for."""
    Image.init()
    for name, (_, accept) in Image.OPEN.items():
        if accept is not None and accept(data[:16]) is True:
            return f"its content is {name}"
    return "nor any other image that is known, judged by its content"
