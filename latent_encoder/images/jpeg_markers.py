"""The markers of a JPEG, up to the end of its first picture. ITU-T T.81, annex B; CIPA DC-007 for further pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator

APP2, SOI, EOI, SOS, TEM = 0xE2, 0xD8, 0xD9, 0xDA, 0x01

MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])", re.DOTALL)  # no stuffed zero, no restart, no fill byte

INDEX_LABEL = b"MPF\0"  # begins the APP2 segment that says where further pictures are
NO_LABEL = b"mpf\0"

PICTURE = b"\xff\xd8\xff"  # how a picture begins
MOST_PADDING = 64 * 1024  # bytes of zeros between two pictures; phones align to 4096 or less


def scans(data: bytes) -> int:
    """How many scans the picture has: how often its decoder goes over all of its pixels, however little there is to read."""
    return sum(marker == SOS for marker, _ in _markers(data))


def without_further_pictures(data: bytes) -> bytes:
    """The same file, but for the index of further pictures, which no decoder recognises any more."""
    hidden = bytearray(data)
    for marker, content in _markers(data):
        if marker == APP2 and data.startswith(INDEX_LABEL, content):
            hidden[content : content + len(INDEX_LABEL)] = NO_LABEL
    return bytes(hidden)


def has_further_pictures(data: bytes) -> bool:
    """Return whether another picture follows the first one, whether or not an index says so: phones append gain maps."""
    end = max((content for marker, content in _markers(data) if marker == EOI), default=len(data))
    return data[end : end + MOST_PADDING].lstrip(b"\0").startswith(PICTURE)


def _markers(data: bytes) -> Iterator[tuple[int, int]]:
    """Each marker of the first picture, and where the content of its segment begins."""
    place = 0
    while found := MARKER.search(data, place):
        marker, place = found[1][0], found.end()
        if marker == EOI:
            yield marker, place
            return
        yield marker, place + 2
        if marker not in (SOI, TEM):
            place += int.from_bytes(data[place : place + 2])
