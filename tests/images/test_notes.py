"""The notes on images, each with counter-examples: orientations, colour spaces, CMYK, 16 bits."""

from __future__ import annotations

import struct
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from latent_encoder.access import ANYWHERE
from latent_encoder.images.features import Orientation, OtherColours, features_of
from latent_encoder.images.loading import LoadedImage, load_image
from latent_encoder.images.source import ImageLimits, read_image
from service import LatentEncoder
from tests.images.odd_files import (
    ADOBE,
    SRGB,
    exif,
    grey_profile,
    png,
    printer_profile,
    rgb_profile,
    saved,
    srgb_profile,
    with_chunks,
    xmp,
)
from tests.trees import IS_PINNED

pytestmark = pytest.mark.core

LIMITS = ImageLimits(ANYWHERE, max_bytes=1_000_000, max_pixels=1_000_000)
Load = Callable[[bytes], LoadedImage]


@pytest.fixture
def load(encoder: LatentEncoder, tmp_path: Path) -> Load:
    """Return a function that loads an image file with these bytes."""

    def loaded(data: bytes) -> LoadedImage:
        path = tmp_path / "image"
        path.write_bytes(data)
        return load_image(encoder.runtime, str(path), read_image(str(path), LIMITS))

    return loaded


def picture(width: int = 48, height: int = 32) -> Image.Image:
    """Return an image that differs from each of its turns and mirror images, and has many colours."""
    across, down = (
        Image.linear_gradient("L").rotate(90).resize((width, height)),
        Image.linear_gradient("L").resize((width, height)),
    )
    return Image.merge("RGB", (across, down, Image.new("L", (width, height), 90)))


def jpeg(image: Image.Image | None = None, **options: object) -> bytes:
    return saved(image or picture(), "JPEG", quality=95, subsampling=0, **options)


EXIF_CASES = {
    **{f"value {value}": exif(value) for value in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 255, 256 + 6, 65535)},
    **{f"6 of type {kind}": exif(6, kind) for kind in (1, 4, 5, 6, 7, 8, 9)},
    **{f"9 of type {kind}": exif(9, kind) for kind in (4, 5, 8, 9)},
    "no value": exif(6, count=0),
    "two values": exif(6, count=2),
    "no tags": b"MM\0*\0\0\0\x08\0\0\0\0\0\0",
}
XMP_CASES = {f"XMP {value!r}": xmp(value) for value in ("0", "1", "2", "6", "8", "9", "06", "-6", "", "six")}

ASKING = [
    *(f"value {value}" for value in range(2, 9)),
    *(f"6 of type {kind}" for kind in (4, 5, 6, 8, 9)),
    "two values",
    *(f"XMP {value!r}" for value in ("2", "6", "8")),
]
"""The cases that ask for a turn, by Pillow: of any type that is a number, and not a byte."""


def orientation_files() -> dict[str, bytes]:
    """Return files of both formats with an orientation in each place."""
    files, plain = {}, saved(picture(), "PNG")
    for name, tags in EXIF_CASES.items():
        files[f"JPEG, {name}"] = jpeg(exif=b"Exif\0\0" + tags)
        files[f"PNG, {name}"] = with_chunks(plain, (b"eXIf", tags))
        files[f"PNG, {name} behind"] = with_chunks(plain, (b"eXIf", tags), behind=True)
    for name, packet in XMP_CASES.items():
        text, no_tags = (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet), (b"eXIf", EXIF_CASES["no tags"])
        files[f"JPEG, {name}"] = jpeg(xmp=packet)
        files[f"PNG, {name}"] = with_chunks(plain, text)
        files[f"PNG, {name} behind EXIF data without one"] = with_chunks(with_chunks(plain, no_tags), text, behind=True)
    return files


ORIENTATIONS = orientation_files()


@pytest.mark.pinned_release(reason="newer releases take orientations from other places, and mirror none")
@pytest.mark.parametrize("name", ORIENTATIONS)
def test_orientation_is_noted_if_the_image_was_turned(name: str, load: Load) -> None:
    """The note is there exactly if LoadImage's pixels are not those in the file's own order."""
    image = load(ORIENTATIONS[name])
    with Image.open(BytesIO(ORIENTATIONS[name])) as file:
        stored = np.asarray(file.convert("RGB"), dtype=np.float32)[None] / 255
    given = image.pixels.numpy()
    as_stored = given.shape == stored.shape and np.abs(given - stored).mean() < 0.02
    assert image.notes == (() if as_stored else ("exif_orientation_applied",))
    assert as_stored == (not any(f"{case} " in f"{name} " for case in ASKING))


