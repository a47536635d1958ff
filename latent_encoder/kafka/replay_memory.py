"""The memory of the replays of one partition: which of its dead letters were sent. It is kept with the group's offset.

The committed offset is that of the first letter that was not sent. Letters behind it may have been sent, because a replay may
choose among them. The offset's metadata has the lengths of the stretches behind the offset, in turn waiting and sent. For
example, offset 3 with the lengths 2, 4, 1 means: 3 and 4 wait, 5 to 8 were sent, 9 waits, all letters from 10 on are new.

An offset without metadata means that exactly the letters before it were sent. So Kafka's own tools can set the memory:
`kafka-consumer-groups.sh --reset-offsets`.
"""

from __future__ import annotations

import zlib
from base64 import b64decode, b64encode
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import pairwise

from errors import one_line

FORMAT = "waiting,sent;zlib;base64:"
"""The beginning of the metadata."""

LONGEST_METADATA = 4096
"""Bytes; the broker's default of `offset.metadata.max.bytes`. With a smaller one the broker refuses the commit."""

LONGEST_LENGTHS = 10_000_000
"""Bytes of the lengths as text: far more than fit, compressed, into the metadata that this service writes, and too few to
exhaust the memory. Everybody who may commit for the group can write metadata."""


@dataclass(frozen=True)
class Letters:
    """The stretch of a partition from the end of the last dead letter to the end of this one.

    Between the two are no letters, but perhaps foreign records, or offsets without a record: a transaction leaves one.
    """

    begin: int
    end: int


@dataclass
class ReplayMemory:
    """The stretches of a partition whose letters were not sent, among those that replays have read."""

    read_to: int = 0
    """Letters from this offset on are new."""
    _waiting: list[tuple[int, int]] = field(default_factory=list)
    """Stretches as first offset and end, in order, apart from each other."""

    @classmethod
    def of(cls, offset: int, metadata: str | None) -> ReplayMemory:
        """Return the memory that was committed.

        Raises:
            ValueError: the metadata were not written by this service.
        """
        if not metadata:
            return cls(offset)
        if not metadata.startswith(FORMAT):
            raise ValueError(f"the metadata {metadata[:40]!r} have an unknown format")
        bounds = [offset]
        for length in _lengths(metadata.removeprefix(FORMAT)):
            bounds.append(bounds[-1] + length)
        return cls(bounds[-1], list(pairwise(bounds))[::2])

    def committed(self) -> tuple[int, str]:
        """Return the offset and the metadata to commit."""
        if not self._waiting:
            return self.read_to, ""
        bounds = [offset for stretch in self._waiting for offset in stretch]
        if self.read_to > bounds[-1]:
            bounds.append(self.read_to)
        lengths = ",".join(str(end - begin) for begin, end in pairwise(bounds))
        return bounds[0], FORMAT + b64encode(zlib.compress(lengths.encode(), 9)).decode()

    def was_sent(self, offset: int) -> bool:
        """Return whether a replay sent the letter at that offset."""
        place = bisect_right(self._waiting, (offset, self.read_to)) - 1
        waits = place >= 0 and offset < self._waiting[place][1]
        return offset < self.read_to and not waits

    def read(self, letter: Letters) -> None:
        """Note a letter that waits, unless it is known. The letters of a partition come in their order."""
        if letter.end <= self.read_to:
            return
        begin = max(letter.begin, self.read_to)
        if self._waiting and self._waiting[-1][1] == begin:
            begin = self._waiting.pop()[0]
        self._waiting.append((begin, letter.end))
        self.read_to = letter.end

    def sent(self, letter: Letters) -> None:
        """Note that a letter was sent."""
        self._waiting = [
            part
            for begin, end in self._waiting
            for part in ((begin, min(end, letter.begin)), (max(begin, letter.end), end))
            if part[0] < part[1]
        ]

    def forget_before(self, offset: int) -> None:
        """Forget letters that the topic has no more."""
        self.sent(Letters(0, offset))

    def copy(self) -> ReplayMemory:
        return ReplayMemory(self.read_to, list(self._waiting))


def _lengths(text: str) -> list[int]:
    unpacking = zlib.decompressobj()
    try:
        lengths = [int(length) for length in unpacking.decompress(b64decode(text, validate=True), LONGEST_LENGTHS).split(b",")]
    except (zlib.error, ValueError) as exc:
        raise ValueError(f"the metadata cannot be unpacked ({one_line(exc)})") from exc
    if not unpacking.eof or min(lengths) < 1:
        raise ValueError("the metadata are no lengths of stretches")
    return lengths
