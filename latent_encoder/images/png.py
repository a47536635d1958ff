"""The structure of a PNG: its chunks, their order, and the number of bytes in its rows, without decoding pixels.

It refuses the damage that libpng reports as an error, and accepts the oddities of which libpng only warns. ComfyUI's LoadImage
accepts both. Source: W3C, Portable Network Graphics, third edition.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from isal import isal_zlib

from latent_encoder.images.faults import ImageDamage, ImageFault, png_damage
from latent_encoder.images.png_chunks import CHECKSUM, NAME_END, SIGNATURE, Buffer, Chunk, Header, Span
from latent_encoder.images.png_pixels import check_pixels, size_of_rows
from latent_encoder.images.png_unreadable import matters, unreadable

HEADER_END = 33  # bytes: the signature, and the chunk IHDR with 13 bytes of content

MOST_CHUNKS = 100_000  # files have up to some thousands; a chunk of 12 bytes costs Pillow 20 microseconds and 200 bytes
LARGEST_SIDE = 2**31 - 1  # pixels; the limit of the format

DEPTHS: Mapping[int, tuple[int, ...]] = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
LARGEST_PALETTE = 3 * 256  # bytes
MOST_FRAMES = 2**31  # more are invalid for Pillow
PALETTE_COLOURS = 3  # the colour type of an image whose samples are places in a palette

MOST_KEPT = 60_000_000  # bytes of rows; 4096 x 4096 pixels of 24 bits have 50 million, and Docker gives /dev/shm 64 MB
MOST_GROWTH = 4  # times the compressed size; rows that are larger than that take Pillow little time to inflate

CRITICAL = frozenset((b"IHDR", b"PLTE", b"IDAT", b"IEND"))


@dataclass(frozen=True)
class SoundPng:
    """The parts of a whole PNG."""

    header: Header
    unreadable: tuple[Span, ...]
    """Places of chunks that make Pillow fail, and that hold no pixels, in order."""
    pixels: Span
    """Place of the chunks with the pixels."""
    rows: tuple[bytes, ...] = field(repr=False)
    """The inflated rows in pieces; none if they are not to be kept."""


def check_png(data: Buffer, max_pixels: int | None = None) -> SoundPng:
    """Return the parts of a PNG, which is whole.

    An image that must not be decoded is found before damage to it is.

    Raises:
        ImageDamage: it is not.
        ImageFault: the file begins with no PNG header, is animated, or has too many chunks or more than `max_pixels` pixels.
    """
    header = _header_within(data, max_pixels)
    chunks, damage = _walk(data)
    head, pixels = _head_and_pixels(chunks)
    _check_frames(data, head)
    if damage is not None:
        raise damage
    _check_order(header, chunks, head, pixels)
    _check_texts(data, head)
    _check_controls(data, header, head)
    spans = tuple(unreadable(data, chunks, header.colour_type))
    rows = check_pixels(data, header, pixels, keep=_are_kept(size_of_rows(header), sum(chunk.length for chunk in pixels)))
    return SoundPng(header, spans, (pixels[0].start, pixels[-1].end), rows)


def _header_within(data: Buffer, max_pixels: int | None) -> Header:
    header = read_header(data)
    if max_pixels is not None and header.width * header.height > max_pixels:
        size = f"{header.width} x {header.height} px"
        raise ImageFault(f"has more than MAX_IMAGE_PIXELS={max_pixels} pixels, {size}; scale it down, or raise the limit")
    return header


def _are_kept(size: int, compressed: int) -> bool:
    """Return whether rows of that size are worth a copy: inflating them takes time, and they are not much larger."""
    return compressed < size <= min(MOST_KEPT, MOST_GROWTH * compressed)


def _no_header(fault: str) -> ImageFault:
    """Return a fault without which no decoder finds an image."""
    return ImageFault(str(png_damage(fault)))


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
                damage = png_damage(f"the checksum of its chunk {chunk.kind.decode()} at byte {chunk.start} is wrong")
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
            raise png_damage("it ends without the chunk IEND")
        kind, length = _chunk_head(data, start)
        end = start + NAME_END + length + CHECKSUM
        if end > len(data):
            there = min(len(data) - start - NAME_END, length)
            raise png_damage(f"it ends inside its chunk {kind.decode()}, after {there} of {length} bytes")
        is_whole = isal_zlib.crc32(view[start + 4 : end - CHECKSUM]) == int.from_bytes(view[end - CHECKSUM : end])
        yield Chunk(kind, start, end, is_whole)
        start = end


def _chunk_head(data: Buffer, start: int) -> tuple[bytes, int]:
    """Return name and length of the chunk at `start`."""
    if start + 8 > len(data):
        raise png_damage(f"it ends inside a chunk, at byte {len(data)}")
    length, kind = struct.unpack_from(">I4s", data, start)
    if not kind.isalpha():
        raise png_damage(f"at byte {start} it has no chunk, so bytes before that are missing or wrong")
    return kind, length


def _head_and_pixels(chunks: Sequence[Chunk]) -> tuple[Sequence[Chunk], Sequence[Chunk]]:
    """Return the chunks before the pixels, and those of the pixels. Decoders stop reading pixels at another chunk."""
    first = next((place for place, chunk in enumerate(chunks) if chunk.kind == b"IDAT"), len(chunks))
    return chunks[:first], list(takewhile(lambda chunk: chunk.kind == b"IDAT", chunks[first:]))


def _check_order(header: Header, chunks: Sequence[Chunk], head: Sequence[Chunk], pixels: Sequence[Chunk]) -> None:
    """Raise ImageDamage if critical chunks are missing, unknown or repeated."""
    kinds = [chunk.kind for chunk in chunks if chunk.is_critical]
    if unknown := next((kind for kind in kinds if kind not in CRITICAL), None):
        raise png_damage(f"it has the unknown chunk {unknown.decode()}, and states that nobody can show it without that chunk")
    if kinds.count(b"IHDR") > 1:
        raise png_damage("it has two headers (chunks IHDR)")
    if not pixels:
        raise png_damage("it has no pixels (chunks IDAT)")
    if header.colour_type == PALETTE_COLOURS:
        _check_palette([chunk for chunk in chunks if chunk.kind == b"PLTE"], head)


def _check_palette(palettes: Sequence[Chunk], head: Sequence[Chunk]) -> None:
    """Raise ImageDamage if the palette is missing, wrong, or not the only one."""
    if not palettes or palettes[0] not in head:
        raise png_damage("its palette (chunk PLTE) is missing before its pixels")
    if len(palettes) > 1:
        raise png_damage("it has several palettes (chunks PLTE)")
    if (length := palettes[0].length) % 3 or not 3 <= length <= LARGEST_PALETTE:
        raise png_damage(f"its palette (chunk PLTE) has {length} bytes, not 3 for each of 1 to 256 colours")


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
        raise png_damage("it has the frame of an animation before its pixels")
    fitting = struct.pack(">IIIII", 0, header.width, header.height, 0, 0)  # number, size, place
    if any(chunk.kind == b"fcTL" and not chunk.content(data).startswith(fitting) for chunk in head):
        raise png_damage("it has the frame of an animation that is not of its size")


def _stated_frames(data: Buffer, head: Sequence[Chunk]) -> int:
    """Return the number in acTL, and 0 if there is none. A second acTL makes the first invalid for Pillow."""
    frames = 0
    for chunk in head:
        if chunk.kind == b"acTL" and chunk.length >= 8:
            stated = int.from_bytes(chunk.content(data)[:4])
            frames = 0 if frames or stated > MOST_FRAMES else stated
    return frames
