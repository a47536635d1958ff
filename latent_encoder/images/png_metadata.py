"""The chunks of a PNG beside its pixels. Source: the PNG specification, third edition."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from latent_encoder.images.png_chunks import CHECKSUM, NAME_END, SIGNATURE, TEXTS

DEPTH, COLOUR_TYPE = 24, 25
"""Offsets of the bits per sample and of the colour type in a PNG; both are in IHDR, which is always the first chunk."""

XMP_KEYWORD, PROFILE_KEYWORD = "XML:com.adobe.xmp", "Raw profile type exif"  # keywords of text chunks
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by colour type

Chunk = tuple[bytes, bytes]
"""Kind and content."""


def chunks(data: bytes) -> Iterator[Chunk]:
    """Yield the chunks of a PNG except those of its pixels."""
    offset = len(SIGNATURE)
    while offset + NAME_END <= len(data):
        length, kind = struct.unpack_from(">I4s", data, offset)
        content = offset + NAME_END
        if kind not in (b"IDAT", b"fdAT"):
            yield kind, data[content : content + length]
        offset = content + length + CHECKSUM


def built(*content: Chunk) -> bytes:
    """Return the PNG with these chunks."""
    return SIGNATURE + b"".join(map(_framed, content))


def _framed(chunk: Chunk) -> bytes:
    kind, content = chunk
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_one_pixel(data: bytes) -> bytes:
    """Return a PNG of one pixel with the same EXIF data and XMP. Pillow reads them there without decoding a large image.

    Their order is kept, and so is their place before or behind the pixels: a reader may take the first or the last.
    """
    depth, colour_type = data[DEPTH], data[COLOUR_TYPE]
    row = bytes(1 + (SAMPLES[colour_type] * depth + 7) // 8)
    header = struct.pack(">IIBBBBB", 1, 1, depth, colour_type, 0, 0, 0)
    palette = [(b"PLTE", bytes(3))] if colour_type == 3 else []  # the colour type of palettes
    kept = [chunk for chunk in chunks(data) if _has_orientation(*chunk)]
    return built((b"IHDR", header), *palette, *kept, (b"IDAT", zlib.compress(row)), (b"IEND", b""))


def _has_orientation(kind: bytes, content: bytes) -> bool:
    keyword = content.partition(b"\0")[0]
    return kind == b"eXIf" or (kind in TEXTS and keyword in (XMP_KEYWORD.encode(), PROFILE_KEYWORD.encode()))


def with_chunk(data: bytes, kind: bytes, content: bytes) -> bytes:
    """Return the PNG with one more chunk, behind its header."""
    header_end = len(SIGNATURE) + NAME_END + 13 + CHECKSUM
    return data[:header_end] + _framed((kind, content)) + data[header_end:]
