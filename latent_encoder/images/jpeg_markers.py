"""The markers of a JPEG, up to the end of its first image, found as libjpeg finds them.

Sources: ITU-T T.81, annex B; libjpeg-turbo's jdmarker.c for bytes that the standard does not allow; CIPA DC-007 for further
images. libjpeg takes a length after most markers, but not inside the coded pixels of a scan: there it looks for the next
marker from C0 on, and skips restart markers and all below C0. A walk that reads a length there would lose the scans behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

APP0, APP1, APP2, APP13, APP15, COM = 0xE0, 0xE1, 0xE2, 0xED, 0xEF, 0xFE
SOI, EOI, SOS, DNL, DHT, JPG, DAC, TEM = 0xD8, 0xD9, 0xDA, 0xDC, 0xC4, 0xC8, 0xCC, 0x01
FRAMES = frozenset(range(0xC0, 0xD0)) - {DHT, JPG, DAC}
RESTARTS = range(0xD0, 0xD8)

IN_HEADER = re.compile(rb"\xff([\x01-\xfe])", re.DOTALL)  # any byte before it is passed over
IN_SCAN = re.compile(rb"\xff([\xc0-\xcf\xd8-\xfe])", re.DOTALL)  # no stuffed zero, no restart, nothing below C0

INDEX_LABEL = b"MPF\0"  # begins the APP2 segment that has the places of further images (MPF: multi-picture format)
NO_LABEL = b"mpf\0"  # no decoder knows it

FIRST_BYTES = b"\xff\xd8\xff"  # of each image in the file
MOST_PADDING = 64 * 1024  # bytes of zeros between two images; phones align to 4096 or less


@dataclass(frozen=True)
class Segment:
    """A marker with the range of its content. Without a length (SOI, EOI, restarts, TEM) the range is empty."""

    marker: int
    start: int
    """Offset of the content, behind the length."""
    end: int
    """Offset behind the content by its length, which may lie behind the end of the file."""


def scans(data: bytes) -> int:
    """Return the number of scans. For each one a decoder goes over all pixels, even if the scan has a few bytes only."""
    return sum(segment.marker == SOS for segment in segments(data))


def without_further_images(data: bytes) -> bytes:
    """Return the file with a changed label on the index of further images, so that decoders do not find the index."""
    hidden = bytearray(data)
    for segment in segments(data):
        if segment.marker == APP2 and data.startswith(INDEX_LABEL, segment.start):
            hidden[segment.start : segment.start + len(INDEX_LABEL)] = NO_LABEL
    return bytes(hidden)


def has_further_images(data: bytes) -> bool:
    """Return whether another image follows the first, with an index or without: phones append gain maps without one."""
    end = max((segment.end for segment in segments(data) if segment.marker == EOI), default=len(data))
    return data[end : end + MOST_PADDING].lstrip(b"\0").startswith(FIRST_BYTES)


def segments(data: bytes | bytearray) -> Iterator[Segment]:
    """Yield each marker of the first image. Markers inside the coded pixels of a scan are left out if libjpeg skips them."""
    offset, pattern = 0, IN_HEADER
    while found := pattern.search(data, offset):
        marker, offset = found[1][0], found.end()
        if marker < 0xC0 or marker in RESTARTS or marker in (SOI, EOI):
            yield Segment(marker, offset, offset)
            if marker == EOI:
                return
            continue
        start = offset + 2
        offset += max(int.from_bytes(data[offset:start]), 2)  # libjpeg skips nothing behind a length of 0 or 1
        yield Segment(marker, start, offset)
        pattern = IN_SCAN if marker == SOS else IN_HEADER
