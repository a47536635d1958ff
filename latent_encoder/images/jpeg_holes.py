"""Holes of zeros in the coded pixels of a JPEG, as a transfer leaves them in a file that was given its size beforehand.

libjpeg decodes zeros as pixels. If they make about as many blocks as the lost bytes did, no warning follows. The bits of a
Huffman code tell more: the code of zeros is the first one of its table. If that code stands for a coefficient that is not 0, a
long run of zeros means blocks in which each coefficient has the same value, and no picture has those.
"""

from __future__ import annotations

from itertools import pairwise

from latent_encoder.images.jpeg_markers import DHT, FRAMES, SOS, segments

HOLE = bytes(256)
"""More bits (2048) than the largest unit of a scan takes: 10 blocks of 63 codes of 3 bits. A whole block is zeros."""

LEAST_COEFFICIENTS = 16
"""Coefficients of a scan. In a progressive scan of few, a smooth gradient has the same ones in each block."""

HUFFMAN_FRAMES = {0xC0, 0xC1, 0xC2}
AC = 1
"""Class of the tables for coefficients other than the mean of a block."""

Tables = dict[tuple[int, int], int]
"""The value of the first code, by class and number of the table."""


def has_hole(data: bytes | bytearray) -> bool:
    """Return whether the coded pixels have a run of zeros that no encoder writes. The file has an end marker."""
    tables: Tables = {}
    is_huffman = False
    for segment, following in pairwise(segments(data)):
        content = data[segment.start : segment.end] if segment.marker in (DHT, SOS) else b""
        if segment.marker in FRAMES:
            is_huffman = segment.marker in HUFFMAN_FRAMES
        elif segment.marker == DHT:
            tables.update(_first_values(content))
        elif segment.marker == SOS and is_huffman and _zeros_are_values(content, tables):
            hole = data.find(HOLE, segment.end, following.start)
            if hole >= 0:
                return True
    return False


def _first_values(content: bytes | bytearray) -> Tables:
    found, place = {}, 0
    while place + 17 < len(content):
        size = sum(content[place + 1 : place + 17])
        if size:
            found[content[place] >> 4, content[place] & 15] = content[place + 17]
        place += 17 + size
    return found


def _zeros_are_values(scan: bytes | bytearray, tables: Tables) -> bool:
    """Return whether zeros in this scan stand for coefficients that are not 0, in one of its components."""
    count = scan[0]
    first, last, approximation = scan[1 + 2 * count : 4 + 2 * count]
    if last - first + 1 < LEAST_COEFFICIENTS or approximation >> 4:  # a refinement has bits of coefficients without a code
        return False
    values = (tables.get((AC, selector & 15), 0) for selector in scan[2 : 2 + 2 * count : 2])
    return any(value & 15 for value in values)  # the lower half is the size of a coefficient, 0 for runs of zeros
