"""Input images: read once and checked strictly by their content, before ComfyUI gets them.

LoadImage accepts a truncated file silently and takes an animation for a video. So the bytes are checked first, and LoadImage
then reads the same bytes from a file of ours (see `images/input_folder.py`). A change to the source file meanwhile does not
matter: the checked bytes are encoded, and the checksum is theirs.
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

from PIL import Image, ImageFile

from config import Settings
from errors import OUT_OF_MEMORY, EncodingFailed, ImageInvalid, ImageNotFound
from latent_encoder.access import AllowedFolders
from latent_encoder.geometry import Size
from latent_encoder.images.contents import fault_of, fault_of_jpeg
from latent_encoder.images.faults import ImageFault
from latent_encoder.images.features import Feature, FurtherImages, features_of
from latent_encoder.images.input_folder import Ending
from latent_encoder.images.jpeg_markers import FIRST_BYTES, scans, without_further_images
from latent_encoder.images.png import SIGNATURE, PngFacts, check_png, without

MAX_JPEG_SCANS = 100  # encoders write about ten; a JPEG of a few kilobytes with thousands of scans would decode for hours

FORMATS = ("JPEG",)  # a JPEG with further images, which Pillow calls MPO, is opened as a JPEG

PILLOW_LOCK = threading.Lock()
"""Held while LoadImage runs and while an image is checked: LoadImage sets Pillow's process-wide LOAD_TRUNCATED_IMAGES."""


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings about odd files: faults that matter are refused, changes are noted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        yield


@dataclass(frozen=True)
class ImageLimits:
    """Allowed folders and sizes of input images."""

    folders: AllowedFolders
    max_bytes: int
    max_pixels: int

    @classmethod
    def of(cls, settings: Settings) -> ImageLimits:
        """Return the limits of the settings."""
        folders = AllowedFolders("ALLOWED_INPUT_DIRS", settings.allowed_input_dirs)
        return cls(folders, settings.max_image_bytes, settings.max_image_pixels)


@dataclass(frozen=True)
class SourceImage:
    """An image file that passed every check."""

    data: bytes
    """Bytes of the file. A JPEG with further images lacks its index of them: LoadImage would decode them all. A PNG lacks
    metadata that Pillow cannot read.
    """
    sha256: str
    """Checksum of the file, with them."""
    ending: Ending
    """Ending of a file name for its format."""
    size: Size
    """Size in the header, before any EXIF orientation."""
    features: tuple[Feature, ...]
    """Features that LoadImage treats differently in each release."""


def read_image(path: str, limits: ImageLimits) -> SourceImage:
    """Read and check the image file at `path`. Hold `PILLOW_LOCK` meanwhile.

    Raises:
        AccessDenied: it is in none of the allowed folders.
        ImageNotFound: there is no such file.
        ImageInvalid: it cannot be read, is not a JPEG or PNG by its content, is damaged, truncated or animated, or is
            larger than the limits allow.
    """
    data = read_file(path, limits)
    try:
        source = _judged(data, limits.max_pixels)
    except ImageFault as exc:
        raise ImageInvalid(f"Image file {exc}: {path}") from exc.__cause__
    except MemoryError as exc:
        raise EncodingFailed(f"Image file cannot be read, {OUT_OF_MEMORY}: {path}") from exc
    return source


def _judged(data: bytes, max_pixels: int) -> SourceImage:
    """Return the image in the file.

    Raises:
        ImageFault: there is none, or one that is not to be encoded.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    if data.startswith(SIGNATURE):
        facts = check_png(data, max_pixels)
        shown = without(data, facts.unreadable)
        size = Size(facts.header.width, facts.header.height)
        return SourceImage(shown, sha256, ".png", size, _features_of_png(shown, facts))
    if not data.startswith(FIRST_BYTES) or len(data) == len(FIRST_BYTES):
        raise fault_of(data)
    try:
        size, features = _inspect(data, max_pixels)
        _decode_strictly(data)
    except (ImageFault, MemoryError):
        raise
    except Exception as exc:
        raise fault_of_jpeg(data) from exc
    shown = without_further_images(data) if FurtherImages() in features else data
    return SourceImage(shown, sha256, ".jpg", size, features)


def _features_of_png(data: bytes, facts: PngFacts) -> tuple[Feature, ...]:
    """Return the features of a PNG that passed `check_png`."""
    tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(BytesIO(data), formats=("PNG",)) as image:
            return features_of(image, data)
    except MemoryError:
        raise
    except Exception as exc:
        raise ImageFault("cannot be decoded by Pillow, although its PNG structure is sound; save it again") from exc
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


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


def _inspect(data: bytes, max_pixels: int) -> tuple[Size, tuple[Feature, ...]]:
    """Check size and number of scans of a JPEG from its header, without decoding; return size and features."""
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise ImageFault(_too_large(max_pixels)) from exc
    with image:
        size = Size(*image.size)
        if size.width * size.height > max_pixels:
            raise ImageFault(_too_large(max_pixels, f", {size}"))
        if (count := scans(data)) > MAX_JPEG_SCANS:
            raise ImageFault(f"has {count} scans, more than {MAX_JPEG_SCANS}; save it as a usual JPEG")
        return size, features_of(image, data)


def _too_large(max_pixels: int, size: str = "") -> str:
    return f"has more than MAX_IMAGE_PIXELS={max_pixels} pixels{size}; scale it down, or raise the limit"


def _decode_strictly(data: bytes) -> None:
    """Decode every pixel of a JPEG; LoadImage tolerates that some are missing."""
    tolerant = ImageFile.LOAD_TRUNCATED_IMAGES  # some custom node packages turn it on permanently
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            image.load()
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant
