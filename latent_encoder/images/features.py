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
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from torch import Tensor

from latent_encoder.images.colours import Carrier as ColourCarrier
from latent_encoder.images.colours import colours_of, swapped_profile
from latent_encoder.images.input_folder import Ending
from latent_encoder.images.jpeg_markers import has_further_images, without_further_images
from latent_encoder.images.pillow import tolerant_pillow
from latent_encoder.images.png_metadata import (
    COLOUR_TYPE,
    DEPTH,
    PROFILE_KEYWORD,
    XMP_KEYWORD,
    built,
    with_chunk,
    with_one_pixel,
)
from models import ImageNote

Format = Literal["JPEG", "PNG"]
ENDINGS: Mapping[Format, Ending] = {"JPEG": ".jpg", "PNG": ".png"}
Carrier = Literal["exif", "xmp", "profile"]
"""The place of an orientation: EXIF data, XMP, or the text chunk of a PNG in which ImageMagick keeps EXIF data."""

# A sample is wider than high and has four corners of different colours, so that its eight orientations differ.
CORNERS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))
WIDTH, HEIGHT = 32, 16  # multiples of a JPEG's blocks, so that no block mixes two corners
CLOSE = 0.1  # mean difference of values in [0, 1]: JPEG decoders differ by less, two orientations by more
DARK = 0.25  # of full brightness: a colour space changes the values between black and full ones
SHORT = 3  # the type of an orientation's value in EXIF data that programs write; Pillow also takes other integers
EXIF_LABEL = b"Exif\0\0"
BIG_ENDIAN_EXIF = b"MM\0*\0\0\0\x08"  # header of EXIF data whose first tags follow at byte 8


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
    type: int = SHORT
    """Type of the value in EXIF data: ffmpeg takes no other than SHORT, Pillow takes all integers and fractions."""

    @property
    def swaps_sides(self) -> bool:
        """True if width becomes height."""
        return self.value >= 5

    def sample(self) -> bytes:
        return _saved(_corners(), self.format, **self.metadata())

    def metadata(self) -> dict[str, Any]:
        """Return the options with which Pillow saves an image of this orientation."""
        match self.format, self.carrier:
            case "JPEG", "xmp":
                return {"xmp": _xmp(self.value)}
            case "PNG", "xmp":
                return {"pnginfo": _png_text(XMP_KEYWORD, _xmp(self.value).decode())}
            case _, "profile":
                data = _exif(self.value, self.type)
                return {"pnginfo": _png_text(PROFILE_KEYWORD, f"\nexif\n{len(data):8}\n{data.hex()}\n")}
            case _:
                return {"exif": _exif(self.value, self.type)}

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

    @property
    def is_colour(self) -> bool:
        """True if all pixels of one colour are transparent, and the others are opaque."""
        return self.mode not in ("RGBA", "LA", "P")

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
        return built((b"IHDR", header), (b"IDAT", zlib.compress(row * HEIGHT)), (b"IEND", b""))

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


@dataclass(frozen=True)
class Cmyk:
    """A JPEG in CMYK or YCCK, the colours of a printer."""

    format: Format = "JPEG"

    def sample(self) -> bytes:
        return _saved(_corners().convert("CMYK"), "JPEG")

    def note(self, loaded: Tensor) -> ImageNote:
        del loaded  # an RGB image, in each release
        return "converted_from_cmyk"


@dataclass(frozen=True)
class OtherColours:
    """An image whose file names another colour space than sRGB."""

    format: Format
    carrier: ColourCarrier

    def sample(self) -> bytes:
        if self.carrier == "gAMA":
            return with_chunk(_saved(_dark(), "PNG"), b"gAMA", struct.pack(">I", 100_000))  # values are linear
        if self.carrier == "cICP":
            return with_chunk(_saved(_dark(), "PNG"), b"cICP", bytes((9, 16, 0, 1)))  # BT.2020 with PQ, as of HDR films
        if self.carrier == "cHRM":
            narrow = (31270, 32900, 40000, 33000, 30000, 40000, 25000, 25000)  # of white, red, green, blue: x, y / 100,000
            return with_chunk(_saved(_dark(), "PNG"), b"cHRM", struct.pack(">8I", *narrow))
        if self.carrier == "exif":
            exif = Image.Exif()
            exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ColorSpace] = 2
            return _saved(_dark(), "JPEG", exif=exif)
        return _saved(_dark(), self.format, icc_profile=swapped_profile())

    def note(self, loaded: Tensor) -> ImageNote | None:
        return "colour_profile_ignored" if _shows(loaded, _dark(), CLOSE * DARK) else None


