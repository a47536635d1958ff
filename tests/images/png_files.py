"""PNGs of every form, made by a script: sound ones, and those with one fault."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random

from fuzz.pngs import build, parse
from latent_encoder.images.png import DEPTHS
from latent_encoder.images.png_pixels import CHANNELS, PASSES

Chunks = list[tuple[bytes, bytes]]

END = (b"IEND", b"")
TEXT = (b"tEXt", b"Comment\0text")


@dataclass(frozen=True)
class Form:
    """Size and kind of a PNG's samples."""

    width: int = 33
    height: int = 20
    depth: int = 8
    colour: int = 2
    interlaced: bool = False

    def header(self) -> tuple[bytes, bytes]:
        values = (self.width, self.height, self.depth, self.colour, 0, 0, int(self.interlaced))
        return b"IHDR", struct.pack(">IIBBBBB", *values)

    def palette(self) -> Chunks:
        return [(b"PLTE", (bytes(range(256)) * 3)[: 3 * 2**self.depth])] if self.colour == 3 else []

    def rows(self) -> list[bytes]:
        """Return random rows, each with the number of a filter before it."""
        rng, rows = Random(repr(self)), []  # noqa: S311  # the same again each time
        for left, top, across, down in PASSES if self.interlaced else ((0, 0, 1, 1),):
            columns, lines = -(-(self.width - left) // across), -(-(self.height - top) // down)
            size = (columns * self.depth * CHANNELS[self.colour] + 7) // 8
            rows += [bytes([rng.randrange(5)]) + rng.randbytes(size) for _ in range(lines) if columns > 0]
        return rows

    def file(self, rows: list[bytes] | None = None, *, packed: bytes | None = None) -> bytes:
        stream = zlib.compress(b"".join(self.rows() if rows is None else rows)) if packed is None else packed
        return build([self.header(), *self.palette(), (b"IDAT", stream[:9]), (b"IDAT", stream[9:]), END])


def forms() -> list[Form]:
    """Return every combination of colour type, depth and interlacing, in sizes that leave passes empty and bytes half full."""
    kinds = [(colour, depth) for colour, depths in DEPTHS.items() for depth in depths]
    sizes = ((1, 1), (3, 5), (33, 20))
    return [Form(*size, depth, colour, bool(lace)) for colour, depth in kinds for lace in (0, 1) for size in sizes]


RGB, PALETTE, GREY = Form(), Form(colour=3), Form(colour=0)


def changed(form: Form, change: Callable[[Chunks], None]) -> bytes:
    """Return the file after a change to its chunks; all checksums are right."""
    chunks = parse(form.file())
    change(chunks)
    return build(chunks)


def with_chunk(place: int, kind: bytes, content: bytes = b"", form: Form = RGB) -> bytes:
    return changed(form, lambda chunks: chunks.insert(place, (kind, content)))


def with_header(**values: int) -> bytes:
    """Return a file whose IHDR states other values than its pixels have."""
    names = ("width", "height", "depth", "colour", "compression", "filter", "interlace")
    fields = dict(zip(names, struct.unpack(">IIBBBBB", RGB.header()[1]), strict=True)) | values
    header = struct.pack(">IIBBBBB", *fields.values())
    return build([(b"IHDR", header), *parse(RGB.file())[1:]])


def wrong_checksum(kind: bytes, data: bytes) -> bytes:
    """Return the file with a flipped bit in the checksum of its first chunk of that kind."""
    place = data.index(kind)
    end = place + 4 + int.from_bytes(data[place - 4 : place])
    return data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :]


def _packed() -> bytes:
    return zlib.compress(b"".join(RGB.rows()))


def _between_pixels() -> bytes:
    chunks = parse(RGB.file())
    return build([*chunks[:2], TEXT, *chunks[2:]])


def _unknown_filter() -> bytes:
    *rows, last = RGB.rows()
    return RGB.file([*rows, b"\x05" + last[1:]])


def _flipped(place: int) -> bytes:
    data = bytearray(_packed())
    data[place] ^= 1
    return RGB.file(packed=bytes(data))


FRAME = struct.pack(">IIIIIHHBB", 0, RGB.width, RGB.height, 0, 0, 1, 10, 0, 0)

