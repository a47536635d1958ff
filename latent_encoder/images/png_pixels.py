"""The pixels of a PNG: its rows, inflated piece by piece, and the filters of the rows. Nothing is decoded.

Source: W3C, Portable Network Graphics, third edition.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

from isal import isal_zlib

from latent_encoder.images.faults import ImageFault, png_damage
from latent_encoder.images.png_chunks import Buffer, Chunk, Header

IGZIP_ERROR: type[Exception] = isal_zlib.error  # type: ignore[assignment]  # its types call the class an instance
COMPRESSED_PIECE = 64 * 1024  # bytes given to the inflater at once, because it copies the part that it did not use
INFLATED_PIECE = 65_535  # bytes taken from the inflater at once: the largest block of a stream without compression

CHANNELS: Mapping[int, int] = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
FILTERS = bytes(range(5))  # the values that may begin a row

# Adam7, the only interlacing: first column, first row, and the steps between columns and between rows, of each pass.
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


class _Inflater(Protocol):
    """A decompressor of zlib, or of another library with the same methods."""

    @property
    def eof(self) -> bool: ...

    @property
    def unconsumed_tail(self) -> bytes: ...

    def decompress(self, data: bytes | memoryview, /, max_length: int) -> bytes: ...


class _Area(NamedTuple):
    """The rows of an image, or of one pass of an interlaced one."""

    rows: int
    row_bytes: int
    """With the number of the row's filter, its first byte."""

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.rows * self.row_bytes


def size_of_rows(header: Header) -> int:
    """Return the number of bytes of all rows, with their filters."""
    return sum(area.size for area in _areas(header))


def check_pixels(data: Buffer, header: Header, chunks: Iterable[Chunk], *, keep: bool) -> tuple[bytes, ...]:
    """Return the rows, in pieces; none unless `keep`. Bytes of the stream behind the last row do not matter.

    igzip is 2.4 times as quick as zlib. Only zlib refuses: it judges the stream again if igzip finds a fault.

    Raises:
        ImageDamage: the stream in the chunks does not hold every row, or a row has an unknown filter.
    """
    try:
        return _rows(_inflated(_pieces(data, chunks), isal_zlib.decompressobj(), header), header, keep=keep)
    except (IGZIP_ERROR, ImageFault):
        try:
            return _rows(_inflated(_pieces(data, chunks), zlib.decompressobj(), header), header, keep=keep)
        except zlib.error as exc:
            raise png_damage("its compressed pixels are wrong") from exc


def _areas(header: Header) -> list[_Area]:
    """Return the areas that have pixels, in the order of the stream."""
    bits, areas = header.bit_depth * CHANNELS[header.colour_type], []
    for left, top, across, down in PASSES if header.is_interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(header.width - left) // across), -(-(header.height - top) // down)
        if columns > 0 and rows > 0:
            areas.append(_Area(rows, 1 + -(-columns * bits // 8)))
    return areas


def _pieces(data: Buffer, chunks: Iterable[Chunk]) -> Iterator[memoryview]:
    view = memoryview(data)
    for first, last in (chunk.content_span for chunk in chunks):
        for start in range(first, last, COMPRESSED_PIECE):
            yield view[start : min(start + COMPRESSED_PIECE, last)]


def _inflated(pieces: Iterable[memoryview], inflater: _Inflater, header: Header) -> Iterator[bytes]:
    """Yield the bytes of the rows, in pieces.

    Raises:
        ImageFault: the stream ends before the last row, or before its checksum.
    """
    total = left = size_of_rows(header)
    for piece in pieces:
        source: bytes | memoryview = piece
        while not inflater.eof:
            found = inflater.decompress(source, max(1, min(INFLATED_PIECE, left)))
            source = inflater.unconsumed_tail
            if found and not left:
                return  # the stream is longer than the image
            if found:
                left -= len(found)
                yield found
            elif not source:
                break
    if left:
        raise png_damage(f"its pixels end after {total - left} of {total} bytes")
    if not inflater.eof:
        raise png_damage("the checksum behind its pixels is missing")


def _rows(pieces: Iterable[bytes], header: Header, *, keep: bool) -> tuple[bytes, ...]:
    """Return the pieces of rows whose filters are known, none unless `keep`."""
    return tuple(piece for piece in _checked(pieces, header) if keep)


def _checked(pieces: Iterable[bytes], header: Header) -> Iterator[bytes]:
    """Yield each piece. Raise ImageDamage if a row does not begin with the number of a filter."""
    areas = iter(_areas(header))
    area, place = next(areas), 0  # the area, and the place in it
    for piece in pieces:
        start = 0
        while start < len(piece):
            end = min(len(piece), start + area.size - place)
            filters = piece[start + -place % area.row_bytes : end : area.row_bytes]
            if filters.translate(None, FILTERS):
                raise png_damage("a row of its pixels has an unknown filter")
            place, start = place + end - start, end
            if place == area.size:
                area, place = next(areas, area), 0
        yield piece
