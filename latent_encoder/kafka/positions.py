"""The position of a worker in each of its partitions, by its consumer, the broker, and the committed offset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latent_encoder.kafka.jobs import Partition
from latent_encoder.kafka.topics import Seen


@dataclass(frozen=True)
class Reading:
    """One partition, as its worker reads it. All fields are offsets."""

    position: int
    """The offset behind the last record that the consumer handed out, markers of transactions included."""
    start: int
    """The first offset that the broker still has."""
    end: int
    """The offset behind the last record that may be read."""
    fetched_all_before: int = 0
    """No record before this offset waits in the client: they were handed out, or the broker has deleted them."""

    @property
    def unread(self) -> int:
        """Count of offsets that were not handed out yet. Markers of transactions behind the last record count too."""
        return max(0, self.end - max(self.position, self.start))


def readings(
    statistics: Mapping[str, Any], seen: Seen | None, committed: Mapping[Partition, int | None]
) -> dict[Partition, Reading]:
    """Return the reading of each partition whose end is known.

    `statistics` are the consumer's of the request topic:
    https://github.com/confluentinc/librdkafka/blob/master/STATISTICS.md
    `committed` has the worker's partitions, each with the committed offset that it was assigned with, if there was one.
    """
    partitions = statistics.get("partitions", {})
    found = {}
    for place, offset in committed.items():
        reading = _reading(partitions.get(str(place[1]), {}), seen, place[1], offset)
        if reading is not None:
            found[place] = reading
    return found


def _reading(partition: Mapping[str, Any], seen: Seen | None, number: int, committed: int | None) -> Reading | None:
    """Return the reading of one partition.

    The consumer's own `ls_offset` is of its last fetch, which may be hours ago in a paused partition, so the broker is asked
    too. `app_offset` is negative until the consumer has handed out a record.
    """
    ends = (partition.get("ls_offset", -1), seen.ends.get(number, -1) if seen is not None else -1)
    if max(ends) < 0:
        return None
    start = max(partition.get("lo_offset", 0), seen.starts.get(number, 0) if seen is not None else 0, 0)
    position: int = partition.get("app_offset", -1)
    if position < 0:
        position = committed if committed is not None else max(partition.get("committed_offset", -1), 0)
    empty = partition.get("fetchq_cnt", 1) == 0 and partition.get("fetch_state") == "active"
    return Reading(position, start, max(ends), partition.get("next_offset", 0) if empty else 0)
