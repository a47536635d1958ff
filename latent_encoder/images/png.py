"""The structure of a PNG: its chunks, their order, and the number of bytes in its rows, without decoding pixels.

It refuses the damage that libpng reports as an error, and accepts the oddities of which libpng only warns. ComfyUI's LoadImage
accepts both. Source: W3C, Portable Network Graphics, third edition.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple, Protocol

from isal import isal_zlib

from latent_encoder.images.faults import ImageDamage, ImageFault
from latent_encoder.images.png_chunks import CHECKSUM, NAME_END, SIGNATURE, Buffer, Chunk, Span
from latent_encoder.images.png_unreadable import matters, unreadable

HEADER_END = 33  # bytes: the signature, and the chunk IHDR with 13 bytes of content

MOST_CHUNKS = 100_000  # files have up to some thousands; a chunk of 12 bytes costs Pillow 20 microseconds and 200 bytes
LARGEST_SIDE = 2**31 - 1  # pixels; the limit of the format

IGZIP_ERROR: type[Exception] = isal_zlib.error  # type: ignore[assignment]  # its types call the class an instance
COMPRESSED_PIECE = 64 * 1024  # bytes given to the inflater at once, because it copies the part that it did not use
INFLATED_PIECE = 256 * 1024  # bytes taken from the inflater at once; larger pieces are not quicker

CHANNELS: Mapping[int, int] = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
DEPTHS: Mapping[int, tuple[int, ...]] = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
LARGEST_PALETTE = 3 * 256  # bytes
MOST_FRAMES = 2**31  # more are invalid for Pillow
PALETTE_COLOURS = 3  # the colour type of an image whose samples are places in a palette
FILTERS = bytes(range(5))  # the values that may begin a row

# Adam7, the only interlacing: first column, first row, and the steps between columns and between rows, of each pass.
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))

CRITICAL = frozenset((b"IHDR", b"PLTE", b"IDAT", b"IEND"))
KEPT_RAW = frozenset((b"cICP", b"cHRM", b"eXIf", b"gAMA", b"iCCP", b"sRGB", b"tRNS"))


@dataclass(frozen=True)
class Header:
    """The content of IHDR."""

    width: int
    height: int
    bit_depth: int
    colour_type: int
    is_interlaced: bool


@dataclass(frozen=True)
class PngFacts:
    """The facts of a sound PNG."""

    header: Header
    raw: Mapping[str, bytes] = field(repr=False)
    """Contents of the chunks cICP, cHRM, eXIf, gAMA, iCCP, sRGB and tRNS, by name; of several, the last."""
    keywords: tuple[str, ...]
    """Keywords of the texts, each once."""
    unreadable: tuple[Span, ...]
    """Places of chunks that make Pillow fail, and that hold no pixels: `without` leaves them out."""

    @property
    def profile_name(self) -> str | None:
        """Name of the colour profile, None if there is no profile."""
        profile = self.raw.get("iCCP")
        return None if profile is None else profile.partition(b"\0")[0].decode("latin-1")


def check_png(data: Buffer, max_pixels: int | None = None) -> PngFacts:
    """Return the facts of a PNG, which is whole.

    Raises:
        ImageDamage: it is not.
        ImageFault: the file begins with no PNG header, is animated, or has too many chunks or more than `max_pixels` pixels.
    """
    facts, pixels = _facts_and_pixels(data, max_pixels)
    _check_pixels(data, facts.header, pixels)
    return facts


def facts_of(data: Buffer, max_pixels: int | None = None) -> PngFacts:
    """Return the facts of a PNG that has passed `check_png`, in less time: its pixels are not inflated.

    Raises:
        ImageFault: as `check_png`, except for damaged pixels.
    """
    return _facts_and_pixels(data, max_pixels)[0]


def _header_within(data: Buffer, max_pixels: int | None) -> Header:
    header = read_header(data)
    if max_pixels is not None and header.width * header.height > max_pixels:
        size = f"{header.width} x {header.height} px"
        raise ImageFault(f"has more than MAX_IMAGE_PIXELS={max_pixels} pixels, {size}; scale it down, or raise the limit")
    return header


def _facts_and_pixels(data: Buffer, max_pixels: int | None) -> tuple[PngFacts, Sequence[Chunk]]:
    """Return the facts, and the chunks of pixels. An image that must not be decoded is found before damage to it is."""
    header = _header_within(data, max_pixels)
    chunks, damage = _walk(data)
    head, pixels = _head_and_pixels(chunks)
    _check_frames(data, head)
    if damage is not None:
        raise damage
    _check_order(header, chunks, head, pixels)
    _check_texts(data, head)
    _check_controls(data, header, head)
    whole = [chunk for chunk in chunks if chunk.is_whole]
    facts = PngFacts(
        header,
        {chunk.kind.decode(): chunk.content(data) for chunk in whole if chunk.kind in KEPT_RAW},
        tuple(dict.fromkeys(word.decode("latin-1") for chunk in whole if (word := chunk.keyword(data)) is not None)),
        tuple(unreadable(data, chunks, header.colour_type)),
    )
    return facts, pixels


def without(data: bytes, spans: Sequence[Span]) -> bytes:
    """Return the file without these parts of it, which are in order."""
    if not spans:
        return data
    view, ends = memoryview(data), [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), len(data)]
    return b"".join(view[end:start] for end, start in zip(ends, starts, strict=True))


def _damaged(fault: str) -> ImageDamage:
    return ImageDamage(f"is damaged: {fault}; fetch or export it again")


def _no_header(fault: str) -> ImageFault:
    """Return a fault without which no decoder finds an image."""
    return ImageFault(str(_damaged(fault)))


def read_header(data: Buffer) -> Header:
    """Return the content of IHDR, the first chunk.

    Raises:
        ImageFault: it is not there, not whole, or has values that no PNG has.
    """
    if data[:8] != SIGNATURE:
        raise _no_header("it does not begin like a PNG")
    if data[8 + 4 : 8 + 8] == b"CgBI":
        raise ImageFault(
            "is a PNG in the form that Apple's Xcode makes for iPhones, which no other program reads; "
            "convert it, for example with `pngcrush -revert-iphone-optimizations FILE out.png`"
        )
    if len(data) < HEADER_END:
        raise _no_header(f"it ends inside its header, after {len(data)} bytes")
    length, kind = struct.unpack_from(">I4s", data, 8)
    if (length, kind) != (13, b"IHDR"):
        raise _no_header("its header, the chunk IHDR of 13 bytes, is not at its beginning")
    if zlib.crc32(data[12:29]) != int.from_bytes(data[29:33]):
        raise _no_header("the checksum of its header is wrong")
    width, height, depth, colour, compression, filtering, interlacing = struct.unpack_from(">IIBBBBB", data, 16)
    if not (0 < width <= LARGEST_SIDE and 0 < height <= LARGEST_SIDE):
        raise _no_header(f"its header states a size of {width} x {height} px")
    if depth not in DEPTHS.get(colour, ()):
        raise _no_header(f"its header states {depth} bits a sample with colour type {colour}, which no PNG has")
    for name, value, largest in (("compression", compression, 0), ("filter", filtering, 0), ("interlace", interlacing, 1)):
        if value > largest:
            raise _no_header(f"its header states the {name} method {value}, which no PNG has")
    return Header(width, height, depth, colour, bool(interlacing))


def _walk(data: Buffer) -> tuple[list[Chunk], ImageDamage | None]:
    """Return the chunks up to IEND or to damage, and the first damage. Bytes behind IEND are no part of the image.

    Raises:
        ImageFault: there are too many chunks.
    """
    chunks: list[Chunk] = []
    damage = None
    try:
        for chunk in _chunks(data):
            if not chunk.is_whole and damage is None and (chunk.is_critical or matters(chunk, data)):
                damage = _damaged(f"the checksum of its chunk {chunk.kind.decode()} at byte {chunk.start} is wrong")
            chunks.append(chunk)
            if len(chunks) > MOST_CHUNKS:
                raise ImageFault(f"has more than {MOST_CHUNKS:,} chunks; save it again as a usual PNG")
    except ImageDamage as exc:
        damage = damage or exc
    return chunks, damage


def _chunks(data: Buffer) -> Iterator[Chunk]:
    """Yield each chunk.

    Raises:
        ImageDamage: the file ends before IEND, or a chunk is none.
    """
    view, start, kind = memoryview(data), len(SIGNATURE), b""
    while kind != b"IEND":
        if start == len(data):
            raise _damaged("it ends without the chunk IEND")
        kind, length = _chunk_head(data, start)
        end = start + NAME_END + length + CHECKSUM
        if end > len(data):
            there = min(len(data) - start - NAME_END, length)
            raise _damaged(f"it ends inside its chunk {kind.decode()}, after {there} of {length} bytes")
        is_whole = zlib.crc32(view[start + 4 : end - CHECKSUM]) == int.from_bytes(view[end - CHECKSUM : end])
        yield Chunk(kind, start, end, is_whole)
        start = end


def _chunk_head(data: Buffer, start: int) -> tuple[bytes, int]:
    """Return name and length of the chunk at `start`."""
    if start + 8 > len(data):
        raise _damaged(f"it ends inside a chunk, at byte {len(data)}")
    length, kind = struct.unpack_from(">I4s", data, start)
    if not kind.isalpha():
        raise _damaged(f"at byte {start} it has no chunk, so bytes before that are missing or wrong")
    return kind, length


def _head_and_pixels(chunks: Sequence[Chunk]) -> tuple[Sequence[Chunk], Sequence[Chunk]]:
    """Return the chunks before the pixels, and those of the pixels. Decoders stop reading pixels at another chunk."""
    first = next((place for place, chunk in enumerate(chunks) if chunk.kind == b"IDAT"), len(chunks))
    return chunks[:first], list(takewhile(lambda chunk: chunk.kind == b"IDAT", chunks[first:]))


def _check_order(header: Header, chunks: Sequence[Chunk], head: Sequence[Chunk], pixels: Sequence[Chunk]) -> None:
    """Raise ImageDamage if critical chunks are missing, unknown or repeated."""
    kinds = [chunk.kind for chunk in chunks if chunk.is_critical]
    if unknown := next((kind for kind in kinds if kind not in CRITICAL), None):
        raise _damaged(f"it has the unknown chunk {unknown.decode()}, and states that nobody can show it without that chunk")
    if kinds.count(b"IHDR") > 1:
        raise _damaged("it has two headers (chunks IHDR)")
    if not pixels:
        raise _damaged("it has no pixels (chunks IDAT)")
    if header.colour_type == PALETTE_COLOURS:
        _check_palette([chunk for chunk in chunks if chunk.kind == b"PLTE"], head)


def _check_palette(palettes: Sequence[Chunk], head: Sequence[Chunk]) -> None:
    """Raise ImageDamage if the palette is missing, wrong, or not the only one."""
    if not palettes or palettes[0] not in head:
        raise _damaged("its palette (chunk PLTE) is missing before its pixels")
    if len(palettes) > 1:
        raise _damaged("it has several palettes (chunks PLTE)")
    if (length := palettes[0].length) % 3 or not 3 <= length <= LARGEST_PALETTE:
        raise _damaged(f"its palette (chunk PLTE) has {length} bytes, not 3 for each of 1 to 256 colours")


def _check_texts(data: Buffer, head: Sequence[Chunk]) -> None:
    """Raise an ImageFault if ComfyUI's Pillow takes a text for a property of the pixels, and decodes them wrongly."""
    if any(chunk.keyword(data) == b"interlace" for chunk in head):
        raise ImageFault("has a text called `interlace`, with which ComfyUI decodes wrong pixels; save it without metadata")


