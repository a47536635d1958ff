"""The marks in our files, by which they are recognised where no other file of their request lies beside them."""

from __future__ import annotations

import struct
import zlib

HEADER_KEY = "latent_encoder"
"""The only key of a latent's header. safetensors writes several keys in another order each time, so the bytes would differ."""

HTML_MARK = '<meta name="generator" content="latent-encoder">'
"""Stands in the first MARKED_BYTES of each page."""

MARKED_BYTES = 4096
"""Bytes at the beginning of a file that have its mark: one page of memory. Our marks stand in the first 100 bytes."""

_TEXT = b"tEXt" + b"Software\0latent-encoder"
PNG_MARK = struct.pack(">I", len(_TEXT) - 4) + _TEXT + struct.pack(">I", zlib.crc32(_TEXT))
"""A chunk of a PNG, behind the signature and the header. PNG Specification (Third Edition), W3C 2025, section 11.3.3."""

PNG_MARK_AT = 33
"""Bytes before the mark of a PNG: 8 of the signature, 25 of the header's chunk."""

TORCH_FILE = b"PK\x03\x04"
"""The first bytes of a file that torch.save wrote: it is a ZIP archive."""


def has_mark(name: str, head: bytes) -> bool:
    """Return whether the first MARKED_BYTES of a file are those of a file of ours, judged by the ending of its name."""
    match name.rpartition(".")[2]:
        case "png":
            return head.startswith(PNG_MARK, PNG_MARK_AT)
        case "html":
            return HTML_MARK.encode() in head
        case "pt":
            return head.startswith(TORCH_FILE)
        case _:
            return f'"{HEADER_KEY}"'.encode() in head
