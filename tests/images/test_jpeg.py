"""JPEGs: damage that decoders hide is found, odd files that are whole are accepted, and hostile ones take no time."""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from config import Settings
from errors import ErrorCode
from fuzz import jpegs
from latent_encoder.images.faults import ImageDamage, ImageFault
from latent_encoder.images.jpeg import check_jpeg
from latent_encoder.images.jpeg_markers import scans
from latent_encoder.images.jpeg_structure import MAX_JPEG_SCANS, MOST_EXIF_SEGMENTS, MOST_PASSES, MOST_SEGMENTS
from models import ErrorResponse, SuccessResponse
from service import LatentEncoder
from tests.helpers import IMAGES, Encode, request_for

MAX_PIXELS = 89_478_485
PHOTO = (IMAGES / "photo.jpg").read_bytes()
SEGMENTS, SCAN = jpegs.parse(PHOTO)
START = len(PHOTO) - len(SCAN)


def photo(**options: Any) -> bytes:
    """Return a JPEG with gradients and noise, 320 x 240, large enough for blocks of 4 KiB."""
    y, x = np.mgrid[0:240, 0:320]
    waves = np.stack([128 + 90 * np.sin(x / (20 + 9 * k)) * np.cos(y / (31 - 5 * k)) for k in range(3)], -1)
    noise = np.random.default_rng(7).normal(0, 12, waves.shape)
    file = BytesIO()
    Image.fromarray((waves + noise).clip(0, 255).astype("uint8")).save(file, "JPEG", **{"quality": 92, **options})
    return file.getvalue()


def check(data: bytes, max_pixels: int = MAX_PIXELS) -> None:
    check_jpeg(bytearray(data), max_pixels)


def fault_of(data: bytes) -> str:
    try:
        check(data)
    except ImageFault as fault:
        return str(fault)
    return "none"