def test_sample_has_the_type_of_the_files_value() -> None:
    """ffmpeg takes an orientation of the type SHORT alone, so a sample of another type would mislead."""
    for kind in (3, 4, 5, 8, 9):
        data = saved(picture(), "JPEG", exif=b"Exif\0\0" + exif(6, kind))
        with Image.open(BytesIO(data)) as image:
            (feature,) = features_of(image, data)
        assert feature == Orientation("JPEG", 6, "exif", kind)
        with Image.open(BytesIO(feature.sample())) as sample:
            assert sample.getexif()[274] == 6
            assert struct.pack(">HH", 274, kind) in sample.info["exif"]
            assert ImageOps.exif_transpose(sample).size == (sample.height, sample.width)


def test_metadata_are_read_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pixels of a PNG are not decoded for its notes, wherever its EXIF data are."""
    data = with_chunks(saved(picture(), "PNG"), (b"eXIf", exif(6)), behind=True)
    with Image.open(BytesIO(data)) as image:
        monkeypatch.setattr(image, "load", lambda: pytest.fail("decoded"))
        assert features_of(image, data) == (Orientation("PNG", 6, "exif"),)


def plain_png(*chunks: tuple[bytes, bytes], image: Image.Image | None = None, **options: object) -> bytes:
    return with_chunks(saved(image or picture(), "PNG", **options), *chunks)


def gama(value: int) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", value)


def chrm(*values: int) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *values)


def camera(space: int, index: str | None = None) -> Image.Exif:
    """Return EXIF data with a `ColorSpace`, and with an interoperability index."""
    tags = Image.Exif()
    tags.get_ifd(0x8769)[0xA001] = space
    if index is not None:
        tags.get_ifd(0x8769)[0xA005] = {1: index}
    return tags


ADOBE_PROFILE = rgb_profile(ADOBE, 2.2)
OTHER_COLOURS = {
    "JPEG, Adobe RGB": jpeg(icc_profile=ADOBE_PROFILE),
    "JPEG, a profile in several segments": jpeg(icc_profile=ADOBE_PROFILE + bytes(200_000)),
    "JPEG, grey of gamma 1.8": jpeg(picture().convert("L"), icc_profile=grey_profile(1.8)),
    "JPEG, CMYK": jpeg(picture().convert("CMYK"), icc_profile=printer_profile()),
    "JPEG, Adobe RGB by EXIF data": jpeg(exif=camera(65535, "R03")),
    "JPEG, Adobe RGB by ColorSpace 2": jpeg(exif=camera(2)),
    "PNG, Adobe RGB": plain_png(icc_profile=ADOBE_PROFILE),
    "PNG with alpha, Adobe RGB": plain_png(image=picture().convert("RGBA"), icc_profile=ADOBE_PROFILE),
    "PNG with a palette, Adobe RGB": plain_png(image=picture().quantize(16), icc_profile=ADOBE_PROFILE),
    "PNG, gamma 1.8 of sRGB's primaries": plain_png(icc_profile=rgb_profile(SRGB, 1.8)),
    "PNG, gAMA 1": plain_png(gama(100_000)),
    "PNG, gAMA 1/1.8": plain_png(gama(55_556)),
    "PNG, cHRM": plain_png(chrm(31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)),
    "PNG, cICP of HDR": plain_png((b"cICP", bytes((9, 16, 0, 1)))),
    "PNG, cICP of another range": plain_png((b"cICP", bytes((1, 13, 0, 0)))),
    "PNG, cICP before gAMA and sRGB": plain_png((b"cICP", bytes((9, 16, 0, 1))), gama(45_455), (b"sRGB", b"\0")),
}
SAME_COLOURS = {
    "JPEG": jpeg(),
    "JPEG, sRGB": jpeg(icc_profile=srgb_profile()),
    "JPEG, grey of gamma 2.2": jpeg(picture().convert("L"), icc_profile=grey_profile(2.2)),
    "JPEG, grey, with a profile for RGB": jpeg(picture().convert("L"), icc_profile=ADOBE_PROFILE),
    "JPEG, with a profile for grey": jpeg(icc_profile=grey_profile(1.8)),
    "JPEG, with a damaged profile": jpeg(icc_profile=ADOBE_PROFILE[:100] + bytes(300)),
    "JPEG, with a cut profile": jpeg(icc_profile=ADOBE_PROFILE[:200]),
    "JPEG, uncalibrated": jpeg(exif=camera(65535)),
    "JPEG, sRGB by EXIF data": jpeg(exif=camera(1, "R98")),
    "JPEG, sRGB before EXIF data": jpeg(exif=camera(2), icc_profile=srgb_profile()),
    "PNG, sRGB": plain_png(icc_profile=srgb_profile()),
    "PNG, gamma 2.2 of sRGB's primaries": plain_png(icc_profile=rgb_profile(SRGB, 2.2)),
    "PNG, gAMA 1/2.2": plain_png(gama(45_455)),
    "PNG, gAMA about 1/2.2": plain_png(gama(47_000)),
    "PNG, gAMA 0": plain_png(gama(0)),
    "PNG, gAMA 1 and sRGB": plain_png(gama(100_000), (b"sRGB", b"\0")),
    "PNG, gAMA 1 and an sRGB profile": plain_png(gama(100_000), icc_profile=srgb_profile()),
    "PNG, cHRM of sRGB": plain_png(chrm(31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)),
    "PNG, cICP of sRGB": plain_png((b"cICP", bytes((1, 13, 0, 1)))),
    "PNG, cICP of BT.709 before a profile": plain_png((b"cICP", bytes((1, 1, 0, 1))), icc_profile=ADOBE_PROFILE),
}


@pytest.mark.parametrize("name", [*OTHER_COLOURS, *SAME_COLOURS])
def test_only_another_colour_space_than_srgb_is_noted(name: str, load: Load) -> None:
    """The note is for a colour space that viewers would apply and that changes the colours."""
    data = OTHER_COLOURS.get(name) or SAME_COLOURS[name]
    image = load(data)
    assert ("colour_profile_ignored" in image.notes) == (name in OTHER_COLOURS)
    assert ("converted_from_cmyk" in image.notes) == ("CMYK" in name)
    assert image.colour_error is None or name in OTHER_COLOURS


def test_error_is_that_of_the_formula(load: Load) -> None:
    """A linear image and one of gamma 1.8 are off by the distance of their curve from sRGB's."""
    values = np.asarray(picture(), np.float64) / 255
    for name, gamma in (("PNG, gAMA 1", 1.0), ("PNG, gAMA 1/1.8", 1.8), ("PNG, gamma 1.8 of sRGB's primaries", 1.8)):
        linear = values**gamma
        shown = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
        assert load(OTHER_COLOURS[name]).colour_error == pytest.approx(np.abs(shown - values).mean() * 255, abs=0.6)


