"""The copy of a PNG that LoadImage gets: its pixels are inflated already, and metadata that Pillow cannot read are left out.

The judgement of a PNG inflates its rows. The copy has the same rows, as a stream of DEFLATE without compression, so that
LoadImage need not inflate them again, which takes longer than the judgement. The other chunks stay as they are. Rows that are
large, or that hardly take time to inflate, stay compressed.

Source: RFC 1950 and RFC 1951 for the stream.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from isal import isal_zlib

from latent_encoder.images.png import SoundPng
from latent_encoder.images.png_chunks import Buffer, Span

STREAM_HEADER = b"\x78\x01"  # a window of 32 KiB, the quickest compression
BLOCK = struct.Struct("<BHH")  # 1 for the last block, the number of bytes in it, and its complement


def parts_of_copy(data: Buffer, png: SoundPng) -> list[Buffer | memoryview]:
    """Return the copy of a file in parts; none if LoadImage may have the file as it is."""
    view, (start, end) = memoryview(data), png.pixels
    if png.rows:
        chunk = _chunk(b"IDAT", list(_stored(png.rows)))
        return [*_without(view, 0, start, png.unreadable), *chunk, *_without(view, end, len(data), png.unreadable)]
    return list(_without(view, 0, len(data), png.unreadable)) if png.unreadable else []


def _without(view: memoryview, start: int, end: int, spans: Sequence[Span]) -> Iterator[memoryview]:
    """Yield the bytes from `start` to `end` except those in `spans`, which are in order."""
    for first, last in spans:
        if start <= first and last <= end:
            yield view[start:first]
            start = last
    yield view[start:end]


def _stored(pieces: Sequence[bytes]) -> Iterator[bytes]:
    """Yield a zlib stream of these pieces, of at most 65,535 bytes each, without compression."""
    checksum = 1  # Adler-32 of no bytes
    yield STREAM_HEADER
    for number, piece in enumerate(pieces, 1):
        yield BLOCK.pack(number == len(pieces), len(piece), len(piece) ^ 0xFFFF)
        yield piece
        checksum = isal_zlib.adler32(piece, checksum)
    yield checksum.to_bytes(4)


def _chunk(kind: bytes, content: Sequence[bytes]) -> list[bytes]:
    """Return a chunk, in parts."""
    checksum = isal_zlib.crc32(kind)
    for part in content:
        checksum = isal_zlib.crc32(part, checksum)
    return [struct.pack(">I", sum(map(len, content))) + kind, *content, checksum.to_bytes(4)]