KINDS: Mapping[str, Mapping[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "grey levels of colour": {"subsampling": 0, "optimize": True},
}
WHOLE = {name: photo(**options) for name, options in KINDS.items()}

BLOCK = 4096


def hole_of_zeros(data: bytes, place: int) -> bytes:
    return data[:place] + bytes(BLOCK) + data[place + BLOCK :]


def block_lost(data: bytes, place: int) -> bytes:
    return data[:place] + data[place + BLOCK :]


def block_doubled(data: bytes, place: int) -> bytes:
    return data[: place + BLOCK] + data[place:]


def cut_and_closed(data: bytes, place: int) -> bytes:
    return data[:place] + b"\xff\xd9"


def cut(data: bytes, place: int) -> bytes:
    return data[:place]


def line_ends_converted(data: bytes, place: int) -> bytes:
    return data[:place] + data[place:].replace(b"\n", b"\r\n")


def seven_bits(data: bytes, place: int) -> bytes:
    return data[:place] + bytes(value for value in data[place:-2] if value < 0x80) + data[-2:]


def tail_of_another(data: bytes, place: int) -> bytes:
    del place
    other = photo(quality=70)
    return data[: len(data) // 2] + other[len(other) // 3 :]


def block_of_another(data: bytes, place: int) -> bytes:
    return data[:place] + photo(quality=70)[-BLOCK - 99 : -99] + data[place + BLOCK :]


DAMAGE = (
    hole_of_zeros,
    block_lost,
    block_doubled,
    cut_and_closed,
    cut,
    line_ends_converted,
    seven_bits,
    tail_of_another,
    block_of_another,
)


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_a_transfer_is_found(kind: str, damage: Callable[[bytes, int], bytes]) -> None:
    """A whole file passes; the same file after a fault of a transfer does not, and the words are ours."""
    data = WHOLE[kind]
    check(data)
    with pytest.raises(ImageDamage, match=r"^is damaged: (it|its|one|a) .*; fetch or export it again$") as fault:
        check(damage(data, len(data) // 3))
    assert "Corrupt" not in str(fault.value)


@pytest.mark.core
@pytest.mark.parametrize("damage", [hole_of_zeros, block_lost, cut_and_closed])
def test_damaged_jpeg_is_no_success(damage: Callable[[bytes, int], bytes], respond: Encode, tmp_path: Path) -> None:
    """ComfyUI loads each of these files without an error."""
    path = tmp_path / "damaged.jpg"
    path.write_bytes(damage(WHOLE["baseline"], 9000))
    response = respond(path)
    assert (response.status, response.error_code) == ("error", ErrorCode.IMAGE_INVALID)
    assert re.match(rf"Image file is damaged: .*: {re.escape(str(path))}$", response.error_message)
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def tolerant(encoder: LatentEncoder, settings: Settings) -> LatentEncoder:
    return LatentEncoder(settings.model_copy(update={"damaged_images": "note"}), encoder.runtime)


@pytest.mark.core
def test_damage_is_noted_on_request(tolerant: LatentEncoder, settings: Settings, tmp_path: Path) -> None:
    """With DAMAGED_IMAGES=note, an image that ComfyUI can load is encoded, with `damaged` in `image_notes`."""
    damaged = {
        "hole.jpg": hole_of_zeros(WHOLE["baseline"], 9000),
        "cut.jpg": cut(WHOLE["progressive"], 9000),
        "cut.png": (IMAGES / "truncated.png").read_bytes(),
        "whole.jpg": WHOLE["baseline"],
    }
    for name, data in damaged.items():
        path = tmp_path / name
        path.write_bytes(data)
        response = tolerant.respond(request_for(settings, tmp_path, path, {"request_id": name}))
        assert isinstance(response, SuccessResponse), response
        assert response.metadata.image_notes == (() if name == "whole.jpg" else ("damaged",))


@pytest.mark.core
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (jpegs.flat(96, 64, MAX_JPEG_SCANS + 1), "has more than 100 scans"),
        (PHOTO[:START], "is damaged: it ends before its pixels"),
        (PHOTO[: START + 14], "is damaged: it ends before its pixels"),
        (PHOTO[: START + 4], "is damaged: the header of a scan is not whole"),
        (PHOTO.replace(b"\xff\xdb", b"\xff\xfe"), "is damaged: a table of its quantization is missing"),
    ],
)
def test_some_files_are_refused_in_any_case(
    data: bytes, words: str, tolerant: LatentEncoder, settings: Settings, tmp_path: Path
) -> None:
    """DAMAGED_IMAGES=note lets no hostile file pass, and none without pixels."""
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    response = tolerant.respond(request_for(settings, tmp_path, path, {}))
    assert isinstance(response, ErrorResponse)
    assert response.error_code == ErrorCode.IMAGE_INVALID
    assert words in response.error_message


ICC = b"ICC_PROFILE\0"
ODD: Mapping[str, bytes] = {
    "stray bytes in the header": jpegs.build(SEGMENTS[:1], b"stray\0\xff\0" + jpegs.build(SEGMENTS[1:], b"\r\n" + SCAN)[2:]),
    "bad number of a profile": jpegs.build([(0xE2, ICC + b"\x09\x02" + bytes(9)), *SEGMENTS], SCAN),
    "unknown JFIF version": jpegs.build([(0xE0, b"JFIF\0\x09\x09" + bytes(7)), *SEGMENTS], SCAN),
    "unknown transform of Adobe": jpegs.build([(0xEE, b"Adobe\0\x64\0\0\0\0\x09"), *SEGMENTS], SCAN),
    "markers in a comment": jpegs.build([(0xFE, b"\xff\xda\xff\xd9" * 9), *SEGMENTS], SCAN),
    "an empty comment without its length": PHOTO[:2] + b"\xff\xfe\0\0" + PHOTO[2:],
    "fill bytes before markers": PHOTO[:2] + b"\xff" * 9 + PHOTO[2:-2] + b"\xff" * 9 + PHOTO[-2:],
    "whole words at the end": PHOTO[:-2] + bytes(13) + PHOTO[-2:],
    "a film behind the image": PHOTO + b"\0\0\0\x18ftypmp42" * 99,
    "another image cut short": PHOTO + PHOTO[:-99],
    "a height of one": jpegs.flat_colours(99, 1, ((2, 2), (1, 1), (1, 1))),
    "one pixel": jpegs.flat_colours(1, 1, ((2, 1), (1, 1), (1, 1))),
    "grey with factors": jpegs.flat_colours(40, 40, ((2, 2),)),
    "four colours": jpegs.flat_colours(33, 20, ((1, 1),) * 4),
    "4:1:1": jpegs.flat_colours(70, 33, ((4, 1), (1, 1), (1, 1))),
    "4:4:0": jpegs.flat_colours(70, 33, ((1, 2), (1, 1), (1, 1))),
    "4:1:0": jpegs.flat_colours(70, 33, ((4, 2), (1, 1), (1, 1))),
    "thirds": jpegs.flat_colours(70, 33, ((3, 1), (1, 1), (1, 1))),
    "crossed": jpegs.flat_colours(70, 33, ((2, 1), (1, 2), (1, 1))),
    "a scan for each coefficient": jpegs.flat(96, 64, 64),
    "a restart after each block": jpegs.flat(96, 64, 10, restart=1),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_file_without_damage_is_accepted(name: str) -> None:
    """Cameras and programs write such files, and each of their pixels is there."""
    with Image.open(BytesIO(ODD[name])) as image:
        image.load()
    check(ODD[name])


def test_files_of_pillow_are_accepted() -> None:
    """Every option that Pillow has for a JPEG, at three sizes, gives a file that passes."""
    options: list[dict[str, Any]] = [
        {"quality": quality, "progressive": progressive, "subsampling": subsampling, "optimize": optimize, **restarts}
        for quality in (1, 50, 100)
        for progressive in (False, True)
        for subsampling in (0, 1, 2)
        for optimize in (False, True)
        for restarts in ({}, {"restart_marker_blocks": 1}, {"restart_marker_rows": 1})
    ]
    noise = np.random.default_rng(1)
    for size in ((1, 1), (17, 9), (64, 65)):
        image = Image.fromarray(noise.integers(0, 256, (*size, 3), dtype="uint8"))
        for mode in ("RGB", "L", "CMYK"):
            for option in options:
                file = BytesIO()
                image.convert(mode).save(file, "JPEG", **option)
                check(file.getvalue())


def frame_of(*, marker: int = 0xC0, bits: int = 8, colours: int | None = None) -> bytes:
    """Return the photo with another frame header."""
    changed = [
        (marker, bytes([bits]) + content[1:5] + bytes([colours or content[5]]) + content[6:])
        if kind == 0xC0
        else (kind, content)
        for kind, content in SEGMENTS
    ]
    return jpegs.build(changed, SCAN)


@pytest.mark.core
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (frame_of(bits=12), "is a JPEG with 12 bits a sample, which ComfyUI cannot load; save it with 8 bits"),
        (frame_of(marker=0xC3), "is a lossless JPEG, which ComfyUI cannot load; save it as a PNG"),
        (frame_of(marker=0xC3, bits=16), "is a lossless JPEG"),
        (frame_of(marker=0xC5), "is a hierarchical JPEG"),
        (frame_of(colours=2), "is a JPEG of 2 colours"),
    ],
)
def test_kind_that_comfyui_cannot_load_is_named(data: bytes, words: str, respond: Encode, tmp_path: Path) -> None:
    """The error names the kind of JPEG and the way out."""
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    assert f"Image file {words}" in respond(path).error_message


def test_missing_colour_is_damage() -> None:
    """A scan for the brightness alone, in a file that states three colours, leaves the others grey without a warning."""
    brightness = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + bytes(99) + b"\xff\xd9"
    with pytest.raises(ImageDamage, match="one of its colours is missing"):
        check(jpegs.build(SEGMENTS, brightness))


def hiding(marker: int, scans_behind: int, side: int) -> bytes:
    """Return a JPEG whose scans hide behind a marker with the look of a length of 65535 bytes."""
    first = jpegs.flat(side, side, 1, restart=1)
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00"
    return first[:-2] + b"\xff%c\xff\xff" % marker + scan * scans_behind + first[-2:]


@pytest.mark.parametrize("marker", [0x01, 0x02, 0xBF, 0xD3])
def test_scans_hidden_behind_a_marker_are_counted(marker: int) -> None:
    """libjpeg takes no length after markers below C0 and restarts inside a scan, so it decodes each of these scans."""
    assert scans(hiding(marker, 50, 64)) == 51


HOSTILE: Mapping[str, tuple[Callable[[], bytes], str]] = {
    "hidden scans": (lambda: hiding(0x02, 5000, 4000), "has more than 100 scans"),
    "more hidden scans": (lambda: hiding(0x02, 20_000, 6000), "has more than 100 scans"),
    "few scans of many pixels": (lambda: jpegs.flat(9000, 9000, 64), ""),
    "empty segments": (lambda: b"\xff\xd8" + b"\xff\xe5\0\2" * (4 << 20) + PHOTO[2:], f"more than {MOST_SEGMENTS} segments"),
    "comments between scans": (
        lambda: jpegs.flat(64, 64, 60, between=b"\xff\xfe\0\2" * 9000),
        f"more than {MOST_SEGMENTS} segments",
    ),
    "EXIF data in parts": (
        lambda: jpegs.build([(0xE1, b"Exif\0\0" + bytes(99))] * (MOST_EXIF_SEGMENTS + 1) + SEGMENTS, SCAN),
        f"more than {MOST_EXIF_SEGMENTS} segments of EXIF",
    ),
    "Photoshop's resources": (
        lambda: jpegs.build([(0xED, b"Photoshop 3.0\0" + (b"8BIM" + bytes(8)) * 5000)] * 21 + SEGMENTS, SCAN),
        f"more than {MOST_SEGMENTS} segments",
    ),
    "two frames": (lambda: jpegs.build(SEGMENTS * 2, SCAN), "two frame headers"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_file_that_would_take_much_work_is_judged_at_once(name: str) -> None:
    """A small file whose decoding took seconds to hours is refused, or decoded, within seconds on a busy machine."""
    make, words = HOSTILE[name]
    data = make()
    started = time.monotonic()
    if words:
        with pytest.raises(ImageFault, match=words):
            check(data)
    else:
        check(data)
    assert time.monotonic() - started < 10


def test_scans_are_limited_by_their_pixels() -> None:
    """Forty scans pass in a small image. In one of MAX_IMAGE_PIXELS they are more passes than any encoder makes."""
    check(jpegs.flat(64, 64, 61))
    data = jpegs.flat(1000, 1000, 1 + 3 * MOST_PASSES)
    check(data)
    with pytest.raises(ImageFault, match=r"has 61 scans or more of too many pixels"):
        check(data, 1000 * 1000)


def test_larger_image_is_not_decoded() -> None:
    """The size in the header decides, before a byte of the pixels is decoded."""
    with pytest.raises(ImageFault, match=r"has more than MAX_IMAGE_PIXELS=100 pixels, 96 x 64 px; scale it down"):
        check(PHOTO[: START + 100], 100)


def test_damage_of_the_fuzzer_is_no_other_error() -> None:
    """Whatever is damaged, the check ends in a fault or in nothing."""
    rng = Random(5)  # noqa: S311  # it has to be the same again
    for mutate in jpegs.MUTATIONS:
        for _ in range(3):
            assert fault_of(mutate(PHOTO, rng)).startswith(("is ", "has ", "none"))


def test_length_is_big_endian() -> None:
    """A segment of 256 bytes is skipped whole, with the markers in it."""
    assert scans(PHOTO[:2] + b"\xff\xe9" + struct.pack(">H", 256) + b"\xff\xda" * 127 + PHOTO[2:]) == 1
