"""Damage to JPEG files that knows their segments: markers, lengths, frames, scans, EXIF and additional images."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from random import Random

from fuzz import bytewise

SOI, EOI, SOS, RST0 = 0xD8, 0xD9, 0xDA, 0xD0
START_OF_FRAME = {0xC0, 0xC1, 0xC2}
MARKERS = (*range(0xC0, 0xFF), 0x01, 0x02, 0x00, 0xFF)
SIDES = (0, 1, 7, 8, 65, 2000, 65_500, 65_535)

Segment = tuple[int, bytes]


def parse(data: bytes) -> tuple[list[Segment], bytes]:
    """Return the segments before the first scan, and the rest, which begins with that scan's header."""
    segments, place = [], 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != SOS:
        (length,) = struct.unpack_from(">H", data, place + 2)
        segments.append((data[place + 1], data[place + 4 : place + 2 + length]))
        place += 2 + length
    return segments, data[place:]


def build(segments: list[Segment], rest: bytes) -> bytes:
    return b"\xff\xd8" + b"".join(map(_segment, segments)) + rest


def _segment(segment: Segment) -> bytes:
    marker, content = segment
    content = content[: 0xFFFF - 2]
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


def frame_field(data: bytes, rng: Random) -> bytes:
    """Change precision, size, number of components or their sampling in the frame header."""
    segments, rest = parse(data)
    for place, (marker, content) in enumerate(segments):
        if marker in START_OF_FRAME:
            frame = bytearray(content)
            if rng.random() < 0.5:
                struct.pack_into(">H", frame, rng.choice((1, 3)), rng.choice(SIDES))
            else:
                frame[rng.choice((0, 5, *range(6, len(frame))))] = rng.choice((0, 1, 2, 3, 4, 8, 12, 0x11, 0x22, 0x44, 255))
            segments[place] = (rng.choice((marker, marker, 0xC2, 0xC9)), bytes(frame))
    return build(segments, rest)


def segment_content(data: bytes, rng: Random) -> bytes:
    """Damage the content of a segment."""
    segments, rest = parse(data)
    place = rng.randrange(len(segments))
    marker, content = segments[place]
    segments[place] = (marker, bytewise.damaged(content, rng.choice(bytewise.MUTATIONS), rng, data))
    return build(segments, rest)


def segment_length(data: bytes, rng: Random) -> bytes:
    """Make a segment state a wrong length."""
    segments, rest = parse(data)
    place = rng.randrange(len(segments))
    whole = bytearray(_segment(segments[place]))
    struct.pack_into(">H", whole, 2, rng.choice((0, 1, 2, 3, 0x7FFF, 0xFFFF)))
    return build(segments[:place], bytes(whole) + build(segments[place + 1 :], rest)[2:])


def segment_order(data: bytes, rng: Random) -> bytes:
    """Leave out, double or move segments, or give them another marker."""
    segments, rest = parse(data)
    for _ in range(rng.choice((1, 3))):
        segment = rng.choice(segments)
        if rng.random() < 0.5 and len(segments) > 1:
            segments.remove(segment)
        if rng.random() < 0.7:
            marker = segment[0] if rng.random() < 0.7 else rng.choice(MARKERS)
            segments.insert(rng.randrange(len(segments) + 1), (marker, segment[1]))
    return build(segments, rest)


def scan_damage(data: bytes, rng: Random) -> bytes:
    """Damage the header of a scan and its coded pixels, also with stray markers."""
    segments, rest = parse(data)
    buffer = bytearray(bytewise.damaged(rest, rng.choice(bytewise.MUTATIONS), rng, rest))
    for _ in range(rng.choice((0, 1, 20))):
        place = rng.randrange(len(buffer) + 1)
        buffer[place:place] = bytes((0xFF, rng.choice(MARKERS)))
    return build(segments, bytes(buffer))


def many_scans(data: bytes, rng: Random) -> bytes:
    """Repeat a scan many times, in an image that may be large: a small file that takes much computing."""
    segments, rest = parse(data)
    places = [match.start() for match in re.finditer(rb"\xff\xda", rest)]
    scan = rest[places[-1] : -2]
    if rng.random() < 0.5:
        return build(segments, rest[: places[-1]] + scan * rng.choice((2, 400, 3000)) + rest[-2:])
    return build(_enlarged(segments, 2000, 2000), rest[: places[-1]] + scan[:12] * rng.choice((400, 3000)) + rest[-2:])


