"""The chunks of a PNG."""

from __future__ import annotations

from dataclasses import dataclass

Buffer = bytes | bytearray
"""The bytes of a file."""

Span = tuple[int, int]
"""A part of a file: offsets of its first byte, and of the byte behind its last."""

SIGNATURE = b"\x89PNG\r\n\x1a\n"  # the first bytes of every PNG

NAME_END = 8  # bytes: the length, then the name
CHECKSUM = 4  # bytes

TEXTS = frozenset((b"iTXt", b"tEXt", b"zTXt"))
LONGEST_KEYWORD = 79  # bytes of a text's keyword; a zero follows it


@dataclass(frozen=True)
class Header:
    """The content of IHDR."""

    width: int
    height: int
    bit_depth: int
    colour_type: int
    is_interlaced: bool


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk: its name, its place in the file, and a checksum that fits or not."""

    kind: bytes
    start: int
    """Offset of its length."""
    end: int
    """Offset of the next chunk."""
    is_whole: bool = True
    """Its checksum is right."""

    @property
    def length(self) -> int:
        """Number of bytes of its content."""
        return self.end - self.start - NAME_END - CHECKSUM

    @property
    def content_span(self) -> Span:
        """Place of its content."""
        return self.start + NAME_END, self.end - CHECKSUM

    @property
    def is_critical(self) -> bool:
        """A reader that does not know the chunk cannot show the image: its name begins with a capital letter."""
        return self.kind[:1].isupper()

    def content(self, data: Buffer) -> bytes:
        """Return its content, from the bytes of the file."""
        start, end = self.content_span
        return bytes(data[start:end])

    def keyword(self, data: Buffer) -> bytes | None:
        """Return the keyword of a text, at most 79 bytes of it; None for other chunks."""
        if self.kind not in TEXTS:
            return None
        start, end = self.content_span
        return bytes(data[start : min(end, start + LONGEST_KEYWORD)]).partition(b"\0")[0]
