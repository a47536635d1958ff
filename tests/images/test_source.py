"""Input images: those that are accepted, those that are refused and with which words, and the notes."""

from __future__ import annotations

import os
import shutil
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from safetensors.torch import load_file

from config import Settings
from errors import ErrorCode, ImageInvalid, ImageNotFound
from fuzz import jpegs
from latent_encoder.access import ANYWHERE
from latent_encoder.images.features import FurtherImages
from latent_encoder.images.jpeg_markers import scans
from latent_encoder.images.jpeg_structure import MAX_JPEG_SCANS
from latent_encoder.images.source import ImageLimits, read_image
from models import ErrorResponse
from service import LatentEncoder
from tests.helpers import IMAGES, Encode, load_latent, request_for, stock
from tests.trees import IS_PINNED

pytestmark = pytest.mark.core

LIMITS = ImageLimits(ANYWHERE, max_bytes=1_000_000, max_pixels=1_000_000)

REFUSED = {
    "empty.png": "is empty",
    "text.png": "is text; give a JPEG or PNG",
    "truncated.png": "is damaged",
    "truncated.jpg": "is damaged",
    "cut_after_20_bytes.png": "is damaged",
    "bad_checksum.png": "is damaged",
    "animated.png": "is animated, 2 frames",
    "decompression_bomb.png": "more than MAX_IMAGE_PIXELS=89478485 pixels",
    "tiff_named.png": "is a TIFF image; convert it to JPEG or PNG",
    "gif_named.png": "is a GIF image; convert it to JPEG or PNG",
    "webp_named.png": "is a WebP image; convert it to JPEG or PNG",
    "bmp_named.png": "is a BMP image; convert it to JPEG or PNG",
}


@pytest.mark.parametrize("name", REFUSED)
def test_file_that_is_no_proper_image_is_refused(name: str, respond: Encode, tmp_path: Path) -> None:
    """IMAGE_INVALID has the fault and the file's path, and no file is written."""
    response = respond(name)
    assert isinstance(response, ErrorResponse)
    assert response.error_code == ErrorCode.IMAGE_INVALID
    assert REFUSED[name] in response.error_message
    assert str(IMAGES / name) in response.error_message
    assert list(tmp_path.iterdir()) == []


def folder(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere.png"))


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def nothing(path: Path) -> None:
    del path


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (nothing, ErrorCode.IMAGE_NOT_FOUND, "Image file not found"),
        (dangling_link, ErrorCode.IMAGE_NOT_FOUND, "Image file not found"),
        (folder, ErrorCode.IMAGE_INVALID, "is a folder"),
        (pipe, ErrorCode.IMAGE_INVALID, "is not a regular file"),
        (link_to_itself, ErrorCode.IMAGE_INVALID, "cannot be read"),
    ],
)
def test_path_without_a_readable_file_is_answered(
    make: Callable[[Path], None], code: ErrorCode, words: str, respond: Encode, tmp_path: Path
) -> None:
    """No path blocks the service or raises; the message has the path."""
    path = tmp_path / "input.png"
    make(path)
    response = respond(path)
    assert isinstance(response, ErrorResponse)
    assert response.error_code == code
    assert words in response.error_message
    assert str(path) in response.error_message


def test_path_through_a_file_is_not_found(respond: Encode) -> None:
    """`photo.jpg/x.png` does not exist, whatever errno the system has for it."""
    assert respond("photo.jpg/x.png").error_code == ErrorCode.IMAGE_NOT_FOUND


def test_pixel_limit_is_checked() -> None:
    """A limit below the image's size refuses it and says both; at the limit it is accepted."""
    path = str(IMAGES / "photo.jpg")
    with pytest.raises(ImageInvalid, match=r"MAX_IMAGE_PIXELS=6143 pixels.*96 x 64 px"):
        read_image(path, replace(LIMITS, max_pixels=96 * 64 - 1))
    assert read_image(path, replace(LIMITS, max_pixels=96 * 64)).features == ()


