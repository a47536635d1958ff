"""Image files of kinds that the test images lack: PNGs of any depth with transparency, EXIF data, and ICC profiles."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from fuzz import pngs

Values = np.ndarray[Any, np.dtype[np.int64]]
"""Samples `[height, width, channels]`, as they are stored."""


def png(colour_type: int, depth: int, values: Values, **chunks: bytes) -> bytes:
    """Return a PNG of these samples, with further chunks before its pixels."""
    height, width, _ = values.shape
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + _packed(row, depth) for row in values))
    extra = [(kind.encode(), content) for kind, content in chunks.items()]
    return pngs.build([(b"IHDR", header), *extra, (b"IDAT", pixels), (b"IEND", b"")])


def _packed(row: Values, depth: int) -> bytes:
    if depth >= 8:
        return row.astype(">u2" if depth == 16 else "u1").tobytes()
    bits = "".join(f"{value:0{depth}b}" for value in row.ravel())
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8)


def exif(value: int, value_type: int = 3, count: int = 1) -> bytes:
    """Return EXIF data with an orientation of that type and count."""
    stored = {1: ">Bxxx", 3: ">Hxx", 4: ">I", 5: ">I", 6: ">Bxxx", 7: ">Bxxx", 8: ">Hxx", 9: ">I"}[value_type]
    place = 26 if value_type == 5 else value  # a fraction stands behind the tags
    entry = struct.pack(">HHI", 274, value_type, count) + struct.pack(stored, place)
    return b"MM\0*\0\0\0\x08\0\1" + entry + bytes(4) + struct.pack(">II", value, 1)


def xmp(value: str) -> bytes:
    """Return XMP with that orientation."""
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{value}"/></rdf:RDF></x:xmpmeta>'
    ).encode()


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    """Return the image as a file."""
    file = BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def with_chunks(data: bytes, *chunks: tuple[bytes, bytes], behind: bool = False) -> bytes:
    """Return the PNG with further chunks, before its pixels or behind them."""
    parts = pngs.parse(data)
    place = len(parts) - 1 if behind else 1
    return pngs.build([*parts[:place], *chunks, *parts[place:]])


SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
WHITE = (0.9642, 1.0, 0.8249)
"""The primaries of colour spaces and the white, as XYZ values of ICC profiles."""


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def rgb_profile(primaries: tuple[tuple[float, ...], ...], gamma: float) -> bytes:
    """Return an ICC profile of three primaries and one curve."""
    tags = {b"wtpt": _xyz(WHITE)}
    for name, primary in zip("rgb", primaries, strict=True):
        tags |= {f"{name}XYZ".encode(): _xyz(primary), f"{name}TRC".encode(): _curve(gamma)}
    return _profile(b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    return _profile(b"GRAY", b"XYZ ", {b"wtpt": _xyz(WHITE), b"kTRC": _curve(gamma)})


def printer_profile() -> bytes:
    """Return an ICC profile of CMYK inks of which all are grey: each of the 16 mixes of full inks is a grey."""
    mixes = (f"{number:04b}".count("1") for number in range(16))
    table = b"".join(bytes((255 - 63 * inks, 128, 128)) for inks in mixes)
    ramp = bytes(range(256))
    identity = b"".join(_fixed(value) for value in (1, 0, 0, 0, 1, 0, 0, 0, 1))
    lut = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + ramp * 4 + table + ramp * 3
    return _profile(b"CMYK", b"Lab ", {b"wtpt": _xyz(WHITE), b"A2B0": lut, b"A2B1": lut}, b"prtr")


def _profile(space: bytes, connection: bytes, tags: Mapping[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    described = b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(79)
    parts = {b"desc": described, **tags}
    table, body, start = struct.pack(">I", len(parts)), b"", 128 + 4 + 12 * len(parts)
    for name, content in parts.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(">I4xI", 128 + len(table) + len(body), 0x02400000) + kind + space + connection + bytes(12)
    header += b"acsp" + bytes(28) + b"".join(map(_fixed, WHITE))
    return header.ljust(128, b"\0") + table + body


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(map(_fixed, values))


def _curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
