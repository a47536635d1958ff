"""Features of image files that a LoadImage node may treat in its own way, and how to find out what it did with them.

What becomes of an EXIF orientation or of 16-bit samples depends on the release of ComfyUI, and on its Pillow or ffmpeg.
It is not predicted here. Each feature draws a small picture that has it, and reads the note from what LoadImage made of that.
"""

from __future__ import annotations

import random
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ClassVar, Literal, Protocol

import PIL
import torch
from PIL import ExifTags, Image, ImageOps
from PIL import features as pillow_features
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from latent_encoder.images.input_folder import Ending
from latent_encoder.images.jpeg_markers import has_further_pictures, without_further_pictures

Format = Literal["JPEG", "PNG"]
ENDINGS: Mapping[Format, Ending] = {"JPEG": ".jpg", "PNG": ".png"}
Carrier = Literal["exif", "xmp", "profile"]
"""Where an orientation stands: EXIF data, XMP, or the text chunk of a PNG in which ImageMagick keeps EXIF data."""

ImageNote = Literal[
    "alpha_applied",
    "alpha_dropped",
    "clipped_to_8_bit",
    "exif_orientation_applied",
    "exif_orientation_ignored",
    "exif_orientation_misapplied",
    "first_frame_used",
    "other_frame_used",
    "reduced_to_8_bit",
]
"""A code in `image_notes`; API.md says what each means."""

# Four corners of different colours on a picture that is wider than high: all eight orientations of it differ.
CORNERS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))
WIDTH, HEIGHT = 32, 16  # multiples of a JPEG's blocks, so that no block mixes two corners
XMP_KEYWORD, PROFILE_KEYWORD = "XML:com.adobe.xmp", "Raw profile type exif"  # of a PNG's text chunks
DEPTH_OFFSET = 24  # in a PNG: bits of a sample, then the colour type, in the IHDR chunk, which is always the first
CLOSE = 0.1  # of the range of values; JPEG and the decoders' colour arithmetic differ by less, two corners by more


class Feature(Protocol):
    """A property of an image file beside its pixels."""

    @property
    def format(self) -> Format:
        """The format of the picture that `picture` gives."""

    def picture(self) -> bytes:
        """Return a small file that has this feature."""

    def note(self, loaded: Tensor) -> ImageNote | None:
        """Return the code for `image_notes` by what LoadImage made of the picture, `[1, height, width, 3]` in [0, 1]."""


@dataclass(frozen=True)
class Orientation:
    """A picture that is to be turned or mirrored before it is shown: EXIF tag 274, in EXIF data or in XMP."""

    format: Format
    value: int
    carrier: Carrier

    @property
    def swaps_sides(self) -> bool:
        """Whether the picture's width becomes its height."""
        return self.value >= 5

    def picture(self) -> bytes:
        return _saved(_corners(), self.format, **self._metadata())

    def _metadata(self) -> dict[str, Any]:
        match self.format, self.carrier:
            case "JPEG", "xmp":
                return {"xmp": _xmp(self.value)}
            case "PNG", "xmp":
                return {"pnginfo": _png_text(XMP_KEYWORD, _xmp(self.value).decode())}
            case _, "profile":
                data = _exif(self.value).tobytes()
                return {"pnginfo": _png_text(PROFILE_KEYWORD, f"\nexif\n{len(data):8}\n{data.hex()}\n")}
            case _:
                return {"exif": _exif(self.value)}

    def note(self, loaded: Tensor) -> ImageNote:
        tagged = _corners()
        if _shows(loaded, tagged):
            return "exif_orientation_ignored"
        tagged.getexif()[ExifTags.Base.Orientation] = self.value
        return "exif_orientation_applied" if _shows(loaded, ImageOps.exif_transpose(tagged)) else "exif_orientation_misapplied"


@dataclass(frozen=True)
class Transparency:
    """An alpha channel, transparent palette entries or a transparent colour. `mode` is Pillow's, as it opens the file."""

    mode: str
    format: Format = "PNG"

    def picture(self) -> bytes:
        if self.mode in ("RGBA", "LA"):
            transparent = _corners().convert(self.mode)
            transparent.putalpha(0)
            return _saved(transparent, "PNG")
        picture = _corners().convert(self.mode if self.mode in ("P", "RGB") else "L")
        return _saved(picture, "PNG", transparency=picture.getpixel((0, 0)))

    def note(self, loaded: Tensor) -> ImageNote:
        hidden = _corners() if self.mode in ("RGBA", "P", "RGB") else _corners().convert("L")
        return "alpha_dropped" if _shows(loaded, hidden) else "alpha_applied"


