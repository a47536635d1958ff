"""Input images: read once, judged by their content before anything is decoded, and handed to ComfyUI as they were read.

ComfyUI's LoadImage accepts a truncated file silently and takes an animation for a video. So the bytes are checked here
first, strictly, and LoadImage then reads those same bytes from a file of ours (see `images/input_folder.py`). What was checked
and hashed is what is encoded, whatever happens to the source meanwhile.
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

from PIL import Image, ImageFile, UnidentifiedImageError

from config import Settings
from errors import ImageInvalid, ImageNotFound, translated
from latent_encoder.access import AllowedFolders
from latent_encoder.geometry import Size
from latent_encoder.images.features import ENDINGS, Feature, FurtherPictures, features_of
from latent_encoder.images.input_folder import Ending
from latent_encoder.images.jpeg_markers import scans, without_further_pictures

MAX_JPEG_SCANS = 100  # encoders write about ten; thousands, in some kilobytes, would be decoded for hours

FORMATS = ("JPEG", "PNG")  # Pillow opens a JPEG with further pictures in it as "MPO"

# LoadImage sets Pillow's process-wide LOAD_TRUNCATED_IMAGES for a moment: nobody may decode strictly just then.
PILLOW_LOCK = threading.Lock()


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """No warnings of Pillow's about what is odd in a file: what matters of it is refused or noted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        yield


@dataclass(frozen=True)
class ImageLimits:
    """Where an input image may lie, and how large it may be."""

    folders: AllowedFolders
    max_bytes: int
    max_pixels: int

    @classmethod
    def of(cls, settings: Settings) -> ImageLimits:
        folders = AllowedFolders("ALLOWED_INPUT_DIRS", settings.allowed_input_dirs)
        return cls(folders, settings.max_image_bytes, settings.max_image_pixels)


@dataclass(frozen=True)
class SourceImage:
    """An image file that passed every check."""

    data: bytes
    """The file's bytes; of a JPEG with further pictures, without the index of them: LoadImage would decode them all."""
    sha256: str
    """Of the file's own bytes."""
    ending: Ending
    """Of a file name for its format."""
    size: Size
    """As the header states it, before any EXIF orientation."""
    features: tuple[Feature, ...]
    """What LoadImage may treat in its own way."""


def read_image(path: str, limits: ImageLimits) -> SourceImage:
    """Read and check the image file at `path`. Hold `PILLOW_LOCK` meanwhile.

    Raises:
        AccessDenied: it is in none of the folders that are allowed.
        ImageNotFound: there is no such file.
        ImageInvalid: it cannot be read, is not a JPEG or PNG by its content, is damaged, truncated or animated, or is
            larger than the limits allow.
    """
    data = read_file(path, limits)
    with translated(ImageInvalid, f"Image file is damaged: {path}"):
        ending, size, features = _inspect(path, data, limits.max_pixels)
        _decode_strictly(data)
        shown = without_further_pictures(data) if FurtherPictures() in features else data
    return SourceImage(shown, hashlib.sha256(data).hexdigest(), ending, size, features)


def read_file(path: str, limits: ImageLimits) -> bytes:
    """The bytes of the image file, unchecked but for their number.

    Raises:
        AccessDenied: it is in none of the folders that are allowed.
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
        data = file.read(state.st_size + 1)  # and no more, however it grows meanwhile
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
        if image.format != "PNG" and (count := scans(data)) > MAX_JPEG_SCANS:
            raise ImageInvalid(f"Image file has {count} scans, more than {MAX_JPEG_SCANS}; save it as a usual JPEG: {path}")
        return ENDINGS["PNG" if image.format == "PNG" else "JPEG"], size, features_of(image, data)


def _too_large(path: str, max_pixels: int) -> str:
    return f"Image file has more than MAX_IMAGE_PIXELS={max_pixels} pixels; scale it down, or raise the limit: {path}."


def _guess(data: bytes) -> str:
    """What a file is that is neither JPEG nor PNG, by the first bytes that Pillow's other formats look for."""
    Image.init()
    for name, (_, accept) in Image.OPEN.items():
        if accept is not None and accept(data[:16]) is True:
            return f"its content is {name}"
    return "nor any other image that is known, judged by its content"


def _decode_strictly(data: bytes) -> None:
    """Decode every pixel and check every checksum, as LoadImage does not."""
    with Image.open(BytesIO(data), formats=FORMATS) as image:
        image.verify()  # a PNG's chunk checksums; after it the image must be opened anew
    tolerant = ImageFile.LOAD_TRUNCATED_IMAGES  # some custom node packages turn it on for good
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            image.load()
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant
