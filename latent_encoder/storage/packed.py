"""Many names in little memory, for the listing of a bucket with hundreds of thousands of objects."""

from __future__ import annotations

import zlib
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import chain

PAGE = 1000
"""Names that are compressed together: about 60 kB, enough to find what they have in common."""

FEWEST_NEW = 10_000
"""Digests that are kept in a set, which takes 60 bytes for each, before they are sorted into the array."""

SEPARATOR = "\0"
"""No name in a listing has it, because XML and JSON documents of storages cannot."""


class PackedNames:
    """Names in the order in which they were added, compressed: neighbours in a listing begin alike."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._pages: list[bytes] = []
        self._latest: list[str] = []
        for name in names:
            self.add(name)

    def add(self, name: str) -> None:
        self._latest.append(name)
        if len(self._latest) == PAGE:
            self._pages.append(zlib.compress(SEPARATOR.join(self._latest).encode("utf-8", "surrogatepass"), 1))
            self._latest.clear()

    def __len__(self) -> int:
        return PAGE * len(self._pages) + len(self._latest)

    def __iter__(self) -> Iterator[str]:
        for page in self._pages:
            yield from zlib.decompress(page).decode("utf-8", "surrogatepass").split(SEPARATOR)
        yield from list(self._latest)


class NameDigests:
    """A set of names of which 8 bytes each are kept.

    It never fails to know a name. The probability that it takes another name for one of 100,000 is 1 in 10**14.
    """

    def __init__(self) -> None:
        self._sorted = array("q")
        self._new: set[int] = set()

    def add(self, name: str) -> None:
        self._new.add(hash(name))
        if len(self._new) >= max(FEWEST_NEW, len(self._sorted) // 4):
            self._sorted = array("q", sorted(chain(self._sorted, self._new)))
            self._new.clear()

    def __contains__(self, name: str) -> bool:
        digest = hash(name)
        place = bisect_left(self._sorted, digest)
        return (place < len(self._sorted) and self._sorted[place] == digest) or digest in self._new