@dataclass(frozen=True)
class SixteenBits:
    """A PNG with 16 bits a sample. `colour_type` is that of its IHDR chunk: 0 grey, 2 RGB, 4 and 6 with alpha."""

    colour_type: int
    format: Format = "PNG"

    SAMPLE: ClassVar = 0x4020  # 0.2505 of the range; 0x40 / 255, what 8 bits leave of it, is 0.2510

    def picture(self) -> bytes:
        colours, alpha = (3 if self.colour_type & 2 else 1), (b"\xff\xff" if self.colour_type & 4 else b"")
        row = b"\0" + (struct.pack(">H", self.SAMPLE) * colours + alpha) * WIDTH
        header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, self.colour_type, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(row * HEIGHT)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)

    def note(self, loaded: Tensor) -> ImageNote | None:
        value = loaded.mean().item()
        if abs(value - self.SAMPLE / 0xFFFF) < 1e-4:
            return None
        return "clipped_to_8_bit" if value > 0.99 else "reduced_to_8_bit"


@dataclass(frozen=True)
class FurtherPictures:
    """A JPEG with more pictures behind the first: MPO, and photos of phones with a gain map or a depth map."""

    format: Format = "JPEG"

    def picture(self) -> bytes:
        first = _corners()
        further = [ImageOps.mirror(first).resize((WIDTH // 2, HEIGHT // 2))]
        return without_further_pictures(_saved(first, "MPO", save_all=True, append_images=further))

    def note(self, loaded: Tensor) -> ImageNote:
        return "first_frame_used" if _shows(loaded, _corners()) else "other_frame_used"


def _corners() -> Image.Image:
    picture = Image.new("RGB", (WIDTH, HEIGHT))
    for number, colour in enumerate(CORNERS):
        left, upper = number % 2 * WIDTH // 2, number // 2 * HEIGHT // 2
        picture.paste(colour, (left, upper, left + WIDTH // 2, upper + HEIGHT // 2))
    return picture


def _saved(picture: Image.Image, file_format: str, **options: Any) -> bytes:
    file = BytesIO()
    if file_format != "PNG":
        options |= {"quality": 95, "subsampling": 0}
    picture.save(file, file_format, **options)
    return file.getvalue()


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def _xmp(orientation: int) -> bytes:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
        f'tiff:Orientation="{orientation}"/></rdf:RDF></x:xmpmeta>'
    ).encode()


def _png_text(keyword: str, text: str) -> PngInfo:
    info = PngInfo()
    info.add_itxt(keyword, text) if keyword == XMP_KEYWORD else info.add_text(keyword, text)
    return info


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def decoder_of(load: Callable[[bytes, Ending], Tensor]) -> str:
    """Return the name and version of what decodes JPEGs behind `load`, LoadImage: Pillow, or PyAV with ffmpeg.

    Decoders differ in how they enlarge colours that a JPEG stores at half the size. So equal pixels mean that Pillow decoded.
    """
    noise = Image.frombytes("RGB", (WIDTH, HEIGHT), random.Random(0).randbytes(WIDTH * HEIGHT * 3))  # noqa: S311
    file = BytesIO()
    noise.save(file, "JPEG", quality=95, subsampling="4:2:0")
    with Image.open(file) as picture:
        if torch.allclose(load(file.getvalue(), ".jpg"), pixels_of(picture), atol=1e-4):
            return f"Pillow {PIL.__version__}, {_libjpeg()}"
    av = sys.modules.get("av")
    return f"PyAV {av.__version__}, ffmpeg {av.ffmpeg_version_info}" if av is not None else "unknown"


def _libjpeg() -> str:
    turbo = pillow_features.version_feature("libjpeg_turbo")
    return f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {pillow_features.version_codec('jpg')}"


def features_of(image: Image.Image, data: bytes) -> tuple[Feature, ...]:
    """Return the features of an image that Pillow has opened from `data`, in the order of their notes.

    A PNG without EXIF data before its pixels is decoded, because they may stand behind them.
    """
    return tuple(_features(image, data))


def _features(image: Image.Image, data: bytes) -> Iterator[Feature]:
    file_format: Format = "PNG" if image.format == "PNG" else "JPEG"
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        yield Transparency(image.mode)
    if orientation in range(2, 9):
        yield Orientation(file_format, orientation, _carrier(image))
    if file_format == "PNG" and data[DEPTH_OFFSET] == 16:
        yield SixteenBits(data[DEPTH_OFFSET + 1])
    if file_format == "JPEG" and (getattr(image, "n_frames", 1) > 1 or has_further_pictures(data)):
        yield FurtherPictures()


def _carrier(image: Image.Image) -> Carrier:
    exif = Image.Exif()
    exif.load(image.info.get("exif", b""))
    if ExifTags.Base.Orientation in exif:
        return "exif"
    return "profile" if PROFILE_KEYWORD in image.info else "xmp"


def pixels_of(picture: Image.Image) -> Tensor:
    """Return a Pillow image as LoadImage's tensor: float32 `[1, height, width, 3]` in [0, 1]."""
    values = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return values.view(1, picture.height, picture.width, 3).float() / 255


def _shows(loaded: Tensor, expected: Image.Image) -> bool:
    """Whether the pixels are about those of that picture."""
    pixels = pixels_of(expected)
    return loaded.shape == pixels.shape and float((loaded - pixels).abs().mean()) < CLOSE
