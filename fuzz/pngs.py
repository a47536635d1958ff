"""Damage to PNG files with valid checksums, so that it reaches the code behind the check."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from functools import cache
from random import Random

from fuzz import bytewise

SIGNATURE = b"\x89PNG\r\n\x1a\n"
SIDES = (0, 1, 2, 7, 65, 2000, 2001, 4_000_000, 65_535, 0x7FFFFFFF, 0xFFFFFFFF)
ANCILLARY = b"PLTE tRNS gAMA cHRM sRGB iCCP sBIT bKGD hIST pHYs sPLT eXIf tEXt zTXt iTXt tIME acTL fcTL fdAT IEND IHDR".split()
KEYWORDS = (
    b"Comment",
    b"Raw profile type exif",
    b"XML:com.adobe.xmp",
    b"exif",
    b"xmp",
    b"transparency",
    b"interlace",
    b"bbox",
)
BOMB_BYTES = 200_000_000

Chunk = tuple[bytes, bytes]


def parse(data: bytes) -> list[Chunk]:
    """Return the whole chunks of a PNG."""
    chunks, place = [], len(SIGNATURE)
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    return chunks


def build(chunks: list[Chunk]) -> bytes:
    return SIGNATURE + b"".join(map(_chunk, chunks))


def _chunk(chunk: Chunk) -> bytes:
    kind, data = chunk
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@cache
def _bomb() -> bytes:
    return zlib.compress(bytes(BOMB_BYTES), 9)


def header_field(data: bytes, rng: Random) -> bytes:
    """Change one or two fields of IHDR."""
    chunks = parse(data)
    header = bytearray(chunks[0][1].ljust(13, b"\0"))
    for _ in range(rng.choice((1, 2))):
        if rng.random() < 0.5:
            struct.pack_into(">I", header, rng.choice((0, 4)), rng.choice(SIDES))
        else:
            header[rng.randrange(8, 13)] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
    return build([(b"IHDR", bytes(header)), *chunks[1:]])


def chunk_content(data: bytes, rng: Random) -> bytes:
    """Damage the content of a chunk."""
    chunks = parse(data)
    place = rng.randrange(len(chunks))
    kind, content = chunks[place]
    chunks[place] = (kind, bytewise.damaged(content, rng.choice(bytewise.MUTATIONS), rng, data))
    return build(chunks)


def chunk_length(data: bytes, rng: Random) -> bytes:
    """Make a chunk state a wrong length."""
    chunks = parse(data)
    place = rng.randrange(len(chunks))
    whole = bytearray(_chunk(chunks[place]))
    struct.pack_into(">I", whole, 0, rng.choice((*bytewise.INTERESTING, len(chunks[place][1]) - 1)) & 0xFFFFFFFF)
    return build(chunks[:place]) + bytes(whole) + build(chunks[place + 1 :])[len(SIGNATURE) :]


def chunk_order(data: bytes, rng: Random) -> bytes:
    """Leave out, double or move chunks."""
    chunks = parse(data)
    for _ in range(rng.choice((1, 3))):
        chunk = rng.choice(chunks)
        if rng.random() < 0.5 and len(chunks) > 1:
            chunks.remove(chunk)
        if rng.random() < 0.7:
            chunks.insert(rng.randrange(len(chunks) + 1), chunk)
    return build(chunks)


def chunk_kind(data: bytes, rng: Random) -> bytes:
    """Give a chunk the name of another kind."""
    chunks = parse(data)
    place = rng.randrange(len(chunks))
    chunks[place] = (rng.choice((*ANCILLARY, b"IDAT", rng.randbytes(4))), chunks[place][1])
    return build(chunks)


def further_chunk(data: bytes, rng: Random) -> bytes:
    """Add a chunk with senseless content."""
    chunks = parse(data)
    content = rng.choice((b"", rng.randbytes(1), rng.randbytes(rng.choice((4, 8, 26, 256))), b"\0" * 32, b"\xff" * 32))
    chunks.insert(rng.choice((1, len(chunks) - 1, rng.randrange(len(chunks) + 1))), (rng.choice(ANCILLARY), content))
    return build(chunks)


def animation(data: bytes, rng: Random) -> bytes:
    """Add the control chunks of an animation, which may not fit the image or each other."""
    chunks = parse(data)
    control = struct.pack(">II", rng.choice((0, 1, 2, 0x7FFFFFFF, 0xFFFFFFFF)), rng.choice((0, 1)))
    width, height, left, upper = (rng.choice((0, 1, 96, 2000, 0xFFFFFFFF)) for _ in range(4))
    frame = struct.pack(">IIIIIHHBB", rng.choice((0, 1, 9)), width, height, left, upper, 1, 0, rng.randrange(4), 0)
    added = [(b"acTL", control)] + [(b"fcTL", frame)] * rng.choice((0, 1, 2))
    return build([chunks[0], *added, *chunks[1:]])


def scanlines(data: bytes, rng: Random) -> bytes:
    """Damage the scanlines and compress them again: unknown filters, too many rows or too few."""
    chunks = parse(data)
    packed = b"".join(content for kind, content in chunks if kind == b"IDAT")
    try:
        rows = zlib.decompress(packed)
    except zlib.error:
        return chunk_content(data, rng)
    rows = bytewise.damaged(rows, rng.choice(bytewise.MUTATIONS), rng, rows)
    idat = (b"IDAT", zlib.compress(rows, rng.choice((0, 1, 9))))
    return build([chunk for chunk in chunks if chunk[0] not in (b"IDAT", b"IEND")] + [idat, (b"IEND", b"")])


def bomb(data: bytes, rng: Random) -> bytes:
    """Add kilobytes that unpack to hundreds of megabytes, as pixels, text or colour profile."""
    chunks = parse(data)
    added = rng.choice(
        (
            (b"IDAT", _bomb()),
            (b"zTXt", b"Comment\0\0" + _bomb()),
            (b"iTXt", b"Comment\0\1\0\0\0" + _bomb()),
            (b"iCCP", b"profile\0\0" + _bomb()),
        )
    )
    return build([chunks[0], *[added] * rng.choice((1, 3)), *chunks[1:]])


def many_chunks(data: bytes, rng: Random) -> bytes:
    """Add thousands of chunks."""
    chunks = parse(data)
    added = rng.choice(((b"tEXt", b"a\0" + b"b" * 100), (b"IDAT", b""), (b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000)))))
    return build([chunks[0], *[added] * rng.choice((1000, 20_000)), *chunks[1:]])


def large_image(_: bytes, rng: Random) -> bytes:
    """Return a whole image near the limit of pixels, of a few kilobytes, in any mode."""
    colour, depth = rng.choice(((0, 1), (0, 8), (0, 16), (2, 8), (2, 16), (3, 8), (4, 8), (4, 16), (6, 8), (6, 16)))
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    width, height = rng.choice(((2000, 2000), (1, 4_000_000), (4_000_000, 1), (40_000, 100), (2000, 2001)))
    packer, row = zlib.compressobj(1), bytes([rng.randrange(5)]) + bytes((width * bits + 7) // 8)
    rows = 1 + 10_000_000 // len(row)
    packed = b"".join(packer.compress(row * min(rows, height - done)) for done in range(0, height, rows)) + packer.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))]
    chunks += [(b"PLTE", bytes(range(256)) * 3)] if colour == 3 else []
    chunks += [(b"tRNS", b"\0\0")] if colour in (0, 3) and rng.random() < 0.5 else []
    return build([*chunks, (b"IDAT", packed), (b"IEND", b"")])


def cut_stream(data: bytes, rng: Random) -> bytes:
    """End the compressed pixels early: inside the stream, before its checksum, or as a whole stream with fewer rows."""
    packed, rows = _pixels(data)
    if rng.random() < 0.5 and rows:
        packed = zlib.compress(rows[: rng.randrange(len(rows))])
    else:
        packed = packed[: -rng.choice((1, 2, 4, 5, 6, 100))]
    return _with_pixels(data, [packed])


def split_pixels(data: bytes, rng: Random) -> bytes:
    """Spread the compressed pixels over many chunks, some of them empty, perhaps with another chunk between them."""
    packed, _ = _pixels(data)
    size = rng.choice((1, 2, 7, 100))
    parts = [packed[start : start + size] for start in range(0, len(packed), size)]
    parts.insert(rng.randrange(len(parts) + 1), b"")
    chunks = parse(_with_pixels(data, parts))
    if rng.random() < 0.5:
        chunks.insert(rng.randrange(1, len(chunks)), (rng.choice(ANCILLARY), b""))
    return build(chunks)


def tiny_chunks(data: bytes, rng: Random) -> bytes:
    """Add tens of thousands of chunks without content, or with a text of a few bytes."""
    chunks = parse(data)
    added = rng.choice(((b"prVt", b""), (b"IDAT", b""), (b"tEXt", b"a\0b"), (b"zTXt", b""), (b"fcTL", b""), (b"eXIf", b"")))
    place = rng.choice((1, len(chunks) - 1))
    return build([*chunks[:place], *[added] * rng.choice((900, 20_000, 99_000, 150_000)), *chunks[place:]])


def large_metadata(data: bytes, rng: Random) -> bytes:
    """Add texts and profiles of megabytes, and an orientation, before or behind the pixels."""
    chunks = parse(data)
    packed = zlib.compress(b"<x>" + bytes(rng.choice((1_048_573, 1_048_574, 3_000_000))))
    added = [
        (b"zTXt", rng.choice(KEYWORDS) + b"\0\0" + packed),
        (b"iTXt", rng.choice(KEYWORDS) + b"\0\1\0\0\0" + packed),
        (b"iCCP", b"profile\0\0" + packed),
        (b"eXIf", b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0" + bytes([rng.randrange(10)]) + bytes(7)),
    ]
    for chunk in rng.sample(added, rng.randrange(1, 4)):
        chunks.insert(rng.choice((1, len(chunks) - 1)), chunk)
    return build(chunks)


def odd_text(data: bytes, rng: Random) -> bytes:
    """Add a text whose keyword means something to Pillow, and whose content does not fit it."""
    chunks = parse(data)
    content = rng.choice((b"", b"1", b"\n" * 3 + b"xyz", b"II*\0", rng.randbytes(20)))
    body = rng.choice(((b"tEXt", b"\0"), (b"zTXt", b"\0\0"), (b"iTXt", b"\0\0\0\0\0"), (b"zTXt", b"\0\7")))
    chunks.insert(rng.choice((1, len(chunks) - 1)), (body[0], rng.choice(KEYWORDS) + body[1] + content))
    return build(chunks)


def checksum(data: bytes, rng: Random) -> bytes:
    """Make the checksum of one chunk wrong."""
    chunks = parse(data)
    place = rng.randrange(len(chunks))
    before, chunk = build(chunks[:place]), bytearray(_chunk(chunks[place]))
    chunk[-1] ^= 1
    return before + bytes(chunk) + build(chunks[place + 1 :])[len(SIGNATURE) :]


def as_text(data: bytes, rng: Random) -> bytes:
    """Change the file as a transfer as text does, or put something before it."""
    return rng.choice(
        (
            lambda: data.replace(b"\r\n", b"\n"),
            lambda: data.replace(b"\n", b"\r\n"),
            lambda: bytes(byte & 127 for byte in data),
            lambda: data.decode("latin-1").encode(),
            lambda: data.decode(errors="replace").encode(),
            lambda: b"\xef\xbb\xbf" + data,
            lambda: b"HTTP/1.1 200 OK\r\n\r\n" + data,
            lambda: data[: rng.randrange(40)],
            lambda: data[rng.randrange(40) :],
        )
    )()


def _pixels(data: bytes) -> tuple[bytes, bytes]:
    """Return the compressed pixels and the rows; no rows if they are damaged."""
    packed = b"".join(content for kind, content in parse(data) if kind == b"IDAT")
    try:
        return packed, zlib.decompress(packed)
    except zlib.error:
        return packed, b""


def _with_pixels(data: bytes, parts: list[bytes]) -> bytes:
    """Return the file with these contents of its chunks of pixels."""
    chunks = parse(data)
    place = next((number for number, chunk in enumerate(chunks) if chunk[0] == b"IDAT"), len(chunks))
    others = [chunk for chunk in chunks[place:] if chunk[0] != b"IDAT"]
    return build([*chunks[:place], *((b"IDAT", part) for part in parts), *others])


MUTATIONS: tuple[Callable[[bytes, Random], bytes], ...] = (
    *(header_field, chunk_content, chunk_length, chunk_order, chunk_kind, further_chunk, animation, scanlines) * 8,
    *(cut_stream, split_pixels, odd_text, checksum, as_text) * 4,
    *(bomb, many_chunks, large_image, tiny_chunks, large_metadata),  # these are slow, and have few variants
)
