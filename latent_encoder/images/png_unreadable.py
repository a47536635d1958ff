"""Metadata of a PNG that Pillow cannot read, or reads slowly. The copy that LoadImage gets does without them.

Pillow fails on a text of more than a megabyte, for example. ComfyUI then lets Pillow read the file again with a tolerance for
every fault. The pixels stay the same, except for an orientation, so texts and chunks that may have one stay as far
as ComfyUI sees them.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from latent_encoder.images.faults import ImageFault
from latent_encoder.images.png_chunks import TEXTS, Buffer, Chunk, Span

LARGEST_TEXT = 1024 * 1024  # bytes of a text or profile after inflating; Pillow's MAX_TEXT_CHUNK
LARGEST_TEXTS = 16 * LARGEST_TEXT  # bytes of all of them; files have a few megabytes at most, and Pillow allows 64
USUAL_CHUNKS = 1000  # of a file; Pillow reads so many in 10 ms

SHORTEST: Mapping[bytes, int] = {b"acTL": 8, b"cHRM": 32, b"fcTL": 26, b"gAMA": 4, b"pHYs": 9, b"sRGB": 1}  # bytes
SHORTEST_TRANSPARENCY: Mapping[int, int] = {0: 2, 2: 6}  # bytes of tRNS, by colour type; a palette's has any length
ANIMATION = frozenset((b"acTL", b"fcTL", b"fdAT"))
OF_PIXELS = frozenset((b"eXIf", b"tRNS", *ANIMATION))  # ancillary chunks that change the pixels in Pillow

XMP, PROFILE, EXIF = b"XML:com.adobe.xmp", b"Raw profile type exif", b"exif"
CARRIERS = frozenset((XMP, PROFILE, EXIF))
"""Keywords of texts in which Pillow looks for an orientation."""
MISTAKEN = frozenset((b"bbox", b"default_image", b"transparency", b"xmp"))
"""Keywords of texts that Pillow takes for its own notes on the image, and fails on."""

EXIF_LABEL = re.compile(rb"(Exif\0\0){1,2}")
TIFF_BEGINNINGS = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0")
SHORTEST_EXIF = 8  # bytes: the beginning, and the place of the first entry
NO_METHOD = -1

Verdict = Literal["kept", "left out", "stops"]
"""Pillow reads the chunk, does without it, or raises the error after which ComfyUI has it read the file tolerantly."""


class _Text(NamedTuple):
    """A text or a profile, as Pillow takes it apart."""

    keyword: bytes
    """Empty for a profile."""
    is_packed: bool
    method: int
    """Number of the compression; 0 is the only one that there is."""
    body: bytes


def matters(chunk: Chunk, data: Buffer) -> bool:
    """Return whether an ancillary chunk may change the pixels, so that a wrong checksum of it is damage."""
    return chunk.kind in OF_PIXELS or chunk.keyword(data) in CARRIERS


def unreadable(data: Buffer, chunks: Sequence[Chunk], colour_type: int) -> Iterator[Span]:
    """Yield the places of chunks without which Pillow reads the file, and reads the same pixels. Neighbours are one place.

    Raises:
        ImageFault: the texts that may carry an orientation are too large to look for it.
    """
    place: Span | None = None
    for chunk in _left_out(data, chunks, colour_type):
        if place is not None and place[1] != chunk.start:
            yield place
            place = None
        place = (chunk.start if place is None else place[0], chunk.end)
    if place is not None:
        yield place


def _left_out(data: Buffer, chunks: Sequence[Chunk], colour_type: int) -> Iterator[Chunk]:
    metadata = _Metadata(data, colour_type, is_cluttered=len(chunks) > USUAL_CHUNKS)
    is_behind_pixels, has_stopped = False, False
    for chunk in chunks:
        is_behind_pixels = is_behind_pixels or chunk.kind == b"IDAT"
        if chunk.is_critical:
            continue
        verdict = "left out" if has_stopped or (is_behind_pixels and chunk.kind in ANIMATION) else metadata.verdict(chunk)
        has_stopped = has_stopped or (is_behind_pixels and verdict == "stops")
        if verdict != "kept":
            yield chunk


class _Metadata:
    """The metadata of a file, judged chunk by chunk."""

    def __init__(self, data: Buffer, colour_type: int, *, is_cluttered: bool) -> None:
        self._data = data
        self._shortest = {**SHORTEST, b"tRNS": SHORTEST_TRANSPARENCY.get(colour_type, 0)}
        self._is_cluttered = is_cluttered
        self._bytes = 0
        """Size of all texts and profiles so far, inflated."""

    def verdict(self, chunk: Chunk) -> Verdict:
        """Return Pillow's treatment of an ancillary chunk.

        Raises:
            ImageFault: the texts that may carry an orientation are too large to look for it.
        """
        if not chunk.is_whole or (self._is_cluttered and not matters(chunk, self._data)):
            return "left out"
        if chunk.length < self._shortest.get(chunk.kind, 0):
            return "stops"
        if chunk.kind == b"eXIf":
            return "kept" if _is_exif(chunk.content(self._data)) else "left out"
        text = _text_of(chunk.kind, chunk.content(self._data)) if chunk.kind in (b"iCCP", *TEXTS) else None
        return "kept" if text is None else self._verdict_of_text(chunk.kind, text)

    def _verdict_of_text(self, kind: bytes, text: _Text) -> Verdict:
        may_carry = text.keyword in CARRIERS
        if text.method != 0 or text.keyword in MISTAKEN or (self._bytes > LARGEST_TEXTS and not may_carry):
            return "left out"
        if self._bytes > LARGEST_TEXTS:
            raise ImageFault(f"has more than {LARGEST_TEXTS:,} bytes of texts in its metadata; save it without metadata")
        body = _inflated(text.body) if text.is_packed else text.body
        self._bytes += LARGEST_TEXT if body is None else len(body)
        if body is None:
            return "stops"
        return "left out" if may_carry and not _is_carrier(kind, text.keyword, body) else "kept"


def _text_of(kind: bytes, content: bytes) -> _Text | None:
    """Return the parts of a text or profile; None if it is one that Pillow passes over."""
    keyword, _, rest = content.partition(b"\0")
    match kind:
        case b"tEXt":
            return _Text(keyword, False, 0, rest)
        case b"zTXt":
            return _Text(keyword, True, rest[0] if rest else 0, rest[1:])
        case b"iCCP":
            return _Text(b"", True, rest[0] if rest else NO_METHOD, rest[1:])
    parts = rest[2:].split(b"\0", 2)  # language, translated keyword, text
    if len(parts) < 3 or (rest[0] and rest[1]):
        return None
    return _Text(keyword, bool(rest[0]), 0, parts[2])


def _inflated(packed: bytes) -> bytes | None:
    """Return the text, nothing if the stream is damaged, and None if Pillow finds it too large."""
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(packed, LARGEST_TEXT)
    except zlib.error:
        return b""
    return None if inflater.unconsumed_tail else text


def _is_carrier(kind: bytes, keyword: bytes, text: bytes) -> bool:
    """Return whether Pillow can look for an orientation in the text."""
    if keyword == EXIF:
        return kind == b"tEXt" and _is_exif(text)
    return keyword == XMP or _is_exif_in_hex(text)


def _is_exif_in_hex(text: bytes) -> bool:
    """Return whether a text is EXIF data as ImageMagick writes it: three lines before hexadecimal digits."""
    try:
        return _is_exif(bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("latin-1")))
    except ValueError:
        return False


def _is_exif(content: bytes) -> bool:
    bare = content[label.end() :] if (label := EXIF_LABEL.match(content)) else content
    return not bare or (len(bare) >= SHORTEST_EXIF and bare.startswith(TIFF_BEGINNINGS))
