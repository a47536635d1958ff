"""The markers of a JPEG, up to the end of its first image. Sources: ITU-T T.81, annex B; CIPA DC-007 for further images."""

from __future__ import annotations

import re
from collections.abc import Iterator

APP2, SOI, EOI, SOS, TEM = 0xE2, 0xD8, 0xD9, 0xDA, 0x01

MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])", re.DOTALL)  # no stuffed zero, no restart, no fill byte

INDEX_LABEL = b"MPF\0"  # begins the APP2 segment that has the places of further images (MPF: multi-picture format)
NO_LABEL = b"mpf\0"  # no decoder knows it

FIRST_BYTES = b"\xff\xd8\xff"  # of each image in the file
MOST_PADDING = 64 * 1024  # bytes of zeros between two images; phones align to 4096 or less


def scans(data: bytes) -> int:
    """Return the number of scans. For each one a decoder goes over all pixels, even if the scan has a few bytes only."""
    return sum(marker == SOS for marker, _ in _markers(data))


def without_further_images(data: bytes) -> bytes:
    """Return the file with a changed label on the index of further images, so that decoders do not find the index."""
    hidden = bytearray(data)
    for marker, content in _markers(data):
        if marker == APP2 and data.startswith(INDEX_LABEL, content):
            hidden[content : content + len(INDEX_LABEL)] = NO_LABEL
    return bytes(hidden)


def has_further_images(data: bytes) -> bool:
    """Return whether another image follows the first, with an index or without: phones append gain maps without one."""
    end = max((content for marker, content in _markers(data) if marker == EOI), default=len(data))
    return data[end : end + MOST_PADDING].lstrip(b"\0").startswith(FIRST_BYTES)


def _markers(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield each marker of the first image, with the offset of the content of its segment."""
    offset = 0
    while found := MARKER.search(data, offset):
        marker, offset = found[1][0], found.end()
        if marker == EOI:
            yield marker, offset
            return
        yield marker, offset + 2
        if marker not in (SOI, TEM):
            offset += int.from_bytes(data[offset : offset + 2])