def test_error_of_inks_is_that_of_the_profile(load: Load) -> None:
    """White paper is white by formula and by profile; full black ink is black by formula, and grey by this profile."""
    white, ink = Image.new("CMYK", (64, 64)), Image.new("CMYK", (64, 64), (0, 0, 0, 255))
    assert load(jpeg(white, icc_profile=printer_profile())).colour_error == pytest.approx(0, abs=1)
    error = load(jpeg(ink, icc_profile=printer_profile())).colour_error
    assert error is not None
    assert 100 < error < 230


@pytest.mark.parametrize("mode", ["CMYK", "RGB", "L"])
def test_inks_are_noted(mode: str, load: Load) -> None:
    """A JPEG of four inks has its note with a profile or without; others have none."""
    assert load(jpeg(picture().convert(mode))).notes == (("converted_from_cmyk",) if mode == "CMYK" else ())


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_noted_in_every_mode(colour_type: int, channels: int, load: Load) -> None:
    """Grey, colours and both with alpha: with 16 bits there is a note of the lost bits, with 8 there is none."""
    values = np.full((16, 32, channels), 0x1234)
    values[..., -1] = 0xFFFF if channels in (2, 4) else 0x1234
    notes = load(png(colour_type, 16, values)).notes
    assert load(png(colour_type, 8, values >> 8)).notes == ()
    if IS_PINNED:
        assert notes == (("clipped_to_8_bit",) if colour_type == 0 else ("reduced_to_8_bit",))


@pytest.mark.parametrize("carrier", ["icc", "cICP", "gAMA", "cHRM", "exif"])
def test_sample_names_its_colour_space(carrier: str) -> None:
    """The small image, from which LoadImage's treatment is seen, has the same kind of colour space as the file."""
    feature = OtherColours("JPEG" if carrier == "exif" else "PNG", carrier)  # type: ignore[arg-type]
    data = feature.sample()
    with Image.open(BytesIO(data)) as image:
        assert features_of(image, data) == (feature,)
