"""Records that the broker deleted before this group read them, for example because they were older than the retention.

librdkafka goes on at the first record that is left, without an error. Compaction and the markers of transactions leave gaps
too, but behind the first offset that the broker still has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from latent_encoder.kafka.jobs import Partition
from latent_encoder.kafka.positions import Reading
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.telemetry.metrics import RECORDS_MISSED

log = get_logger("latent_encoder.kafka")


class Gaps:
    """The next offset that is expected in each partition of a worker."""

    def __init__(self, start_of: Callable[[Partition], int]) -> None:
        """`start_of` returns the first offset that the broker still had at the last fetch of a partition."""
        self._start_of = start_of
        self._expected: dict[Partition, int] = {}

    def assigned(self, committed: Mapping[Partition, int | None]) -> None:
        """Take new partitions with their committed offsets; without one, the first record is expected nowhere."""
        self.forget(committed.keys())
        self._expected |= {place: offset for place, offset in committed.items() if offset is not None}

    def forget(self, partitions: Collection[Partition]) -> None:
        """Forget partitions that belong to another worker now, or whose topic was created again."""
        for place in partitions:
            self._expected.pop(place, None)

    def taken(self, place: Partition, offset: int) -> None:
        """Compare a record that was taken with the one that was expected."""
        expected = self._expected.get(place)
        if expected is not None and offset > expected:
            self._missed(place, expected, min(self._start_of(place), offset))
        self._expected[place] = offset + 1

    def observe(self, readings: Mapping[Partition, Reading]) -> None:
        """Look for partitions of which everything was deleted, so that no record may come for a long time."""
        for place, reading in readings.items():
            expected = self._expected.get(place)
            if expected is None:
                continue
            self._expected[place] = expected = max(expected, reading.position)  # markers of transactions are no records
            if reading.fetched_all_before >= reading.start > expected:
                self._missed(place, expected, reading.start)
                self._expected[place] = reading.start

    def _missed(self, place: Partition, first: int, behind: int) -> None:
        if behind <= first:
            return
        RECORDS_MISSED.inc(behind - first)
        log.error(
            "records were deleted before they were read",
            topic=place[0],
            partition=place[1],
            first_offset=first,
            last_offset=behind - 1,
            at_most=behind - first,
        )
