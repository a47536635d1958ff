"""The checksum of a file."""

from __future__ import annotations

import hashlib


def checksum(data: bytes) -> str:
    """Return the SHA-256 of the bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