def _check_frames(data: Buffer, head: Sequence[Chunk]) -> None:
    """Raise an ImageFault if there are several frames, counted as Pillow does."""
    stated = _stated_frames(data, head)
    count = stated + (not any(chunk.kind == b"fcTL" for chunk in head))
    if stated and count > 1:
        raise ImageFault(f"is animated, {count} frames; give one of them as an image of its own")


def _check_controls(data: Buffer, header: Header, head: Sequence[Chunk]) -> None:
    """Raise ImageDamage if Pillow takes a part of an animation for a part of the image."""
    if any(chunk.kind == b"fdAT" for chunk in head):
        raise _damaged("it has the frame of an animation before its pixels")
    fitting = struct.pack(">IIIII", 0, header.width, header.height, 0, 0)  # number, size, place
    if any(chunk.kind == b"fcTL" and not chunk.content(data).startswith(fitting) for chunk in head):
        raise _damaged("it has the frame of an animation that is not of its size")


def _stated_frames(data: Buffer, head: Sequence[Chunk]) -> int:
    """Return the number in acTL, and 0 if there is none. A second acTL makes the first invalid for Pillow."""
    frames = 0
    for chunk in head:
        if chunk.kind == b"acTL" and chunk.length >= 8:
            stated = int.from_bytes(chunk.content(data)[:4])
            frames = 0 if frames or stated > MOST_FRAMES else stated
    return frames


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


