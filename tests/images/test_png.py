"""The structure of a PNG: sound and damaged files of every kind, and the time that the judgement takes."""

from __future__ import annotations

import subprocess
import sys
import time
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file

from errors import ErrorCode, ImageInvalid
from fuzz import pngs
from fuzz.pngs import build, parse
from latent_encoder.access import ANYWHERE
from latent_encoder.images import png, png_unreadable
from latent_encoder.images.faults import ImageDamage, ImageFault
from latent_encoder.images.pillow import quiet_pillow
from latent_encoder.images.png import check_png, read_header
from latent_encoder.images.png_copy import parts_of_copy
from latent_encoder.images.source import ImageLimits, read_image
from service import LatentEncoder
from tests.helpers import IMAGES, PROJECT, Encode, stock
from tests.images.png_files import DAMAGED, END, GREY, PALETTE, RGB, SOUND, TEXT, Form, forms, with_chunk, wrong_checksum
from tests.trees import IS_PINNED

QUICK = sorted(
    set(pngs.MUTATIONS) - {pngs.bomb, pngs.many_chunks, pngs.large_image, pngs.tiny_chunks}, key=lambda mutate: mutate.__name__
)
LIMITS = ImageLimits(ANYWHERE, max_bytes=100_000_000, max_pixels=1_000_000)


def copy_of(data: bytes) -> bytes:
    """Return the bytes that LoadImage gets for a whole PNG."""
    return b"".join(parts_of_copy(data, check_png(data))) or data


@pytest.fixture
def every_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the rows of every image, also if that saves no time."""
    monkeypatch.setattr(png, "_are_kept", lambda *_: True)


def pixels_of(data: bytes) -> bytes:
    with Image.open(BytesIO(data), formats=("PNG",)) as image:
        return image.convert("RGBA" if image.mode != "I;16" else "I").tobytes()


@pytest.mark.parametrize("form", forms(), ids=repr)
def test_every_form_is_accepted_if_it_is_whole(form: Form) -> None:
    """A sound image passes; without its last row, or with a wrong filter in any row, it is damaged."""
    facts = check_png(form.file())
    assert (facts.header.width, facts.header.height, facts.unreadable) == (form.width, form.height, ())
    rows = form.rows()
    with pytest.raises(ImageFault, match="its pixels end after"):
        check_png(form.file(rows[:-1]))
    for place in {0, len(rows) // 2, len(rows) - 1}:
        with pytest.raises(ImageFault, match="unknown filter"):
            check_png(form.file([*rows[:place], b"\xff" + rows[place][1:], *rows[place + 1 :]]))


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_refused_as_by_libpng(name: str) -> None:
    """The text names the part that is wrong, and the next step."""
    words, data = DAMAGED[name]
    with pytest.raises(ImageFault) as caught:
        check_png(data)
    assert str(caught.value).startswith("is damaged: ")
    assert words in str(caught.value)
    assert str(caught.value).endswith("; fetch or export it again")


@pytest.mark.usefixtures("every_copy")
@pytest.mark.parametrize("name", SOUND)
def test_oddity_is_accepted_as_by_libpng(name: str) -> None:
    """Pillow reads the copy for LoadImage without an error, and finds the pixels of the image without the oddity."""
    data = SOUND[name]
    with quiet_pillow():
        pixels = pixels_of(copy_of(data))
    plain = [chunk for chunk in parse(data) if chunk[0] in (b"IHDR", b"PLTE", b"IDAT", b"tRNS")]
    if "transparency" not in name:
        assert pixels == pixels_of(build([*plain, END]))


@pytest.mark.parametrize("cut", [0, 1, 8, 9, 20, 32, 33, 40, 44, 60, -30, -12, -8, -5, -1])
def test_cut_file_is_refused(cut: int) -> None:
    """A file may end at any byte."""
    with pytest.raises(ImageFault, match=r"is damaged: it (ends|does not begin)"):
        check_png(RGB.file()[:cut])


def test_size_is_checked_before_the_rest() -> None:
    """The header alone refuses a large image."""
    with pytest.raises(ImageFault, match=r"more than MAX_IMAGE_PIXELS=659 pixels, 33 x 20 px; scale it down"):
        check_png(RGB.file()[:33], max_pixels=659)
    assert check_png(RGB.file(), max_pixels=660).header == read_header(RGB.file()[:33])


def test_form_of_apple_is_named() -> None:
    """Xcode writes PNGs that begin with another chunk; the text has the program that converts them."""
    with pytest.raises(ImageFault, match=r"Apple's Xcode .*`pngcrush -revert-iphone-optimizations"):
        check_png(with_chunk(0, b"CgBI", b"\x50\0\x20\x02"))


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt"])
def test_text_with_which_comfyui_decodes_wrong_pixels_is_refused(kind: bytes) -> None:
    """Pillow keeps texts and its own notes on the image in one place; behind the pixels it is too late to matter."""
    with pytest.raises(ImageFault, match="has a text called `interlace`"):
        check_png(with_chunk(1, kind, b"interlace\0\0\0\0\0text"))
    assert check_png(with_chunk(3, kind, b"interlace\0\0\0\0\0text")).unreadable == ()


@pytest.mark.parametrize("kind", [b"prVt", b"IDAT", b"tEXt", b"fcTL"])
def test_tiny_otherswithout_number_are_refused_at_once(kind: bytes) -> None:
    """16 MiB of chunks of 12 bytes cost well under a second, for they are not read to their end."""
    head, rest = RGB.file()[:33], RGB.file()[33:]
    data = head + with_chunk(1, kind)[33:45] * (16 * 1024 * 1024 // 12) + rest
    start = time.process_time()
    with pytest.raises(ImageFault, match="has more than 100,000 chunks"):
        check_png(data)
    assert time.process_time() - start < 1


def test_judgement_needs_neither_pillow_nor_torch() -> None:
    """The process that judges images is small."""
    code = "import sys, latent_encoder.images.png, latent_encoder.images.contents; print({'PIL', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_bytes_of_a_stream_that_is_too_long_are_not_inflated() -> None:
    """A kilobyte of pixels may stand for a gigabyte; only the image's part of it is read."""
    bomb = RGB.file(packed=zlib.compress(b"".join(RGB.rows()) + bytes(300_000_000), 9))
    start = time.process_time()
    check_png(bomb)
    assert time.process_time() - start < 0.2


