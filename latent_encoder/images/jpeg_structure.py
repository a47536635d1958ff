"""The structure of a JPEG, checked before any decoder sees the file: its frame, its scans, and how often a header repeats.

Decoders go over all blocks of a scan even if the scan has a few bytes only, and over all segments of a header. So a small file
can take any amount of work. The limits are far above the files of cameras and programs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from latent_encoder.geometry import Size
from latent_encoder.images.faults import ImageDamage, ImageFault
from latent_encoder.images.jpeg_markers import APP1, APP13, EOI, FRAMES, SOS, Segment, segments

MAX_JPEG_SCANS = 100
"""Encoders write about ten."""

MOST_SEGMENTS = 100_000
"""Files have some dozens. Pillow takes 2 microseconds for each, and keeps about 300 bytes."""

MOST_EXIF_SEGMENTS = 64
"""Files have one, seldom two. Pillow joins them one after the other, so its time is the square of their number."""

MOST_PASSES = 20
"""Passes over the blocks of the largest allowed image, with three colours of full size.

Progressive files take 5 (6 over the brightness, 4 over each colour). 20 passes of MAX_IMAGE_PIXELS take 3 s without any data.
"""
LEAST_PIXELS = 65_536
"""A lower MAX_IMAGE_PIXELS does not lower the limit of passes: small images have partly filled blocks."""

SCAN_MARKER_SIZE = 4
"""Bytes of a marker and the length behind it."""

BLOCK = 8
"""Pixels of a block's side."""

EIGHT_BITS, TWELVE_BITS = 8, 12
TWO_COLOURS = 2
BASELINE, EXTENDED, PROGRESSIVE, ARITHMETIC, ARITHMETIC_PROGRESSIVE = 0xC0, 0xC1, 0xC2, 0xC9, 0xCA
DECODED = {BASELINE, EXTENDED, PROGRESSIVE, ARITHMETIC, ARITHMETIC_PROGRESSIVE}
JPEG_LS = 0xF7  # the frame header of another format that shares the markers
LOSSLESS = {0xC3, 0xC7, 0xCB, 0xCF}
COLOURS = (1, 3, 4)
"""Numbers of components that Pillow loads: grey, three colours, and CMYK."""

EXIF, PHOTOSHOP, RESOURCE = b"Exif\0\0", b"Photoshop 3.0\0", b"8BIM"

OTHERWISE = "save it as a usual JPEG"


ADVICE = "fetch or export it again"


def damaged(fault: str) -> ImageDamage:
    """Return the damage of a file that has pixels."""
    return ImageDamage(f"is damaged: {fault}; {ADVICE}")


def unreadable(fault: str) -> ImageFault:
    """Return the damage of a file that no decoder can show."""
    return ImageFault(f"is damaged: {fault}; {ADVICE}")


@dataclass(frozen=True)
class Frame:
    """The frame header: size and components. Each component has an id, and horizontal and vertical sampling factors."""

    size: Size
    components: Mapping[int, tuple[int, int]]

    def blocks(self, ids: list[int]) -> int:
        """Return the blocks that a scan of these components goes over."""
        across = max(h for h, _ in self.components.values())
        down = max(v for _, v in self.components.values())
        if len(ids) == 1 and ids[0] in self.components:
            h, v = self.components[ids[0]]
            width, height = self.size.width * h / across, self.size.height * v / down
            return math.ceil(width / BLOCK) * math.ceil(height / BLOCK)
        units = math.ceil(self.size.width / (BLOCK * across)) * math.ceil(self.size.height / (BLOCK * down))
        return units * sum(h * v for h, v in map(self.components.__getitem__, filter(self.components.__contains__, ids)))


