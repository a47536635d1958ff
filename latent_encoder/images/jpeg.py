"""The check of a JPEG: its structure, and a decode in which each warning of libjpeg counts.

LoadImage's decoders drop these warnings, and fill the rest of the image with grey or with shifted blocks. TurboJPEG keeps the
first warning of a file. The header is therefore written anew without the parts that no decoder needs: there, cameras leave
stray bytes, of which libjpeg also warns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from io import BytesIO

from latent_encoder.images.jpeg_holes import has_hole
from latent_encoder.images.jpeg_markers import APP0, APP15, COM, DNL, RESTARTS, SOI
from latent_encoder.images.jpeg_structure import Structure, damaged, structure_of, unreadable

LEAST_SCALE = 8
"""The largest divisor of both sides in libjpeg: all coded pixels are read, but few are computed."""

MOST_PADDING = 16
"""Bytes of zeros before the end marker. Encoders that write whole words fill the last one, of up to 16 bytes."""

NOT_NEEDED = {*range(APP0, APP15 + 1), COM, DNL, SOI, *RESTARTS, *range(0xC0)}
"""Markers before the pixels that do not change how pixels are decoded, except for the meaning of the colours."""

NO_MEMORY = "Insufficient memory"
UNKNOWN_SAMPLING = "Could not determine subsampling level"
PADDED = re.compile(r"(\d+) extraneous bytes before marker 0xd9")

WARNINGS: Mapping[str, str] = {
    "premature end of data segment": "its coded pixels end too early, so a part is missing",
    "Premature end of JPEG file": "it ends before its end marker, so a part is missing",
    "extraneous bytes before marker": "it has bytes between its coded pixels that belong to none",
    "bad Huffman code": "its coded pixels have a code that means nothing",
    "bad arithmetic code": "its coded pixels have a code that means nothing",
    "instead of RST": "its restart markers are not in order, so a part is missing or in the wrong place",
    "Inconsistent progression": "its scans do not continue each other, so a part is missing",
}
"""Our words for the warnings of libjpeg-turbo, by a part of its message. A decoder goes on after them."""

ERRORS: Mapping[str, str] = {
    "Huffman table": "a table of its codes is missing or wrong",
    "DHT": "a table of its codes is wrong",
    "Quantization table": "a table of its quantization is missing",
    "Unsupported marker type": "it has a marker that no JPEG has",
    "progressive parameters": "the header of a scan has values that no JPEG has",
}
"""Our words for its errors, after which it has no pixels."""

OTHER_WORDS = "its coded pixels or their header cannot be decoded"


def check_jpeg(data: bytearray, max_pixels: int) -> None:
    """Check a whole JPEG file. The header in `data` is replaced.

    Raises:
        ImageDamage: the file is damaged, but has pixels.
        ImageFault: it has none, or must not be decoded: it has more than `max_pixels` pixels, or see `structure_of`.
    """
    structure = structure_of(data, max_pixels)
    structure.refuse_incomplete(len(data))
    if has_hole(data):
        raise damaged("its coded pixels have a hole of zeros")
    padding = _padding(data, structure)
    data[: structure.pixels_at] = _header(data, structure)
    message = _complaint(data)
    if message is None:
        return
    if NO_MEMORY in message:
        raise MemoryError
    if UNKNOWN_SAMPLING in message:
        _decode_with_pillow(data)
        return
    if (found := PADDED.search(message)) and int(found[1]) <= padding:
        return
    for part, words in WARNINGS.items():
        if part in message:
            raise damaged(words)
    raise unreadable(next((words for part, words in ERRORS.items() if part in message), OTHER_WORDS))


def _padding(data: bytearray, structure: Structure) -> int:
    """Return the number of zeros before the end marker, up to the largest number that counts as padding."""
    before = data[structure.ends_at - MOST_PADDING : structure.ends_at]
    return len(before) - len(before.rstrip(b"\0"))


def _header(data: bytearray, structure: Structure) -> bytes:
    """Return the part of the header that decides how pixels are decoded."""
    needed = [segment for segment in structure.header if segment.marker not in NOT_NEEDED]
    return b"\xff\xd8" + b"".join(b"\xff%c" % segment.marker + data[segment.start - 2 : segment.end] for segment in needed)


def _complaint(data: bytearray) -> str | None:
    """Return the first warning of libjpeg, or its error, None if it has none."""
    import simplejpeg  # imports NumPy, which a PNG does not need

    try:
        simplejpeg.decode_jpeg(data, "GRAY", fastdct=True, min_height=1, min_width=1, min_factor=LEAST_SCALE, strict=True)
    except ValueError as exc:
        return str(exc)
    return None


def _decode_with_pillow(data: bytearray) -> None:
    """Decode a JPEG whose colours have sizes that TurboJPEG does not know. Pillow drops warnings, so it sees less."""
    from PIL import Image

    try:
        with Image.open(BytesIO(data), formats=("JPEG",)) as image:
            image.load()
    except MemoryError:
        raise
    except Exception as exc:
        raise unreadable(OTHER_WORDS) from exc