@pytest.mark.usefixtures("every_copy")
@pytest.mark.parametrize("form", forms(), ids=repr)
def test_copy_has_the_rows_of_the_file(form: Form) -> None:
    """Pillow finds the same pixels in it, and zlib the rows, with a checksum of the stream that fits."""
    data, added = form.file(), [TEXT, (b"gAMA", b"\0\0\xb1\x8f")]
    data = build([*parse(data)[:1], *added, *parse(data)[1:-1], (b"tIME", bytes(7)), END])
    copy = copy_of(data)
    assert [chunk for chunk in parse(copy) if chunk[0] != b"IDAT"] == [chunk for chunk in parse(data) if chunk[0] != b"IDAT"]
    (packed,) = (content for kind, content in parse(copy) if kind == b"IDAT")
    assert zlib.decompress(packed) == b"".join(form.rows())
    assert build(parse(copy)) == copy, "the checksums of its chunks are right"
    assert pixels_of(copy) == pixels_of(data)


@pytest.mark.parametrize(
    ("side", "level", "noise", "kept"),
    [(570, 1, True, True), (580, 1, True, False), (570, 1, False, False), (570, 0, True, False)],
)
def test_rows_are_kept_if_that_saves_time(
    side: int, level: int, noise: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not too large, were compressed, and not to less than a quarter. LoadImage gets other files as they are."""
    monkeypatch.setattr(png, "MOST_KEPT", 1_000_000)
    pixels = bytes(Random(0).choices(range(16 if noise else 1), k=side * side * 3))  # noqa: S311  # the same each time
    file = BytesIO()
    Image.frombytes("RGB", (side, side), pixels).save(file, "PNG", compress_level=level)
    data = file.getvalue()
    assert bool(check_png(data).rows) == kept
    assert (copy_of(data) != data) == kept
    others = parse(data)
    assert parse(copy_of(build([others[0], BIG_TEXT, *others[1:]]))) == parse(copy_of(data))


@pytest.mark.usefixtures("every_copy")
def test_copy_of_odd_streams_has_the_same_pixels() -> None:
    """A stream may be longer than the image, in pieces of a byte, in empty pieces, or go on behind another chunk."""
    packed = zlib.compress(b"".join(RGB.rows()))
    pieces = [(b"IDAT", packed[place : place + 1]) for place in range(len(packed))]
    for pixels in (
        pieces,
        [(b"IDAT", b""), *pieces, (b"IDAT", b"")],
        [(b"IDAT", packed), (b"IDAT", b"more")],
        [(b"IDAT", packed), TEXT, (b"IDAT", b"more")],
        [(b"IDAT", zlib.compress(b"".join(RGB.rows()) + bytes(100_000)))],
    ):
        assert pixels_of(copy_of(build([RGB.header(), *pixels, END]))) == pixels_of(RGB.file())


def test_limit_of_a_text_is_that_of_pillow() -> None:
    """A text of exactly that size is left in the file."""
    assert png_unreadable.LARGEST_TEXT == PngImagePlugin.MAX_TEXT_CHUNK
    assert png_unreadable.LARGEST_TEXTS <= PngImagePlugin.MAX_TEXT_MEMORY
    for size, number in ((png_unreadable.LARGEST_TEXT, 0), (png_unreadable.LARGEST_TEXT + 1, 1)):
        text = with_chunk(1, b"zTXt", b"key\0\0" + zlib.compress(bytes(size)))
        assert len(check_png(text).unreadable) == number


@pytest.mark.parametrize("keyword", [b"Raw profile type exif", b"XML:com.adobe.xmp"])
def test_orientation_is_not_looked_for_without_end(keyword: bytes) -> None:
    """17 texts of a megabyte that may carry an orientation are refused, in well under a second."""
    text = (b"zTXt", keyword + b"\0\0" + zlib.compress(bytes(2_000_000), 9))
    chunks = parse(RGB.file())
    start = time.process_time()
    with pytest.raises(ImageFault, match="bytes of texts in its metadata"):
        check_png(build([chunks[0], *[text] * 90, *chunks[1:]]))
    assert time.process_time() - start < 0.5


# Metadata beyond Pillow's limits, and orientations before and behind it.

BIG = zlib.compress(b"<mxfile>" + bytes(3_000_000))
EXIF = (b"eXIf", b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0")  # orientation 6
XMP = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
BIG_XMP = b"XML:com.adobe.xmp\0\x01\0\0\0" + zlib.compress(b'<x tiff:Orientation="6"/>' + bytes(2_000_000))
BIG_TEXT, BIG_PROFILE = (b"zTXt", b"mxfile\0\0" + BIG), (b"iCCP", b"profile\0\0" + BIG)
BIG_ITXT = (b"iTXt", b"mxfile\0\x01\0\0\0" + BIG)
BEFORE, BEHIND = 1, 4

LARGE = {
    "text": [(BEFORE, BIG_TEXT)],
    "text behind": [(BEHIND, BIG_TEXT)],
    "international text": [(BEFORE, BIG_ITXT)],
    "profile": [(BEFORE, BIG_PROFILE)],
    "plain text": [(BEFORE, (b"tEXt", b"mxfile\0" + bytes(3_000_000)))],
    "text after EXIF": [(BEFORE, BIG_TEXT), (BEFORE, EXIF)],
    "text before EXIF": [(BEFORE, EXIF), (BEFORE, BIG_TEXT)],
    "profile, EXIF behind": [(BEHIND, EXIF), (BEFORE, BIG_PROFILE)],
    "text behind, EXIF before": [(BEHIND, BIG_TEXT), (BEFORE, EXIF)],
    "text behind, then EXIF": [(BEHIND, EXIF), (BEHIND, BIG_TEXT)],
    "EXIF behind, then text": [(BEHIND, BIG_TEXT), (BEHIND, EXIF)],
    "text behind, then XMP": [(BEHIND, (b"iTXt", XMP)), (BEHIND, BIG_TEXT)],
    "text, XMP": [(BEFORE, (b"iTXt", XMP)), (BEFORE, BIG_TEXT)],
    "large XMP": [(BEFORE, (b"iTXt", BIG_XMP))],
    "large XMP behind": [(BEHIND, (b"iTXt", BIG_XMP))],
    "wrong checksum": [],
    "short gamma behind, then EXIF": [(BEHIND, EXIF), (BEHIND, (b"gAMA", b"\0"))],
}
TURNED = {
    "text after EXIF",
    "text before EXIF",
    "profile, EXIF behind",
    "text behind, EXIF before",
    "EXIF behind, then text",
    "text, XMP",
}


def large_files(folder: Path) -> list[Path]:
    paths = []
    for number, (name, added) in enumerate(LARGE.items()):
        chunks = parse(RGB.file())
        for place, chunk in added:
            chunks.insert(min(place, len(chunks) - 1) if place == BEFORE else 3, chunk)
        data = build(chunks) if name != "wrong checksum" else SOUND["wrong checksum of a text"]
        paths.append(folder / f"{number}.png")
        paths[-1].write_bytes(data)
    return paths


def test_large_metadata_leaves_the_numbers_of_comfyui(model_dir: Path, tmp_path: Path, encoder: LatentEncoder) -> None:
    """LoadImage gives the same pixels for our copy as plain ComfyUI does for the file, whatever it makes of an orientation."""
    paths = large_files(tmp_path)
    stock("load", model_dir, tmp_path / "stock.safetensors", *paths)
    expected = load_file(tmp_path / "stock.safetensors")
    for number, (name, path) in enumerate(zip(LARGE, paths, strict=True)):
        with quiet_pillow():
            source = read_image(str(path), LIMITS)
            loaded = encoder.runtime.load_image(source.data, source.ending)
        assert torch.equal(loaded, expected[str(number)]), name
        if IS_PINNED:
            assert (loaded.shape[1] > loaded.shape[2]) == (name in TURNED), name


@pytest.mark.parametrize("name", ["grey.png", "rgba.png", "palette_with_transparency.png"])
def test_load_image_gets_inflated_pixels(name: str, encoder: LatentEncoder) -> None:
    """The copy comes from the process that judges. LoadImage gives the same pixels and mask for it and for the file."""
    data = (IMAGES / name).read_bytes()
    with quiet_pillow():
        copy = read_image(str(IMAGES / name), LIMITS).data
        assert copy == copy_of(data) != data
        for ours, expected in zip(*(encoder.runtime.load_image_and_mask(file, ".png") for file in (copy, data)), strict=True):
            assert ours is not None
            assert expected is not None
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", ["stream ends before the last row", "no palette", "two headers", "unknown critical chunk"])
def test_service_refuses_a_damaged_png(name: str, respond: Encode, tmp_path: Path) -> None:
    """The response has the fault and the path."""
    words, data = DAMAGED[name]
    (tmp_path / "image.png").write_bytes(data)
    response = respond(tmp_path / "image.png")
    assert response.error_code == ErrorCode.IMAGE_INVALID
    assert response.error_message.startswith(f"Image file is damaged: {words}")
    assert response.error_message.endswith(f"; fetch or export it again: {tmp_path / 'image.png'}")


@pytest.mark.parametrize("frames", [2, 3])
def test_animation_is_refused(frames: int, tmp_path: Path) -> None:
    """The number of frames is that of Pillow."""
    with Image.open(IMAGES / "grey.png") as image:
        others = [image.rotate(90 * number) for number in range(1, frames)]
        image.save(tmp_path / "a.png", save_all=True, append_images=others)
    with pytest.raises(ImageInvalid, match=f"is animated, {frames} frames; give one of them"):
        read_image(str(tmp_path / "a.png"), LIMITS)


@pytest.mark.usefixtures("every_copy")
def test_file_that_is_accepted_is_read_without_tolerance() -> None:
    """Pillow decodes every file that passes, of 1500 damaged ones; LoadImage decodes a part of the others too."""
    files = tuple(form.file() for form in forms() if form.width > 1)
    accepted = 0
    for number in range(1500):
        rng = Random(number)  # noqa: S311  # the same each time
        data = rng.choice(QUICK)(rng.choice(files), rng)
        with suppress(ImageFault), quiet_pillow():
            copy = copy_of(data)
            with Image.open(BytesIO(copy), formats=("PNG",)) as image:
                image.load()
                image.getexif()
            accepted += 1
    assert 300 < accepted < 1200


def test_damage_does_not_hide_harm() -> None:
    """A damaged animation is an animation, and a damaged file of too many chunks has too many: nobody may decode them."""
    animation = (b"acTL", b"\0\0\0\2" + bytes(4))
    for kind, added in (("animated, 3 frames", [animation]), ("100,000 chunks", [(b"prVt", b"")] * 100_001)):
        data = wrong_checksum(b"IDAT", build([RGB.header(), *added, *parse(RGB.file())[1:]]))
        with pytest.raises(ImageFault, match=kind) as caught:
            check_png(data)
        assert not isinstance(caught.value, ImageDamage)


def test_grey_and_palette_files_are_sound() -> None:
    """The forms that the tables are made of have no fault."""
    assert check_png(GREY.file()).unreadable == check_png(PALETTE.file()).unreadable == ()
