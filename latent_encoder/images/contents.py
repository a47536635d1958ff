"""Names for the contents of files that are neither a JPEG nor a PNG, each with the way to an image.

A content is judged by its first bytes, never by the name of its file.
"""

from __future__ import annotations

import re

from latent_encoder.images.content_kinds import BINARY, OTHER_TEXT, TEXTS, Kind
from latent_encoder.images.faults import ImageFault
from latent_encoder.images.png_chunks import SIGNATURE
from latent_encoder.images.tiff import kind_of_tiff

HEAD = 4096  # bytes that are looked at; HTTP headers and a web server's warnings before an image are shorter
FEWEST_BYTES = 4  # fewer do not tell one format from another
SHOWN_BYTES = 8  # of a content that is not known

IMAGE_INSIDE = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff[\xc0\xc2\xc4\xdb\xdd\xe0-\xef\xfe]")
CONTROL = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]")
UTF8_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")

OTHER_ENCODING = "that a program read as text and wrote in another encoding"
SEVEN_BITS = "whose bytes lost their highest bit in a transfer as text"
WRONG_BEGINNING = "whose first bytes are wrong or missing"

# A PNG begins with a byte above 127, CR LF, Ctrl-Z and LF: a transfer as text shows there.
MANGLED: tuple[tuple[str, str, re.Pattern[bytes]], ...] = (
    ("PNG", "whose bytes CR LF became LF in a transfer as text", re.compile(rb"\x89PNG\n\x1a\n")),
    ("PNG", "whose bytes LF became CR LF in a transfer as text", re.compile(rb"\x89PNG\r\r\n\x1a\r\n")),
    ("PNG", "whose line ends changed in a transfer as text", re.compile(rb"\x89PNG[\r\n]{1,3}\x1a?[\r\n]{1,2}")),
    ("PNG", SEVEN_BITS, re.compile(rb"\tPNG")),
    ("PNG", OTHER_ENCODING, re.compile(rb"(\xc2\x89|\xef\xbf\xbd|\?)PNG")),
    (
        "PNG",
        WRONG_BEGINNING,
        re.compile(rb"\x89PNG|.?PNG\r?\n|(?!\x89HDF|[\x8a\x8b][MJ]NG)(.{4}\r\n\x1a\n|.{12}IHDR)", re.DOTALL),
    ),
    ("JPEG", SEVEN_BITS, re.compile(rb"\x7fX\x7f")),
    ("JPEG", OTHER_ENCODING, re.compile(rb"(\xef\xbf\xbd){3}|\xc3\xbf\xc3\x98\xc3\xbf|\?{3,4}\0\x10JFIF")),
    ("JPEG", WRONG_BEGINNING, re.compile(rb"\xff\xd8|.{2,6}(JFIF|Exif)\0", re.DOTALL)),
)


def fault_of(data: bytes) -> ImageFault:
    """Return the fault of a file that begins neither like a JPEG nor like a PNG: its content, and the way to an image."""
    head = data[:HEAD]
    return ImageFault(
        _nothing(data)
        or _cut_or_mangled(head)
        or _binary(data, head)
        or _image_inside(head)
        or _text(head)
        or f"is neither a JPEG nor a PNG, nor of another kind that is known; it begins with the bytes {_shown(head)}"
    )


def _nothing(data: bytes) -> str | None:
    number = len(data)
    if number < FEWEST_BYTES:
        return f"has {number} byte{'s' * (number != 1)}, too few for an image; fetch or export it again"
    if data.count(0) == number:
        return f"holds {number} zeros and nothing else: a transfer or a disk lost its content; fetch or export it again"
    return None


def _cut_or_mangled(head: bytes) -> str | None:
    if SIGNATURE.startswith(head):
        return f"is damaged: it ends after {len(head)} bytes, inside the first 8 of a PNG; fetch or export it again"
    for name, cause, pattern in MANGLED:
        if pattern.match(head):
            return f"is damaged: it is a {name} {cause}; fetch it again, in binary mode"
    return None


def _binary(data: bytes, head: bytes) -> str | None:
    kind = next((kind for pattern, kind in BINARY if pattern.match(head)), None) or kind_of_tiff(data)
    return None if kind is None else _named(kind)


def _named(kind: Kind) -> str:
    return f"is {kind.name}; {kind.advice}"


def _image_inside(head: bytes) -> str | None:
    found = IMAGE_INSIDE.search(head)
    if found is None:
        return None
    name = "PNG" if found[0] == SIGNATURE else "JPEG"
    return (
        f"has {_junk(head[: found.start()])} before the {name} in it; "
        f"remove them, for example with `tail -c +{found.start() + 1} FILE > out.{name.lower()}`"
    )


def _junk(junk: bytes) -> str:
    number = f"{len(junk)} bytes" if len(junk) != 1 else "1 byte"
    if junk.startswith(b"HTTP/"):
        return f"HTTP headers ({number})"
    return f"{len(junk)} zeros" if not junk.strip(b"\0") else f"{number} of other content"


def _text(head: bytes) -> str | None:
    text = _as_utf8(head)
    if text is None or CONTROL.search(text):
        return None
    return _named(next((kind for pattern, kind in TEXTS if pattern.match(text)), OTHER_TEXT))


def _as_utf8(head: bytes) -> bytes | None:
    """Return a text without a mark and white space at its beginning; None if it is none, in UTF-8 or marked as UTF-16."""
    if head.startswith(UTF16_MARKS):
        return head.decode("utf-16", "replace").encode().strip()
    try:
        head.decode()
    except UnicodeDecodeError as exc:
        if exc.start < HEAD - 3:  # HEAD may cut a character of up to 4 bytes
            return None
    return head.removeprefix(UTF8_MARK).strip()


def _shown(head: bytes) -> str:
    return head[:SHOWN_BYTES].hex(" ")
