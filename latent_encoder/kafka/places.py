"""Places in a topic, as a person writes them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latent_encoder.kafka.records import Incoming

PLACE = re.compile(r"(?:(?P<topic>[^/]+)/(?=\d+/))?(?P<partition>\d{1,9})(?:/(?P<first>\d{1,18})(?:-(?P<last>\d{1,18}))?)?")
"""Places of dead letters: `PARTITION`, `PARTITION/OFFSET` or `PARTITION/FIRST-LAST`, the latter two perhaps with the topic."""


@dataclass(frozen=True)
class Places:
    """Offsets of one partition; `topic` is None if only the partition was named."""

    topic: str | None
    partition: int
    first: int = 0
    last: int | None = None

    @classmethod
    def of(cls, text: str) -> Places:
        """Return the places that a text names.

        Raises:
            ValueError: it is not of the form of `PLACE`.
        """
        found = PLACE.fullmatch(text)
        if found is None:
            raise ValueError("it is not PARTITION, PARTITION/OFFSET or PARTITION/FIRST-LAST")
        first, last = found["first"], found["last"] or found["first"]
        return cls(found["topic"], int(found["partition"]), int(first or 0), None if last is None else int(last))

    def have(self, record: Incoming) -> bool:
        """Return whether the record is at one of these places."""
        return (
            self.topic in (None, record.topic)
            and self.partition == record.partition
            and self.first <= record.offset
            and (self.last is None or record.offset <= self.last)
        )