@dataclass
class Structure:
    """The structure of a JPEG as far as it has been walked."""

    max_pixels: int
    frame: Frame | None = None
    header: list[Segment] = field(default_factory=list)
    """The segments before the first scan."""
    pixels_at: int = 0
    """Offset of the marker that begins the first scan, 0 before one."""
    coded_at: int = sys.maxsize
    """Offset of the coded pixels of the first scan."""
    ends_at: int = 0
    """Offset of the marker that ends the image, 0 before it."""
    scans: int = 0
    blocks: int = 0
    exif_segments: int = 0
    repeats: int = 0
    """Segments, and resources in Photoshop's segments."""
    shown: set[int] = field(default_factory=set)
    """Ids of the components whose means (the coefficients DC) a scan has."""

    def add(self, data: bytes | bytearray, segment: Segment) -> None:
        """Take the next segment.

        Raises:
            ImageFault: a limit is exceeded, or the segment does not fit.
        """
        self.repeats += 1
        match segment.marker:
            case marker if marker in FRAMES:
                self._add_frame(marker, data[segment.start : segment.end])
            case marker if marker == JPEG_LS:
                raise ImageFault("is a JPEG-LS image, which ComfyUI cannot load; save it as a PNG or as a usual JPEG")
            case marker if marker == SOS:
                self._add_scan(data[segment.start : segment.end], segment)
            case marker if marker == APP1:
                self.exif_segments += data.startswith(EXIF, segment.start)
            case marker if marker == APP13 and data.startswith(PHOTOSHOP, segment.start):
                self.repeats += data.count(RESOURCE, segment.start, segment.end)
            case marker if marker == EOI:
                self.ends_at = segment.start - 2
        if not self.pixels_at:
            self.header.append(segment)
        self._refuse_repeats()

    def _add_frame(self, marker: int, content: bytes | bytearray) -> None:
        if self.frame is not None:
            raise unreadable("it has two frame headers")
        if marker not in DECODED:
            kind = "lossless" if marker in LOSSLESS else "hierarchical"
            raise ImageFault(f"is a {kind} JPEG, which ComfyUI cannot load; save it as a PNG or as a usual JPEG")
        if len(content) < 6 or len(content) < 6 + 3 * content[5]:
            raise unreadable("its frame header is not whole")
        if content[0] == TWELVE_BITS:
            raise ImageFault(
                f"is a JPEG with {content[0]} bits a sample, which ComfyUI cannot load; save it with 8 bits, or as a PNG"
            )
        if content[5] == TWO_COLOURS:
            raise ImageFault("is a JPEG of 2 colours, which ComfyUI cannot load; save it with 1, 3 or 4 of them")
        parts = [content[place : place + 2] for place in range(6, 6 + 3 * content[5], 3)]
        components = {number: (factors >> 4, factors & 15) for number, factors in parts}
        size = Size(int.from_bytes(content[3:5]), int.from_bytes(content[1:3]))
        is_usual = content[0] == EIGHT_BITS and content[5] in COLOURS and 0 not in size
        if not is_usual or not all(1 <= h <= 4 and 1 <= v <= 4 for h, v in components.values()):
            raise unreadable("its frame header has values that no decoder takes")
        self.frame = Frame(size, components)
        if size.width * size.height > self.max_pixels:
            raise ImageFault(
                f"has more than MAX_IMAGE_PIXELS={self.max_pixels} pixels, {size}; scale it down, or raise the limit"
            )

    def _add_scan(self, content: bytes | bytearray, segment: Segment) -> None:
        if self.frame is None:
            raise unreadable("its pixels begin before its frame header")
        ids = [*content[1 : 1 + 2 * content[0] : 2]] if content else []
        if not ids or len(content) < 4 + 2 * len(ids):
            raise unreadable("the header of a scan is not whole")
        if not self.pixels_at:
            self.pixels_at, self.coded_at = segment.start - SCAN_MARKER_SIZE, segment.end
        self.scans += 1
        self.blocks += self.frame.blocks(ids)
        if content[1 + 2 * len(ids)] == 0:  # the first coefficient
            self.shown.update(ids)

    def _refuse_repeats(self) -> None:
        if self.repeats > MOST_SEGMENTS:
            raise ImageFault(f"has more than {MOST_SEGMENTS} segments; {OTHERWISE}")
        if self.exif_segments > MOST_EXIF_SEGMENTS:
            raise ImageFault(f"has more than {MOST_EXIF_SEGMENTS} segments of EXIF data; {OTHERWISE}")
        if self.scans > MAX_JPEG_SCANS:
            raise ImageFault(f"has more than {MAX_JPEG_SCANS} scans; {OTHERWISE}")
        if self.blocks > MOST_PASSES * 3 * max(self.max_pixels, LEAST_PIXELS) / BLOCK**2:
            raise ImageFault(f"has {self.scans} scans or more of too many pixels; {OTHERWISE}, or raise MAX_IMAGE_PIXELS")

    def refuse_incomplete(self, size: int) -> None:
        """Raise the fault of a file of `size` bytes in which a part is missing."""
        if self.frame is None or (self.ends_at or size) <= self.coded_at:
            raise unreadable("it ends before its pixels")
        if not self.ends_at:
            raise damaged("it ends before its end marker, so a part is missing")
        if self.frame.components.keys() - self.shown:
            raise damaged("one of its colours is missing")


def structure_of(data: bytes | bytearray, max_pixels: int) -> Structure:
    """Return the structure of a JPEG.

    Raises:
        ImageFault: its image has more than `max_pixels` pixels, it is of a kind that ComfyUI cannot load, its structure is
            damaged, or decoding it would take much more work than decoding other files.
    """
    structure = Structure(max_pixels)
    for segment in segments(data):
        structure.add(data, segment)
    return structure
