"""Features of image files that LoadImage treats differently in each release of ComfyUI, and the notes on its treatment.

An EXIF orientation may be applied or ignored, 16-bit values may be reduced or clipped. It depends on ComfyUI and on its Pillow
or ffmpeg, so it is found out: each feature draws a small sample image, and the note follows from LoadImage's pixels of it.
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
from latent_encoder.images.jpeg_markers import has_further_images, without_further_images

Format = Literal["JPEG", "PNG"]
ENDINGS: Mapping[Format, Ending] = {"JPEG": ".jpg", "PNG": ".png"}
Carrier = Literal["exif", "xmp", "profile"]
"""The place of an orientation: EXIF data, XMP, or the text chunk of a PNG in which ImageMagick keeps EXIF data."""

ImageNote = Literal[
    "alpha_applied",
    "alpha_dropped",
    "clipped_to_8_bit",
    "damaged",
    "exif_orientation_applied",
    "exif_orientation_ignored",
    "exif_orientation_misapplied",
    "first_frame_used",
    "other_frame_used",
    "reduced_to_8_bit",
]
"""A code in `image_notes`; API.md explains each."""

# A sample is wider than high and has four corners of different colours, so that its eight orientations differ.
CORNERS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))
WIDTH, HEIGHT = 32, 16  # multiples of a JPEG's blocks, so that no block mixes two corners
XMP_KEYWORD, PROFILE_KEYWORD = "XML:com.adobe.xmp", "Raw profile type exif"  # keywords of a PNG's text chunks
DEPTH_OFFSET = 24  # of the bits per sample in a PNG; the colour type follows; both are in IHDR, always the first chunk
CLOSE = 0.1  # mean difference of values in [0, 1]: JPEG decoders differ by less, two orientations by more


class Feature(Protocol):
    """A property of an image file besides its pixels."""

    @property
    def format(self) -> Format:
        """File format of the sample."""

    def sample(self) -> bytes:
        """Return the bytes of a small image file that has this feature."""

    def note(self, loaded: Tensor) -> ImageNote | None:
        """Return the code for `image_notes`, by LoadImage's pixels of the sample, `[1, height, width, 3]` in [0, 1]."""


@dataclass(frozen=True)
class Orientation:
    """An image that viewers turn or mirror before they show it: EXIF tag 274, in EXIF data or in XMP."""

    format: Format
    value: int
    carrier: Carrier

    @property
    def swaps_sides(self) -> bool:
        """True if width becomes height."""
        return self.value >= 5

    def sample(self) -> bytes:
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

    def sample(self) -> bytes:
        if self.mode in ("RGBA", "LA"):
            transparent = _corners().convert(self.mode)
            transparent.putalpha(0)
            return _saved(transparent, "PNG")
        opaque = _corners().convert(self.mode if self.mode in ("P", "RGB") else "L")
        return _saved(opaque, "PNG", transparency=opaque.getpixel((0, 0)))

    def note(self, loaded: Tensor) -> ImageNote:
        hidden = _corners() if self.mode in ("RGBA", "P", "RGB") else _corners().convert("L")
        return "alpha_dropped" if _shows(loaded, hidden) else "alpha_applied"


@dataclass(frozen=True)
class SixteenBits:
    """A PNG with 16 bits a sample. `colour_type` is that of its IHDR chunk: 0 grey, 2 RGB, 4 and 6 with alpha."""

    colour_type: int
    format: Format = "PNG"

    VALUE: ClassVar = 0x4020  # 0.2505 of the range; reduced to 8 bits it is 0x40 / 255, 0.2510

    def sample(self) -> bytes:
        colours, alpha = (3 if self.colour_type & 2 else 1), (b"\xff\xff" if self.colour_type & 4 else b"")
        row = b"\0" + (struct.pack(">H", self.VALUE) * colours + alpha) * WIDTH
        header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, self.colour_type, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(row * HEIGHT)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)

    def note(self, loaded: Tensor) -> ImageNote | None:
        value = loaded.mean().item()
        if abs(value - self.VALUE / 0xFFFF) < 1e-4:
            return None
        return "clipped_to_8_bit" if value > 0.99 else "reduced_to_8_bit"


@dataclass(frozen=True)
class FurtherImages:
    """A JPEG with further images behind the first: MPO, and photos of phones with a gain map or a depth map."""

    format: Format = "JPEG"

    def sample(self) -> bytes:
        first = _corners()
        further = [ImageOps.mirror(first).resize((WIDTH // 2, HEIGHT // 2))]
        return without_further_images(_saved(first, "MPO", save_all=True, append_images=further))

    def note(self, loaded: Tensor) -> ImageNote:
        return "first_frame_used" if _shows(loaded, _corners()) else "other_frame_used"


def _corners() -> Image.Image:
    image = Image.new("RGB", (WIDTH, HEIGHT))
    for number, colour in enumerate(CORNERS):
        left, upper = number % 2 * WIDTH // 2, number // 2 * HEIGHT // 2
        image.paste(colour, (left, upper, left + WIDTH // 2, upper + HEIGHT // 2))
    return image


def _saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    file = BytesIO()
    if file_format != "PNG":
        options |= {"quality": 95, "subsampling": 0}
    image.save(file, file_format, **options)
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
    """Return name and version of the library that decodes JPEGs in `load`, LoadImage: Pillow, or PyAV with ffmpeg.

    A JPEG may store colours at half the size, and the libraries enlarge them differently. So equal pixels mean Pillow.
    """
    noise = Image.frombytes("RGB", (WIDTH, HEIGHT), random.Random(0).randbytes(WIDTH * HEIGHT * 3))  # noqa: S311
    file = BytesIO()
    noise.save(file, "JPEG", quality=95, subsampling="4:2:0")
    with Image.open(file) as image:
        if torch.allclose(load(file.getvalue(), ".jpg"), pixels_of(image), atol=1e-4):
            return f"Pillow {PIL.__version__}, {_libjpeg()}"
    av = sys.modules.get("av")
    return f"PyAV {av.__version__}, ffmpeg {av.ffmpeg_version_info}" if av is not None else "unknown"


def _libjpeg() -> str:
    turbo = pillow_features.version_feature("libjpeg_turbo")
    return f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {pillow_features.version_codec('jpg')}"


def features_of(image: Image.Image, data: bytes) -> tuple[Feature, ...]:
    """Return the features of an image that Pillow has opened from `data`, in the order of their notes.

    A PNG without EXIF data before its pixels is decoded, because EXIF data may also follow them.
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
    if file_format == "JPEG" and (getattr(image, "n_frames", 1) > 1 or has_further_images(data)):
        yield FurtherImages()


def _carrier(image: Image.Image) -> Carrier:
    exif = Image.Exif()
    exif.load(image.info.get("exif", b""))
    if ExifTags.Base.Orientation in exif:
        return "exif"
    return "profile" if PROFILE_KEYWORD in image.info else "xmp"


def pixels_of(image: Image.Image) -> Tensor:
    """Return a Pillow image as LoadImage's tensor: float32 `[1, height, width, 3]` in [0, 1]."""
    values = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return values.view(1, image.height, image.width, 3).float() / 255


def _shows(loaded: Tensor, expected: Image.Image) -> bool:
    """Return whether the pixels are about those of the image."""
    pixels = pixels_of(expected)
    return loaded.shape == pixels.shape and float((loaded - pixels).abs().mean()) < CLOSE