def flat(width: int, height: int, scans: int, *, restart: int = 0, between: bytes = b"") -> bytes:
    """Return a grey progressive JPEG of one colour: a scan of the means, and further ones for one coefficient each.

    A coefficient may have a scan only once, so more than 64 scans are damage. `restart` is the restart interval in blocks. The
    bytes `between` stand before each further scan.
    """
    coded = _zero_bits(-(-width // 8) * -(-height // 8), restart)
    bands = [(0, 0), *((1 + number % 63, 1 + number % 63) for number in range(scans - 1))]
    parts = [_segment((SOS, bytes((1, 1, 0, first, last, 0)))) + coded for first, last in bands]
    return build(_flat_header(0xC2, width, height, ((1, 1),), restart), between.join(parts) + b"\xff\xd9")


def flat_colours(width: int, height: int, sampling: Sequence[tuple[int, int]]) -> bytes:
    """Return a baseline JPEG of one colour; `sampling` has the horizontal and vertical factor of each component."""
    across, down = (8 * max(factors) for factors in zip(*sampling, strict=True))
    blocks = -(-width // across) * -(-height // down) * sum(h * v for h, v in sampling)
    ids = b"".join(bytes((number, 0)) for number in range(1, len(sampling) + 1))
    scan = _segment((SOS, bytes((len(sampling),)) + ids + b"\0\x3f\0")) + _zero_bits(2 * blocks, 0)
    return build(_flat_header(0xC0, width, height, sampling, 0), scan + b"\xff\xd9")


def _flat_header(frame: int, width: int, height: int, sampling: Sequence[tuple[int, int]], restart: int) -> list[Segment]:
    table = b"\x01" + bytes(15) + b"\0"  # the single code, 0, stands for the value 0: no difference, or the end of a block
    components = b"".join(bytes((number, h << 4 | v, 0)) for number, (h, v) in enumerate(sampling, start=1))
    return [
        (0xDB, b"\0" + b"\x10" * 64),
        (frame, struct.pack(">BHHB", 8, height, width, len(sampling)) + components),
        (0xC4, b"\0" + table + b"\x10" + table),
        *([(0xDD, struct.pack(">H", restart))] if restart else []),
    ]


def _zero_bits(count: int, restart: int) -> bytes:
    """Return coded pixels of `count` zero bits, with a restart marker after each `restart` of them if that is not 0."""
    parts = [min(restart, count - done) for done in range(0, count, restart)] if restart else [count]
    coded = b"".join(_padded(part) + bytes((0xFF, RST0 + number % 8)) for number, part in enumerate(parts))
    return coded[:-2]


def _padded(zeros: int) -> bytes:
    """Return that number of zero bits, filled up to whole bytes with ones."""
    return ((1 << -zeros % 8) - 1).to_bytes((zeros + 7) // 8)


def _enlarged(segments: list[Segment], width: int, height: int) -> list[Segment]:
    """Return the segments with another size in the frame header; decoders fill the missing pixels with grey."""
    size = struct.pack(">HH", height, width)
    return [
        (marker, content[:1] + size + content[5:] if marker in START_OF_FRAME else content) for marker, content in segments
    ]


def exif(data: bytes, rng: Random) -> bytes:
    """Add EXIF whose directories are circular or out of range, with entries of any type, count and value."""
    order, count = rng.choice("<>"), rng.choice((0, 1, 3, 40))
    entries = b"".join(
        struct.pack(
            f"{order}HHII",
            rng.choice((0x0112, 0x8769, 0x8825, 0xA005, 0x0201, 0x0202, 0x011A, 0x927C, rng.randrange(65536))),
            rng.choice((*range(14), 255)),
            rng.choice((0, 1, 2, 0xFFFF, 0xFFFFFFFF)),
            rng.choice((0, 1, 6, 8, 99, 0x7FFFFFFF, 0xFFFFFFFF)),
        )
        for _ in range(count)
    )
    tiff = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", rng.choice((8, 8, 8, 0, 0xFFFFFFFF)))
    tiff += (
        struct.pack(f"{order}H", rng.choice((count, count, 65535))) + entries + struct.pack(f"{order}I", rng.choice((0, 8)))
    )
    segments, rest = parse(data)
    return build([(0xE1, b"Exif\0\0" + tiff), *segments], rest)


def further_segment(data: bytes, rng: Random) -> bytes:
    """Add a segment that decoders interpret: Adobe's, a colour profile, a restart interval, a comment."""
    noise = rng.randbytes(rng.choice((0, 1, 12, 200)))
    added = rng.choice(
        (
            (0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([rng.randrange(256)])),
            (0xE2, b"ICC_PROFILE\0" + bytes((rng.randrange(256), rng.randrange(256))) + noise),
            (0xE2, b"MPF\0" + rng.choice((b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"")) + noise),
            (0xED, b"Photoshop 3.0\x008BIM" + noise),
            (0xE0, b"JFIF\0" + noise),
            (0xDD, struct.pack(">H", rng.choice((0, 1, 65535)))),
            (0xFE, noise),
            (0xDC, struct.pack(">H", rng.choice((0, 65535)))),
        )
    )
    segments, rest = parse(data)
    segments.insert(rng.randrange(len(segments) + 1), added)
    return build(segments, rest)


def many_segments(data: bytes, rng: Random) -> bytes:
    """Add hundreds of segments, or megabytes of colour profile."""
    segments, rest = parse(data)
    added = rng.choice(((0xFE, b"x"), (0xE2, b"ICC_PROFILE\0\1\1" + bytes(60_000)), (0xE1, b"Exif\0\0II*\0")))
    return build(segments[:1] + [added] * rng.choice((20, 255)) + segments[1:], rest)


def hidden_scans(data: bytes, rng: Random) -> bytes:
    """Return tiny scans behind a marker that has no length inside a scan, in an image that may be large."""
    del data
    side = rng.choice((8, 64, 500, 2000))
    hiding = b"\xff%c%c%c" % (rng.choice((0x01, 0x02, 0xBF)), rng.choice((0, 0xFF)), rng.choice((2, 0xFF)))
    scan = _segment((SOS, bytes((1, 1, 0, 1, 63, 0))))
    whole = flat(side, side, 1, restart=rng.choice((0, 1, 7)))
    return whole[:-2] + hiding + scan * rng.choice((1, 90, 5000)) + whole[-2:]


def repeated_segments(data: bytes, rng: Random) -> bytes:
    """Repeat a tiny segment until the header has megabytes."""
    segments, rest = parse(data)
    added = rng.choice(
        ((0xE5, b""), (0xFE, b""), (0xE1, b"Exif\0\0"), (0xED, b"Photoshop 3.0\0" + b"8BIM\0\0\0\0\0\0\0\0" * 5000))
    )
    times = rng.choice((99, 99_000, 1_000_000)) if len(added[1]) < 10 else rng.choice((1, 15, 100))
    return build(segments[:1], _segment(added) * times + build(segments[1:], rest)[2:])


def transfer(data: bytes, rng: Random) -> bytes:
    """Damage the coded pixels as a transfer does: a hole of zeros, a block lost, doubled or moved, an end that is missing."""
    _, rest = parse(data)
    start, size = len(data) - len(rest) + 20, rng.choice((64, 512, 4096))
    place = rng.randrange(start, max(start + 1, len(data) - 2))
    block, behind = data[place : place + size], data[place + size :]
    return rng.choice(
        (
            data[:place] + bytes(len(block)) + behind,
            data[:place] + behind,
            data[:place] + block + block + behind,
            data[:place] + behind[:size] + block + behind[size:],
            data[:place] + b"\xff\xd9",
            data.replace(b"\n", b"\r\n"),
            data.translate(None, bytes(range(0x80, 0xFF))),
        )
    )


def further_images(data: bytes, rng: Random) -> bytes:
    """Make a multi-picture file of many images, whose index may be wrong."""
    count = rng.choice((2, 3, 40, 400))
    segments, rest = parse(data)
    length = 4 + 8 + 2 + 3 * 12 + 4 + 16 * count
    first = len(build([*segments, (0xE2, bytes(length))], rest))
    single = build(segments, rest)
    label_end = len(build(segments, b"")) + 4 + 4
    entries = b"".join(
        struct.pack("<IIIHH", 0x030000, len(single), 0 if n == 0 else first + (n - 1) * len(single) - label_end, 0, 0)
        for n in range(count)
    )
    said = count if rng.random() < 0.7 else rng.choice((0, 1, 0x7FFFFFFF))
    index = struct.pack("<4sIH", b"II*\0", 8, 3)
    index += struct.pack("<HHI4s", 0xB000, 7, 4, b"0100") + struct.pack("<HHII", 0xB001, 4, 1, said)
    index += struct.pack("<HHII", 0xB002, 7, 16 * count, 50) + struct.pack("<I", 0) + entries
    return build([*segments, (0xE2, b"MPF\0" + index)], rest) + single * (count - 1)


MUTATIONS: tuple[Callable[[bytes, Random], bytes], ...] = (
    *(frame_field, segment_content, segment_length, segment_order, scan_damage, exif, further_segment, transfer) * 6,
    *(many_scans, hidden_scans, many_segments, repeated_segments, further_images),  # these are slow, and have few variants
)
