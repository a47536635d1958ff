"""Files that are no image, or of another kind: each is named, with the way to an image."""

from __future__ import annotations

import gzip
import re
import struct
import zipfile
from io import BytesIO
from pathlib import Path
from random import Random

import av
import numpy as np
import pytest
from PIL import Image

from errors import ErrorCode, ImageInvalid
from fuzz import jpegs
from latent_encoder.access import ANYWHERE
from latent_encoder.images.content_kinds import BINARY, TEXTS
from latent_encoder.images.contents import fault_of
from latent_encoder.images.faults import ImageFault
from latent_encoder.images.jpeg_structure import structure_of
from latent_encoder.images.pillow import quiet_pillow
from latent_encoder.images.source import ImageLimits, read_image
from tests.helpers import IMAGES, Encode

LIMITS = ImageLimits(ANYWHERE, max_bytes=10_000_000, max_pixels=1_000_000)

PNG, JPEG = (IMAGES / "rgba.png").read_bytes(), (IMAGES / "photo.jpg").read_bytes()
PICTURE = Image.radial_gradient("L").resize((64, 48)).convert("RGB")

OURS = re.compile(
    r"Image file ("
    r"is (a|an|text|JSON|XML|compressed|encrypted|metadata|blank)\b.*; [a-z].*"
    r"|is damaged: .*; (fetch or export it again|fetch it again, in binary mode)"
    r"|is neither a JPEG nor a PNG, nor of another kind that is known; it begins with the bytes [0-9a-f ]+"
    r"|has .*; .*"
    r"|holds .*; fetch or export it again"
    r")"
)


def written(kind: str, **options: object) -> bytes:
    """Return the picture in a format of Pillow."""
    file = BytesIO()
    modes = {"MSP": "1", "XBM": "1", "SPIDER": "F", "GIF": "P"}
    PICTURE.convert(modes.get(kind, "RGB")).save(file, kind, **options)
    return file.getvalue()


def filmed(suffix: str, codec: str) -> bytes:
    """Return a video of one frame."""
    file = BytesIO()
    with av.open(file, "w", format=suffix) as container:
        stream = container.add_stream(codec, rate=1)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.asarray(PICTURE))
        container.mux([*stream.encode(frame), *stream.encode()])
    return file.getvalue()


def zipped() -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("photo.jpg", JPEG)
    return file.getvalue()


def heif(major: bytes, *others: bytes) -> bytes:
    """Return the beginning of an ISO file with these brands."""
    brands = major + b"\0\0\0\0" + b"".join(others)
    return struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + b"\0\0\0\x0emeta" + bytes(100)


def tiff(*tags: tuple[int, int], order: str = "<", make: bytes = b"") -> bytes:
    """Return the beginning of a TIFF with these tags in its first image, and its camera's make."""
    entries = [*tags, *([(271, 8 + 2 + 12 * (len(tags) + 1) + 4)] if make else [])]
    packed = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(entries))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return head + packed + bytes(4) + make + bytes(50)


def frame_header(marker: int, bits: int = 8) -> bytes:
    """Return the photo with another frame header."""
    segments, rest = jpegs.parse(JPEG)
    changed = [(marker, bytes([bits]) + body[1:]) if 0xC0 <= kind <= 0xC2 else (kind, body) for kind, body in segments]
    return jpegs.build(changed, rest)