def test_byte_limit_is_checked() -> None:
    """The limit in bytes is checked before a byte is read."""
    path = IMAGES / "photo.jpg"
    size = path.stat().st_size
    with pytest.raises(ImageInvalid, match=rf"has {size} bytes, more than MAX_IMAGE_BYTES={size - 1}; .*: {path}$"):
        read_image(str(path), replace(LIMITS, max_bytes=size - 1))
    assert read_image(str(path), replace(LIMITS, max_bytes=size)).data == path.read_bytes()


def test_service_has_the_byte_limit_of_its_settings(encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> None:
    """MAX_IMAGE_BYTES refuses a larger file, and names the limit."""
    limited = LatentEncoder(settings.model_copy(update={"max_image_bytes": 100}), encoder.runtime)
    response = limited.respond(request_for(settings, tmp_path, "photo.jpg", {}))
    assert isinstance(response, ErrorResponse)
    assert response.error_code == ErrorCode.IMAGE_INVALID
    assert "more than MAX_IMAGE_BYTES=100" in response.error_message


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system has no file with more bytes than it states")
def test_file_is_not_read_beyond_its_size() -> None:
    """A file in /proc, which states 0 bytes and has many, stands for one that grows while it is read."""
    with pytest.raises(ImageInvalid, match="grew while it was read"):
        read_image("/proc/self/smaps", LIMITS)


def test_what_is_no_file_leaves_no_descriptor_open(tmp_path: Path) -> None:
    """Requests that name a folder or a pipe leave no descriptor open."""
    pipe(tmp_path / "pipe")
    before = len(list(Path("/dev/fd").iterdir()))
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "nothing", "/"):
        with pytest.raises((ImageInvalid, ImageNotFound)):
            read_image(str(path), LIMITS)
    assert len(list(Path("/dev/fd").iterdir())) == before


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


BOMB = zlib.compress(bytes(100_000_000), 9)  # a tenth of a megabyte
HIDDEN = {
    "colour profile": chunk(b"iCCP", b"profile\0\0" + BOMB),
    "compressed text": chunk(b"zTXt", b"text\0\0" + BOMB),
    "international text": chunk(b"iTXt", b"text\0\1\0\0\0" + BOMB),
    "many texts": 70 * chunk(b"zTXt", b"text\0\0" + zlib.compress(bytes(1_000_000), 9)),
}


@pytest.mark.parametrize("place", [b"IDAT", b"IEND"])
@pytest.mark.parametrize("name", HIDDEN)
def test_bomb_beside_the_pixels_does_no_harm(name: str, place: bytes, encode: Encode, tmp_path: Path) -> None:
    """A small PNG with large compressed text before or after its pixels is encoded, and does not fill the memory."""
    before, after = (IMAGES / "rgba.png").read_bytes().split(place, 1)
    image = tmp_path / "bomb.png"
    image.write_bytes(before[:-4] + HIDDEN[name] + before[-4:] + place + after)
    tracemalloc.start()
    response = encode(image)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 80_000_000
    assert torch.equal(load_latent(response.latent_file_path), load_latent(encode("rgba.png").latent_file_path))


NOTES = {
    "photo.jpg": (),
    "grey.png": (),
    "rgba.png": ("alpha_dropped",),
    "grey_with_alpha.png": ("alpha_dropped",),
    "palette_with_transparency.png": ("alpha_dropped",),
    "exif_orientation_6.jpg": ("exif_orientation_applied",),
    "grey_16_bit.png": ("clipped_to_8_bit",),
    "two_frames_mpo.jpg": ("first_frame_used",),
}


