"""The colour space that an image file names, and its distance from sRGB, which ComfyUI takes every image for.

Sources: ICC.1:2022 for profiles; the PNG specification, third edition, for the order of a PNG's chunks; DCF 2.0 (Exif) for
cameras that write Adobe RGB without a profile.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageCms, features

from latent_encoder.images.png_metadata import chunks

Carrier = Literal["icc", "cICP", "gAMA", "cHRM", "exif"]
"""The place of a colour space: an ICC profile, one of the chunks of a PNG, or EXIF data."""

Levels = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
"""Values from 0 to 255."""

MOST_LEVELS = 2.5
"""Mean difference from sRGB, in levels of 8 bits, up to which a profile counts as sRGB. A curve of gamma 2.2, which many
programs write in its place, is 2.0 away in grey; gamma 2.0 and Adobe RGB are 4.7 and more."""

MAX_PROFILE_BYTES = 4 * 1024 * 1024
"""Size of a profile up to which it is read. Those of printers, with large tables, have 0.5 to 3 MB."""

SRGB_GAMMA, GAMMA_TOLERANCE = 1 / 2.2, 0.05  # libpng ignores a difference of 5 % too
SRGB_CHROMATICITIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # x and y of white, red, green and blue
CHROMATICITY_TOLERANCE = 0.01  # programs round to two digits
BT709 = 1  # the primaries of sRGB, as a code of cICP (ITU-T H.273)
SRGB_CURVES = (1, 6, 13, 14, 15)  # codes of cICP: sRGB, and BT.709 with its equals
UNCALIBRATED_ADOBE_RGB = "R03"  # the interoperability index of DCF; `ColorSpace` alone names no colour space then
ADOBE_RGB = 2  # a `ColorSpace` that some cameras write

MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # Pillow's modes, by the colour space of a profile
SAMPLED_SIDE = 64  # pixels a side of the image that is measured: 4096 pixels give the mean to about 0.1 levels


@dataclass(frozen=True)
class Colours:
    """A colour space other than sRGB."""

    carrier: Carrier
    profile: bytes = b""
    gamma: float = SRGB_GAMMA

    def error(self, image: Image.Image) -> float | None:
        """Return the mean difference of an image's values from its colours in sRGB, in levels; None if not known.

        The image has the file's own values, in the mode that Pillow opens the file in.
        """
        if self.carrier == "icc":
            return _error_of_profile(self.profile, image)
        if self.carrier == "gAMA":
            values = np.asarray(image.convert("RGB"), np.float64)
            return float(np.abs(_srgb((values / 255) ** (1 / self.gamma)) * 255 - values).mean())
        return None


def colours_of(image: Image.Image, data: bytes) -> Colours | None:
    """Return the colour space of an image that Pillow has opened from `data`; None if it is sRGB, or none is named."""
    return _of_png(image, dict(chunks(data))) if image.format == "PNG" else _of_jpeg(image)


def _of_png(image: Image.Image, chunk: Mapping[bytes, bytes]) -> Colours | None:
    if len(cicp := chunk.get(b"cICP", b"")) == 4:  # primaries, curve, matrix, range
        primaries, curve, _, full_range = cicp
        return None if primaries == BT709 and curve in SRGB_CURVES and full_range else Colours("cICP")
    if b"iCCP" in chunk:
        return _of_profile(_inflated(chunk[b"iCCP"]), image)
    if b"sRGB" in chunk:
        return None
    return _of_gamma_and_primaries(chunk.get(b"gAMA", b""), chunk.get(b"cHRM", b""))


def _of_gamma_and_primaries(gama: bytes, chrm: bytes) -> Colours | None:
    gamma = struct.unpack(">I", gama)[0] / 100_000 if len(gama) == 4 else 0  # one number
    if gamma and abs(gamma / SRGB_GAMMA - 1) > GAMMA_TOLERANCE:
        return Colours("gAMA", gamma=gamma)
    if len(chrm) == struct.calcsize(">8I"):
        found = (value / 100_000 for value in struct.unpack(">8I", chrm))
        if any(abs(a - b) > CHROMATICITY_TOLERANCE for a, b in zip(found, SRGB_CHROMATICITIES, strict=True)):
            return Colours("cHRM")
    return None


def _inflated(iccp: bytes) -> bytes:
    """Return the profile in the chunk iCCP: a name, the method of compression, and compressed data; empty if damaged."""
    try:
        return zlib.decompressobj().decompress(iccp.partition(b"\0")[2][1:], MAX_PROFILE_BYTES + 1)
    except zlib.error:
        return b""


def _of_jpeg(image: Image.Image) -> Colours | None:
    if profile := image.info.get("icc_profile"):
        return _of_profile(profile, image)
    return Colours("exif") if _names_adobe_rgb(image.getexif()) else None


def _names_adobe_rgb(exif: Image.Exif) -> bool:
    try:
        space = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace)
        index = exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex)
    except Exception:  # odd EXIF data are no reason to refuse an image, and Pillow's errors are of any class
        return False
    return space == ADOBE_RGB or index == UNCALIBRATED_ADOBE_RGB


def _of_profile(profile: bytes, image: Image.Image) -> Colours | None:
    """Return the colour space of a profile; None if it is sRGB, damaged, or for another kind of image, as viewers have it."""
    if len(profile) > MAX_PROFILE_BYTES:
        return Colours("icc")
    mode = _mode_of(profile)
    wanted = "CMYK" if image.mode == "CMYK" else "L" if image.mode in ("1", "L", "LA", "I;16") else "RGB"
    if mode != wanted or (mode != "CMYK" and _is_srgb(profile)):
        return None
    return Colours("icc", profile)


@lru_cache(maxsize=8)
def _mode_of(profile: bytes) -> str | None:
    if not features.check("littlecms2"):
        return None  # Pillow's own packages have it; without it, no profile can be judged
    try:
        return MODES.get(ImageCms.ImageCmsProfile(BytesIO(profile)).profile.xcolor_space)
    except (OSError, ImageCms.PyCMSError):
        return None


@lru_cache(maxsize=8)
def _is_srgb(profile: bytes) -> bool:
    """Return whether all colours are about the same in sRGB. The last profiles are remembered: files share a few."""
    error = _error_of_profile(profile, _all_greys() if _mode_of(profile) == "L" else _all_colours())
    return error is None or error <= MOST_LEVELS


def _error_of_profile(profile: bytes, image: Image.Image) -> float | None:
    mode = _mode_of(profile)
    if mode is None:
        return None
    values = image.convert(mode)
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent)
        shown = ImageCms.applyTransform(values, transform)
    except (OSError, ImageCms.PyCMSError):  # viewers ignore a profile that cannot be used
        return None
    assert shown is not None, "only a transform in place gives nothing"
    return float(np.abs(np.asarray(shown, np.float64) - np.asarray(values.convert("RGB"), np.float64)).mean())


def _all_greys() -> Image.Image:
    return Image.fromarray(np.arange(256, dtype=np.uint8)[None])


def _all_colours() -> Image.Image:
    levels = np.arange(0, 256, 51, dtype=np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3))


def _srgb(linear: Levels) -> Levels:
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@cache
def swapped_profile() -> bytes:
    """Return the profile of sRGB with red and blue exchanged: a viewer that applies it shows other colours."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"____").replace(b"bXYZ", b"rXYZ").replace(b"____", b"bXYZ")