DAMAGED: Mapping[str, tuple[str, bytes]] = {
    "stream ends before the last row": ("its pixels end after 1900 of 2000 bytes", RGB.file(RGB.rows()[:-1])),
    "stream ends inside a row": ("its pixels end after 1950 of 2000 bytes", RGB.file([*RGB.rows()[:-1], bytes(50)])),
    "no stream": ("its pixels end after 0 of 2000 bytes", RGB.file(packed=b"")),
    "stream is cut": ("its pixels end after", RGB.file(packed=_packed()[:900])),
    "stream without checksum": ("the checksum behind its pixels is missing", RGB.file(packed=_packed()[:-4])),
    "stream with a wrong checksum": ("its compressed pixels are wrong", _flipped(-1)),
    "stream with a wrong byte": ("its compressed pixels are wrong", _flipped(0)),
    "chunk between the pixels": ("its pixels end after 2 of 2000 bytes", _between_pixels()),
    "unknown filter": ("a row of its pixels has an unknown filter", _unknown_filter()),
    "no pixels": ("it has no pixels", build([RGB.header(), END])),
    "no palette": ("its palette (chunk PLTE) is missing", changed(PALETTE, lambda chunks: chunks.remove(chunks[1]))),
    "palette behind the pixels": (
        "its palette (chunk PLTE) is missing",
        changed(PALETTE, lambda chunks: chunks.insert(-1, chunks.pop(1))),
    ),
    "two palettes": ("it has several palettes", changed(PALETTE, lambda chunks: chunks.insert(1, chunks[1]))),
    "half a colour": (
        "has 4 bytes, not 3 for each",
        changed(PALETTE, lambda chunks: chunks.__setitem__(1, (b"PLTE", b"1234"))),
    ),
    "empty palette": ("has 0 bytes, not 3 for each", changed(PALETTE, lambda chunks: chunks.__setitem__(1, (b"PLTE", b"")))),
    "257 colours": ("has 771 bytes, not 3 for", changed(PALETTE, lambda chunks: chunks.__setitem__(1, (b"PLTE", bytes(771))))),
    "two headers": ("it has two headers", with_chunk(1, *RGB.header())),
    "header behind the pixels": ("it has two headers", with_chunk(3, *GREY.header())),
    "unknown critical chunk": ("it has the unknown chunk NEED", with_chunk(1, b"NEED")),
    "unknown critical chunk at the end": ("it has the unknown chunk NEeD", with_chunk(3, b"NEeD")),
    "other chunk first": ("its header, the chunk IHDR of 13 bytes, is not at its", with_chunk(0, *TEXT)),
    "longer header": ("its header, the chunk IHDR of", build([(b"IHDR", RGB.header()[1] + b"\0"), *parse(RGB.file())[1:]])),
    "no width": ("states a size of 0 x 20 px", with_header(width=0)),
    "no height": ("states a size of 33 x 0 px", with_header(height=0)),
    "negative width": ("states a size of 2147483648 x 20 px", with_header(width=2**31)),
    "3 bits": ("states 3 bits a sample with colour type 2", with_header(depth=3)),
    "palette of 16 bits": ("states 16 bits a sample with colour type 3", with_header(depth=16, colour=3)),
    "4-bit colours": ("states 4 bits a sample with colour type 2", with_header(depth=4)),
    "colour type 5": ("states 8 bits a sample with colour type 5", with_header(colour=5)),
    "compression method": ("states the compression method 1", with_header(compression=1)),
    "filter method": ("states the filter method 64", with_header(filter=64)),
    "interlace method": ("states the interlace method 2", with_header(interlace=2)),
    "no end": ("it ends without the chunk IEND", build(parse(RGB.file())[:-1])),
    "end is cut": ("it ends inside its chunk IEND, after 0 of 0 bytes", RGB.file()[:-1]),
    "wrong checksum of the header": ("the checksum of its header is wrong", wrong_checksum(b"IHDR", RGB.file())),
    "wrong checksum of pixels": ("the checksum of its chunk IDAT at byte 33", wrong_checksum(b"IDAT", RGB.file())),
    "wrong checksum of a palette": ("the checksum of its chunk PLTE at byte 33", wrong_checksum(b"PLTE", PALETTE.file())),
    "wrong checksum of the end": ("the checksum of its chunk IEND at byte", wrong_checksum(b"IEND", RGB.file())),
    "wrong checksum of EXIF data": ("of its chunk eXIf", wrong_checksum(b"eXIf", with_chunk(1, b"eXIf", b"II*\0\x08\0\0\0"))),
    "wrong checksum of XMP": (
        "of its chunk iTXt",
        wrong_checksum(b"iTXt", with_chunk(1, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0")),
    ),
    "length that is too large": (
        "it ends inside its chunk tEXt, after",
        RGB.file()[:33] + b"\x7f\xff\xff\xfftEXt" + RGB.file()[33:],
    ),
    "lost bytes": (
        "at byte 57 it has no chunk, so bytes before that are missing",
        build([*parse(RGB.file())[:1], TEXT])[:-12] + bytes(99),
    ),
    "frame of another size": ("that is not of its size", with_chunk(1, b"fcTL", FRAME[:4] + b"\0\0\0\1" + FRAME[8:])),
    "frame before the pixels": ("the frame of an animation before its pixels", with_chunk(1, b"fdAT", bytes(9))),
}
"""Files with a fault that libpng reports as an error, or that may change ComfyUI's pixels, each with the words for it."""

SOUND: Mapping[str, bytes] = {
    "bytes behind the end": RGB.file() + b"more",
    "stream longer than the image": RGB.file([*RGB.rows(), bytes(100)]),
    "stream much longer": RGB.file([*RGB.rows(), bytes(10_000_000)]),
    "bytes behind the stream": RGB.file(packed=_packed() + b"more"),
    "empty chunks of pixels": changed(RGB, lambda chunks: chunks.__setitem__(slice(1, 1), [(b"IDAT", b"")] * 9)),
    "chunk of pixels behind another": changed(RGB, lambda chunks: chunks.__setitem__(slice(3, 3), [TEXT, (b"IDAT", b"x")])),
    "content in the end": changed(RGB, lambda chunks: chunks.__setitem__(-1, (b"IEND", b"more"))),
    "unknown chunk that is not needed": with_chunk(1, b"prVt", b"private"),
    "wrong checksum of a text": wrong_checksum(b"tEXt", with_chunk(1, *TEXT)),
    "wrong checksum of a profile": wrong_checksum(b"iCCP", with_chunk(1, b"iCCP", b"name\0\0" + zlib.compress(b"profile"))),
    "two gammas": with_chunk(1, b"gAMA", b"\0\0\0\1" * 2),
    "short gamma": with_chunk(1, b"gAMA", b"\0"),
    "short chromaticities": with_chunk(3, b"cHRM", b"\0"),
    "short transparency": with_chunk(1, b"tRNS", b"\0"),
    "transparency before the palette": with_chunk(1, b"tRNS", b"\0", PALETTE),
    "transparency behind the pixels": with_chunk(4, b"tRNS", b"\0\1", PALETTE),
    "palette of an RGB image": with_chunk(1, b"PLTE", bytes(6)),
    "palette of a grey image": with_chunk(1, b"PLTE", bytes(6), GREY),
    "one colour for 256 places": changed(PALETTE, lambda chunks: chunks.__setitem__(1, (b"PLTE", b"123"))),
    "256 colours for 4 places": changed(
        replace(PALETTE, depth=2), lambda chunks: chunks.__setitem__(1, (b"PLTE", bytes(range(256)) * 3))
    ),
    "still image that states one frame": changed(
        RGB, lambda chunks: chunks.__setitem__(slice(1, 1), [(b"acTL", b"\0\0\0\1" + bytes(4)), (b"fcTL", FRAME)])
    ),
    "frame behind the pixels": with_chunk(3, b"fdAT", bytes(9)),
    "EXIF data of another form": with_chunk(1, b"eXIf", b"no TIFF at all"),
    "EXIF data in hexadecimal digits of another form": with_chunk(1, b"tEXt", b"Raw profile type exif\0\nexif\n2\nxyz"),
    "unknown compression of a text": with_chunk(1, b"zTXt", b"key\0\x07text"),
    "unknown compression of a profile": with_chunk(1, b"iCCP", b"key\0\x07text"),
    "empty profile": with_chunk(1, b"iCCP"),
    "damaged text": with_chunk(3, b"zTXt", b"key\0\0text"),
    **{f"text called {name}": with_chunk(1, b"tEXt", f"{name}\0text".encode()) for name in ("bbox", "transparency")},
    "text called xmp behind the pixels": with_chunk(3, b"tEXt", b"xmp\0text"),
    "compressed text called exif": with_chunk(3, b"zTXt", b"exif\0\0" + zlib.compress(b"text")),
    "99,000 chunks": changed(RGB, lambda chunks: chunks.__setitem__(slice(1, 1), [(b"prVt", b"")] * 99_000)),
    "99,000 texts": changed(RGB, lambda chunks: chunks.__setitem__(slice(3, 3), [TEXT] * 99_000)),
}
"""Files with an oddity of which libpng only warns. Their pixels are those of the form that they are made of."""
