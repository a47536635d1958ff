"""The files that this process published last, by which it knows files that another process put in their place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

MOST = 1024
"""Publications that are remembered: more than a worker holds requests. Each takes about 300 bytes."""


class Publications:
    """Checksums of the metadata files that this process published, for the latest ones. Thread-safe."""

    def __init__(self) -> None:
        self._latest: OrderedDict[tuple[Path, str], None] = OrderedDict()
        self._lock = Lock()

    @contextmanager
    def publishing(self, metadata: Path, sha256: str) -> Iterator[None]:
        """Remember a metadata file that is published inside, so that another thread that finds it knows it.

        One whose publication fails is forgotten. It may have appeared all the same, and another process may have sent a
        response with it.
        """
        self._add(metadata, sha256)
        try:
            yield
        except BaseException:
            with self._lock:
                self._latest.pop((metadata, sha256), None)
            raise

    def _add(self, metadata: Path, sha256: str) -> None:
        with self._lock:
            self._latest[metadata, sha256] = None
            self._latest.move_to_end((metadata, sha256))
            while len(self._latest) > MOST:
                self._latest.popitem(last=False)

    def has(self, metadata: Path, sha256: str) -> bool:
        """Return whether this process published that metadata file with that content."""
        return (metadata, sha256) in self._latest