CONTENTS: dict[str, tuple[str, bytes]] = {
    # Images that Pillow writes.
    "webp": ("is a WebP image; convert it to JPEG or PNG, for example with `dwebp FILE -o out.png`", written("WEBP")),
    "avif": ("is an AVIF image; convert it to JPEG or PNG, for example with `avifdec", written("AVIF")),
    "gif": ("is a GIF image; convert", written("GIF")),
    "bmp": ("is a BMP image; convert", written("BMP")),
    "dib": ("is a BMP image without its file header; convert", written("DIB")),
    "tiff": ("is a TIFF image; convert", written("TIFF")),
    "tiff of a camera": ("is a TIFF image; convert", written("TIFF", tiffinfo={271: "NIKON CORPORATION"})),
    "bigtiff": ("is a TIFF image; convert", written("TIFF", big_tiff=True)),
    "jpeg 2000": ("is a JPEG 2000 image; convert", written("JPEG2000")),
    "jpeg 2000 stream": ("is a JPEG 2000 image; convert", written("JPEG2000", no_jp2=True)),
    "ico": ("is an icon (ICO); convert", written("ICO")),
    "icns": ("is an icon of macOS (ICNS); convert", written("ICNS")),
    "ppm": ("is a Netpbm image", written("PPM")),
    "tga": ("is a TGA image; convert", written("TGA")),
    "tga, packed": ("is a TGA image; convert", written("TGA", compression="tga_rle")),
    "pcx": ("is a PCX image; convert", written("PCX")),
    "sgi": ("is an SGI image; convert", written("SGI")),
    "dds": ("is a DDS texture; convert", written("DDS")),
    "qoi": ("is a QOI image; convert", written("QOI")),
    "eps": ("is a PostScript file; convert", written("EPS")),
    "pdf": ("is a PDF document; convert it to JPEG or PNG, for example with `pdftoppm", written("PDF")),
    "xbm": ("is an X11 image", written("XBM")),
    # Images by their headers.
    "heic": (
        "is a HEIC image; convert it to JPEG or PNG, for example with `heif-convert FILE out.png`",
        heif(b"heic", b"mif1"),
    ),
    "heic, mif1 first": ("is a HEIC image", heif(b"mif1", b"mif1", b"heic")),
    "heic, several images": ("is a HEIC image", heif(b"msf1", b"hevc")),
    "avif, mif1 first": ("is an AVIF image", heif(b"mif1", b"miaf", b"avif")),
    "heif": ("is a HEIF image", heif(b"mif1")),
    "jpeg xl": ("is a JPEG XL image; convert it to JPEG or PNG, for example with `djxl", b"\xff\x0a\xfa\x1f\x01" + bytes(50)),
    "jpeg xl in boxes": ("is a JPEG XL image", b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl " + bytes(50)),
    "jpeg xr": ("is a JPEG XR image", b"II\xbc\x01" + bytes(50)),
    "psd": ("is a Photoshop file; convert", b"8BPS\0\1" + bytes(50)),
    "psb": ("is a Photoshop file; convert", b"8BPS\0\2" + bytes(50)),
    "cur": ("is a mouse cursor", b"\0\0\2\0\1\0" + bytes(50)),
    "xcf": ("is a GIMP file", b"gimp xcf v011\0" + bytes(50)),
    "mng": ("is an MNG animation", b"\x8aMNG\r\n\x1a\n\0\0\0\x1cMHDR" + bytes(50)),
    "jng": ("is a JNG image", b"\x8bJNG\r\n\x1a\n\0\0\0\x10JHDR" + bytes(50)),
    "exr": ("is an OpenEXR image", b"v/1\x01" + bytes(50)),
    "hdr": ("is a Radiance HDR image", b"#?RADIANCE\n"),
    "dicom": ("is a DICOM image", bytes(128) + b"DICM" + bytes(50)),
    "fits": ("is a FITS image", b"SIMPLE  =                    T"),
    "svg": (
        "is an SVG drawing; convert it to JPEG or PNG, for example with `rsvg-convert",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ),
    "svg with a declaration": ("is an SVG drawing", b"<?xml version='1.0'?>\n<!-- made by hand -->\n<svg:svg/>"),
    # Raw files of cameras.
    "cr2": ("is a raw file of a camera (Canon CR2); develop it", b"II*\0\x10\0\0\0CR\2\0" + bytes(50)),
    "cr3": ("is a raw file of a camera (Canon CR3)", heif(b"crx ", b"isom")),
    "crw": ("is a raw file of a camera (Canon CRW)", b"II\x1a\0\0\0HEAPCCDR" + bytes(50)),
    "dng": ("is a raw file of a camera (DNG)", tiff((50706, 4), make=b"Google")),
    "nef": ("is a raw file of a camera (Nikon NEF)", tiff((330, 99), make=b"NIKON CORPORATION\0", order=">")),
    "arw": ("is a raw file of a camera (Sony ARW)", tiff((330, 99), make=b"SONY\0")),
    "raf": ("is a raw file of a camera (Fujifilm RAF)", b"FUJIFILMCCD-RAW 0201" + bytes(50)),
    "orf": ("is a raw file of a camera (Olympus ORF)", b"IIRO\x08\0\0\0" + bytes(50)),
    "rw2": ("is a raw file of a camera (Panasonic RW2)", b"IIU\0\x18\0\0\0" + bytes(50)),
    # Videos, archives, programs.
    "mp4": ("is a video (MP4 or QuickTime); give one frame of it", filmed("mp4", "mpeg4")),
    "mov": ("is a video (MP4 or QuickTime)", b"\0\0\0\x08wide\0\0\0\x10mdat" + bytes(50)),
    "webm": ("is a video (WebM or Matroska)", filmed("webm", "libvpx")),
    "avi": ("is a video (AVI)", filmed("avi", "mpeg4")),
    "mpeg": ("is a video (MPEG)", filmed("mpegts", "mpeg2video")),
    "wav": ("is a sound file", b"RIFF\x24\0\0\0WAVEfmt " + bytes(50)),
    "zip": ("is a ZIP archive, or a document that is one; unpack it first", zipped()),
    "gzip": ("is compressed with gzip; unpack it first, for example with `gunzip", gzip.compress(PNG)),
    "7z": ("is a 7-Zip archive", b"7z\xbc\xaf\x27\x1c\0\4" + bytes(50)),
    "apple double": ("is metadata that macOS stores beside a file; give the file", b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(50)),
    "thumbs.db": ("is an old Office file, or a database of thumbnails", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(50)),
    "npy": ("is a NumPy array", b"\x93NUMPY\x01\0" + bytes(50)),
    # Text in place of an image.
    "lfs": (
        "is a Git LFS pointer; fetch the image with `git lfs pull`",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    ),
    "annex": ("is a git-annex pointer; fetch the image with `git annex get", b"/annex/objects/SHA256E-s31390--f50d.png\n"),
    "annex link": ("is a git-annex pointer", b"../.git/annex/objects/0V/1G/SHA256E-s31390--f50d.png/SHA256E-s31390--f50d.png"),
    "dvc": ("is a DVC pointer", b"outs:\n- md5: a304afb96060aad90176268345e10355\n  path: photo.png\n"),
    "html": ("is an HTML page", b"\xef\xbb\xbf\r\n<!DOCTYPE html>\n<html><title>403 Forbidden</title></html>"),
    "html without a doctype": ("is an HTML page", b"<html><head></head></html>"),
    "xhtml": ("is an HTML page", b"<?xml version='1.0' encoding='UTF-8'?>\n<!DOCTYPE html PUBLIC '-//W3C//DTD XHTML 1.0'>"),
    "xml error": ("is XML, as storage services send", b"<?xml version='1.0'?>\n<Error><Code>AccessDenied</Code></Error>"),
    "json error": ("is JSON, as services send", b'{"error": {"code": 404}}'),
    "json list": ("is JSON, as services send", b'[ {"message": "no"} ]'),
    "http without a body": ("is an HTTP response without an image", b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"),
    "data url": ("is text that encodes an image in base64; decode it", b"data:image/png;base64,iVBORw0KGgoAAAANSUhEUg=="),
    "base64 png": ("is text that encodes an image in base64", b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAAB"),
    "base64 jpeg": ("is text that encodes an image in base64", b"/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBg"),
    "hexadecimal": ("is text that encodes an image in hexadecimal digits", PNG.hex().encode()),
    "bytes of postgres": ("is text that encodes an image in hexadecimal digits", b"\\x" + JPEG.hex().encode()),
    "link as text": ("is text with the name of another file", b"../shared/photos/IMG 0001.JPG"),
    "address": ("is text with an address", b"https://example.com/photos/1\n"),
    "shortcut": ("is a shortcut", b"[InternetShortcut]\r\nURL=https://example.com/\r\n"),
    "text": ("is text; give a JPEG or PNG", "día größe 写真".encode() * 1000),
    "text in utf-16": ("is text; give a JPEG or PNG", "día größe 写真".encode("utf-16")),
    "white space": ("is blank", b" \n" * 50),
    # Too little.
    "1 byte": ("has 1 byte, too few for an image", b"\x89"),
    "2 bytes": ("has 2 bytes, too few for an image", b"\xff\xd8"),
    "3 bytes": ("has 3 bytes, too few for an image", b"\xff\xd8\xff"),
    "4 bytes": ("is damaged: it ends after 4 bytes, inside the first 8 of a PNG", PNG[:4]),
    "7 bytes": ("is damaged: it ends after 7 bytes, inside the first 8 of a PNG", PNG[:7]),
    "zeros": ("holds 12345 zeros and nothing else", bytes(12345)),
    "4 zeros": ("holds 4 zeros and nothing else", bytes(4)),
    "noise": (
        "is neither a JPEG nor a PNG, nor of another kind that is known; it begins with the bytes 9c 03 c1",
        b"\x9c\x03\xc1" * 99,
    ),
    # Images that a transfer changed.
    "lf for cr lf": ("is damaged: it is a PNG whose bytes CR LF became LF", PNG.replace(b"\r\n", b"\n")),
    "cr lf for lf": ("is damaged: it is a PNG whose bytes LF became CR LF", PNG.replace(b"\n", b"\r\n")),
    "lf for cr": ("is damaged: it is a PNG whose line ends changed", PNG.replace(b"\r", b"\n")),
    "cr for lf": ("is damaged: it is a PNG whose line ends changed", PNG.replace(b"\n", b"\r")),
    "7 bits": ("is damaged: it is a PNG whose bytes lost their highest bit", bytes(byte & 127 for byte in PNG)),
    "latin-1 to utf-8": ("is damaged: it is a PNG that a program read as text", PNG.decode("latin-1").encode()),
    "not utf-8": ("is damaged: it is a PNG that a program read as text", PNG.decode(errors="replace").encode()),
    "png without its first byte": ("is damaged: it is a PNG whose first bytes are wrong or missing", PNG[1:]),
    "png with other first bytes": ("is damaged: it is a PNG whose first bytes are wrong or missing", b"\0\0\0\1" + PNG[4:]),
    "png, 4 bytes wrong": ("is damaged: it is a PNG whose first bytes are wrong or missing", PNG[:4] + bytes(4) + PNG[8:]),
    "jpeg, 7 bits": ("is damaged: it is a JPEG whose bytes lost their highest bit", bytes(byte & 127 for byte in JPEG)),
    "jpeg, latin-1 to utf-8": ("is damaged: it is a JPEG that a program read as text", JPEG.decode("latin-1").encode()),
    "jpeg, not utf-8": ("is damaged: it is a JPEG that a program read as text", JPEG.decode(errors="replace").encode()),
    "jpeg without its first bytes": ("is damaged: it is a JPEG whose first bytes are wrong or missing", JPEG[2:]),
    "jpeg with a wrong byte": ("is damaged: it is a JPEG whose first bytes are wrong or missing", b"\xff\xd8\0" + JPEG[3:]),
    # Images behind something else.
    "mark": (
        "has 3 bytes of other content before the PNG in it; remove them, for example with `tail -c +4 FILE > out.png`",
        b"\xef\xbb\xbf" + PNG,
    ),
    "newline": ("has 1 byte of other content before the JPEG in it", b"\n" + JPEG),
    "http": (
        "has HTTP headers (46 bytes) before the JPEG in it",
        b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n\n" + JPEG,
    ),
    "warning of php": ("has 36 bytes of other content before the PNG in it", b"<br />\n<b>Warning</b>: headers sent\n" + PNG),
    "zeros before it": ("has 512 zeros before the PNG in it", bytes(512) + PNG),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_content_is_named_with_the_way_out(name: str, tmp_path: Path) -> None:
    """The text of the whole check has the kind, a next step, and the path at its end."""
    words, data = CONTENTS[name]
    path = tmp_path / "input.png"
    path.write_bytes(data)
    with pytest.raises(ImageInvalid) as caught:
        read_image(str(path), LIMITS)
    assert str(caught.value).startswith(f"Image file {words}")
    assert OURS.fullmatch(str(caught.value).removesuffix(f": {path}"))
    assert str(caught.value).endswith(f": {path}")


@pytest.mark.parametrize(
    "kind", sorted(set(Image.SAVE) - {"JPEG", "MPO", "PNG", "BUFR", "GRIB", "HDF5", "WMF", "BLP", "IM", "PALM"})
)
def test_formats_of_pillow_have_texts_of_ours(kind: str) -> None:
    """None of the formats that Pillow writes is taken for damaged data or for text by its library."""
    assert OURS.fullmatch(f"Image file {fault_of(written(kind))}")


def test_command_for_junk_gives_the_image() -> None:
    """The number in the text is the one that `tail` needs."""
    command = re.search(r"tail -c \+(\d+)", str(fault_of(b"HTTP/1.1 200 OK\r\n\r\n" + PNG)))
    assert command is not None
    assert (b"HTTP/1.1 200 OK\r\n\r\n" + PNG)[int(command[1]) - 1 :] == PNG


@pytest.mark.parametrize(
    ("marker", "bits", "words"),
    [
        (0xC1, 12, "is a JPEG with 12 bits a sample, which ComfyUI cannot load; save it"),
        (0xC0, 12, "is a JPEG with 12 bits a sample"),
        (0xC3, 16, "is a lossless JPEG"),
        (0xC5, 8, "is a hierarchical JPEG"),
        (0xF7, 8, "is a JPEG-LS image"),
    ],
)
def test_unusual_form_of_a_jpeg_is_named(marker: int, bits: int, words: str) -> None:
    """The form is that of the image's header, not of a thumbnail's in a segment before it."""
    with pytest.raises(ImageFault, match=f"^{words}"):
        structure_of(frame_header(marker, bits), 10**6)


@pytest.mark.parametrize("marker", [0xC3, 0xC5, 0xC7, 0xF7])
def test_jpeg_that_nobody_decodes_is_refused_with_our_words(marker: int, respond: Encode, tmp_path: Path) -> None:
    """No text of Pillow's or libjpeg's reaches the response."""
    (tmp_path / "odd.jpg").write_bytes(frame_header(marker, 12))
    response = respond(tmp_path / "odd.jpg")
    assert response.error_code == ErrorCode.IMAGE_INVALID
    assert re.match(r"Image file is a (lossless |hierarchical )?JPEG", response.error_message)


def test_names_and_advice_can_be_read() -> None:
    """Each is a part of one sentence."""
    for _, kind in (*BINARY, *TEXTS):
        assert kind.name[0].islower() or kind.name.startswith(("JSON", "XML"))
        assert kind.advice[0].islower()
        assert not kind.advice.endswith(".")


HEADS = [data[:300] for _, data in CONTENTS.values() if data]


def damaged_heads(rng: Random) -> bytes:
    """Return the beginning of a file with some wrong, lost or added bytes."""
    data = bytearray(rng.choice([*HEADS, PNG[:300], JPEG[:300], PNG, JPEG]))
    for _ in range(rng.choice((1, 2, 8))):
        place = rng.randrange(min(len(data), 64))
        match rng.randrange(4):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                del data[place : place + rng.choice((1, 4, 30))]
            case 2:
                data[place:place] = rng.randbytes(rng.choice((1, 4, 30)))
            case _:
                del data[rng.randrange(len(data)) + 1 :]
        data = data or bytearray(b"\0")
    return bytes(data)


def test_damaged_header_has_a_text_of_ours(tmp_path: Path) -> None:
    """2000 damaged beginnings of every kind: each is refused in our words, or is still sound."""
    rng, path, refused = Random(16), tmp_path / "damaged", 0  # noqa: S311  # the same each time
    for number in range(2000):
        path.write_bytes(damaged_heads(rng))
        text = refusal(path)
        if text is not None:
            refused += 1
            assert OURS.fullmatch(text), f"input {number}: {text}"
    assert refused > 1500


def refusal(path: Path) -> str | None:
    """Return the text of the refusal without the path, None if the image is accepted."""
    try:
        with quiet_pillow():
            read_image(str(path), LIMITS)
    except ImageInvalid as exc:
        return str(exc).removesuffix(f": {path}")
    return None
