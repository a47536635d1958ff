"""Input images: read once and checked strictly by their content, before ComfyUI gets them.

LoadImage accepts a truncated file silently and takes an animation for a video. So the bytes are judged first, in a process
apart (see `images/judging.py`). LoadImage then reads the same image from a file of ours (see `images/input_folder.py`). A
change to the source file meanwhile does not matter: the checked bytes are encoded, and the checksum is theirs.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Self

from PIL import Image

from config import DamagedImages, Settings
from errors import ImageInvalid, ImageNotFound, RequestError, is_out_of_memory
from latent_encoder.access import AllowedFolders
from latent_encoder.geometry import Size
from latent_encoder.images.contents import fault_of
from latent_encoder.images.faults import ImageDamage, ImageFault
from latent_encoder.images.features import Feature, FurtherImages, features_of
from latent_encoder.images.input_folder import Ending
from latent_encoder.images.jpeg_markers import without_further_images
from latent_encoder.images.judge import is_judged
from latent_encoder.images.judging import JUDGES
from latent_encoder.images.pillow import quiet_pillow, tolerant_pillow
from latent_encoder.images.png_chunks import SIGNATURE
from latent_encoder.storage.images import read_from_url
from latent_encoder.storage.locations import is_url
from latent_encoder.storage.locations import shown as without_query

IMAGE_TIMEOUT_S: float = Settings.model_fields["image_timeout_s"].default
"""The default of the setting."""


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
            AllowedFolders.of_inputs(settings),
            settings.max_image_bytes,
            settings.max_image_pixels,
            settings.image_timeout_s,
            settings.damaged_images,
        )


@dataclass(frozen=True)
class SourceImage:
    """An image file that passed every check."""

    data: bytes
    """Bytes for LoadImage, with the pixels of the file. A JPEG with further images lacks its index of them: LoadImage would
    decode them all. Of a PNG, it is the copy of `images/png_copy.py`.
    """
    sha256: str
    """Checksum of the file itself."""
    ending: Ending
    """Ending of a file name for its format."""
    size: Size
    """Size in the header, before any EXIF orientation."""
    features: tuple[Feature, ...]
    """Features that LoadImage treats differently in each release."""
    damage: ImageDamage | None = None
    """Damage that DAMAGED_IMAGES lets pass."""


class ImageFile:
    """The file of an image. Its bytes are read when they are asked for, or before that by `read_ahead`."""

    def __init__(self, path: str, limits: ImageLimits) -> None:
        """`path` may be a URL."""
        self.path = path
        self._limits = limits
        self._ahead: bytes | RequestError | None = None
        self.ahead_s = 0.0
        """Seconds that reading ahead took."""

    def read_ahead(self) -> None:
        """Read the bytes now. An error is raised when they are asked for."""
        start = time.perf_counter()
        try:
            self._ahead = read_file(self.path, self._limits)
        except RequestError as exc:
            self._ahead = exc
        self.ahead_s = time.perf_counter() - start

    def checksum(self) -> str:
        """Return the SHA-256 of the bytes.

        Raises:
            RequestError: `read_file` failed.
        """
        return hashlib.sha256(self._read()).hexdigest()

    def checked(self) -> SourceImage:
        """Return the image, whose bytes are then no longer kept here.

        Raises:
            RequestError: `read_file` or `check_image` failed.
        """
        return check_image(self._taken(), self.path, self._limits)

    def _taken(self) -> bytes:
        data, self._ahead = self._read(), None
        return data

    def _read(self) -> bytes:
        if isinstance(self._ahead, RequestError):
            raise self._ahead
        return self._ahead if self._ahead is not None else read_file(self.path, self._limits)


def read_image(path: str, limits: ImageLimits) -> SourceImage:
    """Read and check the image file at `path`, which may be a URL.

    Raises:
        RequestError: `read_file` or `check_image` failed.
    """
    return ImageFile(path, limits).checked()


def check_image(data: bytes, path: str, limits: ImageLimits) -> SourceImage:
    """Check the bytes of the image file at `path`.

    Raises:
        ImageInvalid: it is not a JPEG or PNG by its content, is animated, is larger than the limits allow, would take too much
            time or memory, or is damaged and the limits refuse that.
        EncodingFailed: no process can judge it.
    """
    checksum = cache(lambda: hashlib.sha256(data).hexdigest())
    try:
        shown, damage = _judged(data, limits, checksum)
        with tolerant_pillow() if damage is not None else nullcontext(), quiet_pillow():
            return _source(shown, checksum(), damage)
    except ImageFault as exc:
        raise ImageInvalid(f"Image file {exc}: {without_query(path)}") from exc.__cause__


def _judged(data: bytes, limits: ImageLimits, meanwhile: Callable[[], object]) -> tuple[bytes, ImageDamage | None]:
    """Return the bytes for LoadImage, and the damage of a file that is encoded all the same.

    `meanwhile` is called during the judgement.

    Raises:
        ImageFault: it is not to be encoded.
    """
    if not is_judged(data):
        raise fault_of(data)
    try:
        return JUDGES.judge(data, limits.max_pixels, limits.timeout_s, meanwhile), None
    except ImageDamage as damage:
        if limits.damaged == "refuse":
            raise
        return data, damage


def _source(data: bytes, sha256: str, damage: ImageDamage | None) -> SourceImage:
    """Return the image of bytes that were judged.

    Raises:
        ImageFault: Pillow cannot read its header.
    """
    is_png = data.startswith(SIGNATURE)
    try:
        with Image.open(BytesIO(data), formats=("PNG" if is_png else "JPEG",)) as image:
            size, features = Size(*image.size), features_of(image, data)
    except Exception as exc:
        if is_out_of_memory(exc):
            raise
        raise damage or ImageFault("cannot be read by Pillow, although its structure is sound; save it again") from exc
    if FurtherImages() in features:
        data = without_further_images(data)
    return SourceImage(data, sha256, ".png" if is_png else ".jpg", size, features, damage)


def read_file(path: str, limits: ImageLimits) -> bytes:
    """Return the bytes of the image file. Only their number is checked.

    Raises:
        AccessDenied: it is in none of the allowed folders.
        ImageNotFound: there is no such file.
        ImageInvalid: it is empty, too large, growing, not a regular file, or cannot be read.
        ImageUnreachable: its server cannot be reached or fails.
    """
    if is_url(path):
        return read_from_url(path, limits.folders.urls, limits.max_bytes)
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