def _check_pixels(data: Buffer, header: Header, chunks: Sequence[Chunk]) -> None:
    """Raise ImageDamage if the stream in the chunks does not hold every row. Bytes behind the last row do not matter.

    igzip is 2.4 times as quick as zlib. Only zlib refuses: it judges the stream again if igzip finds a fault.
    """
    try:
        _check_rows(_inflated(_pieces(data, chunks), isal_zlib.decompressobj(), header), header)
    except (IGZIP_ERROR, ImageFault):
        try:
            _check_rows(_inflated(_pieces(data, chunks), zlib.decompressobj(), header), header)
        except zlib.error as exc:
            raise _damaged("its compressed pixels are wrong") from exc


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
    total = left = sum(area.size for area in _areas(header))
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
        raise _damaged(f"its pixels end after {total - left} of {total} bytes")
    if not inflater.eof:
        raise _damaged("the checksum behind its pixels is missing")


def _check_rows(pieces: Iterable[bytes], header: Header) -> None:
    """Raise ImageDamage if a row does not begin with the number of a filter."""
    areas = iter(_areas(header))
    area, place = next(areas), 0  # the area, and the place in it
    for piece in pieces:
        start = 0
        while start < len(piece):
            end = min(len(piece), start + area.size - place)
            filters = piece[start + -place % area.row_bytes : end : area.row_bytes]
            if filters.translate(None, FILTERS):
                raise _damaged("a row of its pixels has an unknown filter")
            place, start = place + end - start, end
            if place == area.size:
                area, place = next(areas, area), 0