def _corners() -> Image.Image:
    image = Image.new("RGB", (WIDTH, HEIGHT))
    for number, colour in enumerate(CORNERS):
        left, upper = number % 2 * WIDTH // 2, number // 2 * HEIGHT // 2
        image.paste(colour, (left, upper, left + WIDTH // 2, upper + HEIGHT // 2))
    return image


def _dark() -> Image.Image:
    return _corners().point(lambda value: value * DARK)


def _saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    file = BytesIO()
    if file_format != "PNG":
        options |= {"quality": 95, "subsampling": 0}
    image.save(file, file_format, **options)
    return file.getvalue()


def _exif(orientation: int, value_type: int) -> bytes:
    tags = ImageFileDirectory_v2(BIG_ENDIAN_EXIF)
    tags.tagtype[ExifTags.Base.Orientation] = value_type
    tags[ExifTags.Base.Orientation] = orientation
    return EXIF_LABEL + BIG_ENDIAN_EXIF + tags.tobytes(len(BIG_ENDIAN_EXIF))


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
    """Return the features of an image that Pillow has opened from `data`, in the order of their notes. Nothing is decoded."""
    return tuple(_features(image, data))


def _features(image: Image.Image, data: bytes) -> Iterator[Feature]:
    file_format: Format = "PNG" if image.format == "PNG" else "JPEG"
    if image.mode in ("RGBA", "LA") or "transparency" in image.info:
        yield Transparency(image.mode)
    if (orientation := _orientation(image, data)) is not None:
        yield orientation
    if image.mode == "CMYK":
        yield Cmyk()
    if (colours := colours_of(image, data)) is not None:
        yield OtherColours(file_format, colours.carrier)
    if file_format == "PNG" and data[DEPTH] == 16:
        yield SixteenBits(data[COLOUR_TYPE])
    if file_format == "JPEG" and (getattr(image, "n_frames", 1) > 1 or has_further_images(data)):
        yield FurtherImages()


def _orientation(image: Image.Image, data: bytes) -> Orientation | None:
    """Return the orientation, as Pillow finds it in EXIF data or in XMP; None if viewers would not turn the image."""
    if image.format == "PNG":  # EXIF data may also follow the pixels
        with tolerant_pillow(), Image.open(BytesIO(with_one_pixel(data))) as metadata:
            metadata.load()
            return _tagged("PNG", metadata)
    return _tagged("JPEG", image)


def _tagged(file_format: Format, image: Image.Image) -> Orientation | None:
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    if value not in range(2, 9):
        return None
    for carrier, exif in _exif_of(image):
        value_type = _types(exif).get(ExifTags.Base.Orientation)
        if value_type is not None:
            return Orientation(file_format, int(value), carrier, value_type)
    return Orientation(file_format, int(value), "xmp")


def _exif_of(image: Image.Image) -> Iterator[tuple[Carrier, bytes]]:
    """Yield the EXIF data that Pillow reads, with their place; there are none or one."""
    if image.info.get("exif") is not None:
        yield "exif", image.info["exif"]
    elif PROFILE_KEYWORD in image.info:
        yield "profile", bytes.fromhex("".join(image.info[PROFILE_KEYWORD].split("\n")[3:]))


def _types(exif: bytes) -> dict[int, int]:
    """Return the types of the tags in EXIF data."""
    file = BytesIO(exif.removeprefix(EXIF_LABEL).removeprefix(EXIF_LABEL))
    tags = ImageFileDirectory_v2(file.read(len(BIG_ENDIAN_EXIF)))
    file.seek(tags.next)
    tags.load(file)
    return tags.tagtype


def pixels_of(image: Image.Image) -> Tensor:
    """Return a Pillow image as LoadImage's tensor: float32 `[1, height, width, 3]` in [0, 1]."""
    values = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return values.view(1, image.height, image.width, 3).float() / 255


def _shows(loaded: Tensor, expected: Image.Image, close: float = CLOSE) -> bool:
    """Return whether the pixels are about those of the image."""
    pixels = pixels_of(expected)
    return loaded.shape == pixels.shape and float((loaded - pixels).abs().mean()) < close
