"""The files that this process published last, by which it knows files that another process put in their place."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

MOST = 1024
"""Publications that are remembered: more than a worker holds requests. Each takes about 300 bytes."""


class Publications:
    """Checksums of the metadata files that this process published, for the latest ones. Used by one thread at a time."""

    def __init__(self) -> None:
        self._latest: OrderedDict[Path, str] = OrderedDict()

    def add(self, metadata: Path, sha256: str) -> None:
        """Remember a metadata file that was just published."""
        self._latest[metadata] = sha256
        self._latest.move_to_end(metadata)
        while len(self._latest) > MOST:
            self._latest.popitem(last=False)

    def has(self, metadata: Path, sha256: str) -> bool:
        """Return whether this process published that metadata file with that content, and no other there after it."""
        return self._latest.get(metadata) == sha256