@pytest.fixture(scope="module")
def loaded(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return the pixels that plain ComfyUI's LoadImage gives for the images in `NOTES`."""
    out = tmp_path_factory.mktemp("stock") / "loaded.safetensors"
    stock("load", model_dir, out, *[IMAGES / name for name in NOTES])
    return {name: load_file(out)[str(number)] for number, name in enumerate(NOTES)}


def seen(name: str, pixels: torch.Tensor) -> tuple[str, ...]:
    """Return the notes for an image, by comparing LoadImage's pixels with those that Pillow reads from the file."""
    with Image.open(IMAGES / name) as image:
        readings = {note: as_pixels(reading) for note, reading in READINGS[name](image).items()}
    fitting = [note for note, reading in readings.items() if fits(pixels[:1], reading)]
    assert len(fitting) == 1, f"LoadImage's pixels of {name} fit {fitting} of {list(readings)}"
    return tuple(filter(None, fitting))


def as_pixels(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, image.height, image.width, 3) / 255


def fits(pixels: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether the pixels are about equal: JPEG decoders differ by under 0.01 on average, different images by more."""
    return pixels.shape == expected.shape and float((pixels - expected).abs().mean()) < 0.01


Readings = Callable[[Image.Image], dict[str, Image.Image]]


def plainly(note: str) -> Readings:
    return lambda image: {note: image.convert("RGB")}


def over_black(image: Image.Image) -> dict[str, Image.Image]:
    black = Image.new("RGBA", image.size, "black")
    return {
        "alpha_dropped": image.convert("RGBA").convert("RGB"),
        "alpha_applied": Image.alpha_composite(black, image.convert("RGBA")).convert("RGB"),
    }


def turned(image: Image.Image) -> dict[str, Image.Image]:
    return {"exif_orientation_applied": ImageOps.exif_transpose(image), "exif_orientation_ignored": image.copy()}


def sixteen_bits(image: Image.Image) -> dict[str, Image.Image]:
    values = np.asarray(image)
    clipped, kept = values.clip(0, 255), values // 257
    return {
        note: Image.fromarray(grey.astype("uint8")).convert("RGB")
        for note, grey in {"clipped_to_8_bit": clipped, "": kept}.items()
    }


READINGS: dict[str, Readings] = {
    "photo.jpg": plainly(""),
    "grey.png": plainly(""),
    "rgba.png": over_black,
    "grey_with_alpha.png": over_black,
    "palette_with_transparency.png": over_black,
    "exif_orientation_6.jpg": turned,
    "grey_16_bit.png": sixteen_bits,
    "two_frames_mpo.jpg": plainly("first_frame_used"),
}


@pytest.mark.parametrize("name", NOTES)
def test_metadata_notes_what_loading_changed(name: str, encode: Encode, loaded: dict[str, torch.Tensor]) -> None:
    """Changes that a person would not expect are in `image_notes`, as they are seen in the pixels of this tree's LoadImage."""
    notes = encode(name).metadata.image_notes
    assert notes == seen(name, loaded[name])
    if IS_PINNED:
        assert notes == NOTES[name]


def test_size_in_the_metadata_is_that_of_the_loaded_image(encode: Encode, loaded: dict[str, torch.Tensor]) -> None:
    """A 96 x 64 photo that is to be turned by 90 degrees is 64 wide and 96 high, if this tree's LoadImage turns it."""
    assert encode("photo.jpg").metadata.original_image_shape == (64, 96, 3)
    turned = encode("exif_orientation_6.jpg").metadata.original_image_shape
    assert turned == tuple(loaded["exif_orientation_6.jpg"].shape[1:])
    if IS_PINNED:
        assert turned == (96, 64, 3)


def test_alpha_is_dropped_as_load_image_does(encode: Encode) -> None:
    """An image and the same image with an alpha channel give one latent."""
    with Image.open(IMAGES / "rgba.png") as image:
        opaque = Path(encode("photo.jpg").latent_file_path).with_name("opaque.png")
        image.convert("RGB").save(opaque)
    assert torch.equal(load_latent(encode("rgba.png").latent_file_path), load_latent(encode(opaque).latent_file_path))


@pytest.mark.parametrize(
    "name",
    [
        "día größe 写真.jpg",
        "two  spaces .jpg",
        "photo.jpg [output]",
        "photo[input]",
        "[temp].jpg",
        "a'b\"c;$(d).jpg",
        "-v.jpg",
    ],
)
def test_name_has_no_meaning(name: str, encode: Encode, tmp_path: Path) -> None:
    """The file of that very name is encoded, whatever ComfyUI would make of it."""
    folder = tmp_path / "in [output]"
    folder.mkdir()
    shutil.copy(IMAGES / "photo.jpg", folder / name)
    expected = load_latent(encode("photo.jpg").latent_file_path)
    assert torch.equal(load_latent(encode(folder / name).latent_file_path), expected)


def test_symlink_is_followed_and_names_the_files(encode: Encode, tmp_path: Path) -> None:
    """The link's own name is the stem."""
    (tmp_path / "link.jpg").symlink_to(IMAGES / "photo.jpg")
    response = encode(tmp_path / "link.jpg")
    assert Path(response.latent_file_path).name == "latent_link_test.pt"
    assert response.metadata.image_sha256 == encode("photo.jpg").metadata.image_sha256


@pytest.mark.parametrize("name", ["truncated.png", "truncated.jpg", "bad_checksum.png"])
def test_damage_is_found_where_others_tolerate_it(name: str, respond: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Custom node packages set Pillow's tolerance for the whole process: our check is strict all the same."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert respond(name).error_code == ErrorCode.IMAGE_INVALID
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_pillow_is_as_strict_after_a_request_as_before(respond: Encode) -> None:
    """LoadImage's tolerance of truncated files does not outlive it."""
    respond("two_frames_mpo.jpg")
    respond("truncated.png")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_jpeg_of_too_many_scans_is_refused(respond: Encode, tmp_path: Path) -> None:
    """Each scan costs a pass over all pixels, even a short one: too many are refused, 64 are encoded."""
    path = tmp_path / "scans.jpg"
    path.write_bytes(jpegs.flat(96, 64, MAX_JPEG_SCANS + 1))
    response = respond(path)
    assert response.error_code == ErrorCode.IMAGE_INVALID
    assert f"has more than {MAX_JPEG_SCANS} scans" in response.error_message
    path.write_bytes(jpegs.flat(96, 64, 64))
    assert respond(path).status == "success"


def test_scans_are_those_of_the_first_image() -> None:
    """Bytes that look like a scan in a comment or behind the image's end are not counted."""
    segments, rest = jpegs.parse((IMAGES / "photo.jpg").read_bytes())
    assert scans(jpegs.build([(0xFE, b"\xff\xda" * 9), *segments], rest) + b"\xff\xda" * 9) == 1


def test_further_images_of_a_jpeg_are_not_decoded(tmp_path: Path, encode: Encode) -> None:
    """LoadImage would hold every one of them as floats: a small file with many would take any amount of memory."""
    path = tmp_path / "many.jpg"
    with Image.open(IMAGES / "photo.jpg") as photo:
        photo.save(path, "MPO", save_all=True, append_images=[photo] * 9)
    source = read_image(str(path), LIMITS)
    assert source.features == (FurtherImages(),)
    with Image.open(BytesIO(source.data)) as given, Image.open(path) as first:
        assert given.format == "JPEG"
        assert given.tobytes() == first.tobytes()
    assert encode(path).metadata.image_notes == ("first_frame_used",)


@pytest.mark.parametrize(
    ("behind", "notes"), [(b"\0" * 4000, ("first_frame_used",)), (b"", ("first_frame_used",)), (b"moov", ())]
)
def test_image_behind_the_first_is_noted_without_an_index(
    behind: bytes, notes: tuple[str, ...], encode: Encode, tmp_path: Path
) -> None:
    """Gain maps of phones; a film that is appended to a photo is no image."""
    photo = (IMAGES / "photo.jpg").read_bytes()
    (tmp_path / "phone.jpg").write_bytes(photo + behind + photo)
    response = encode(tmp_path / "phone.jpg")
    assert response.metadata.image_notes == notes
    assert torch.equal(load_latent(response.latent_file_path), load_latent(encode("photo.jpg").latent_file_path))


def test_odd_exif_is_no_reason_to_warn_or_fail(encode: Encode, tmp_path: Path) -> None:
    """Pillow warns of an entry that lies outside the file; here, warnings are errors."""
    entry = b"\x0e\x01\x02\x00\xff\x00\x00\x00\x08\x00\x00\x00"  # a description that is longer than the file
    exif = (0xE1, b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + b"\0\0\0\0")
    segments, rest = jpegs.parse((IMAGES / "photo.jpg").read_bytes())
    path = tmp_path / "exif.jpg"
    path.write_bytes(jpegs.build([exif, *segments], rest))
    with pytest.warns(UserWarning, match="Tag data larger than file"), Image.open(path) as image:
        image.getexif()
    assert encode(path).metadata.image_notes == ()
