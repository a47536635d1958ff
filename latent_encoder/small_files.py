"""Reading the small text files that settings name."""

from __future__ import annotations

import os
import stat
from pathlib import Path

LARGEST = 65_536
"""Bytes. A secret or a list of properties has some hundred; a larger file was named by mistake."""


def read_small_file(path: Path) -> str:
    """Return the text of a regular file in UTF-8, with its line ends as they are and without a byte order mark.

    Raises:
        ValueError: the file cannot be used. The text has the reason, without the path and the content.
    """
    try:
        # O_NONBLOCK: opening a named pipe must not wait for its writer. The file is read several times, so no pipe will do.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("not a regular file")
            data = file.read(LARGEST + 1)
    except OSError as exc:
        raise ValueError(exc.strerror or type(exc).__name__) from None
    if len(data) > LARGEST:
        raise ValueError(f"larger than {LARGEST} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:  # its text would show bytes of the content
        line = data.count(b"\n", 0, exc.start) + 1
        raise ValueError(f"not UTF-8 in line {line}") from None
