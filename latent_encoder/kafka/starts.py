"""Notes of the requests that a worker has begun, in the metadata of the group's committed offsets.

A worker that dies cannot report the request that killed it. So each start is noted at the broker before it begins, beside the
offset of its partition, and removed when it ended. The next owner of the partition finds the starts that never ended.

    {"topic":"pSXSm6xCQeGcMhxvEXqtMQ","starts":{"17":2}}

means that the request at offset 17 was begun by two workers and ended in none. The topic's id shows if the topic was deleted
and created again: then offset and notes are those of other records.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from time import monotonic

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, TopicPartition

from latent_encoder.kafka.jobs import Partition, RecordJob
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder.kafka")

Counts = dict[int, int]
"""Count of the starts of each request that have not ended, by the offset of its record."""

MOST_NOTED = 100
"""Largest count of requests in one note. A broker takes 4096 bytes of metadata by default, and a request takes 25 at most."""

READ_TIMEOUT_S = 10.0
"""Timeout of reading the notes: a rebalance waits for it, and the coordinator has responded a moment ago."""

CONFIRM_TIMEOUT_S = 0.5
"""Longest wait of the loop for a confirmation: long beside a round trip, short enough for a stop to be noticed soon."""

AGAIN_AFTER_S = 0.5
"""Wait before notes that were not confirmed are committed again: the broker is away, or the group is in a rebalance."""


@dataclass
class _Bookmark:
    """The committed offset of a partition, and the notes beside it."""

    offset: int | None
    """The next offset to commit; None before the first record of a partition without a committed offset."""
    committed: Counts
    """The notes that the broker has."""
    wanted: Counts
    """The notes that the broker should have. A partition is assigned with those of earlier workers."""
    committing: bool = False
    """Notes were sent to the broker, and are not confirmed."""

    def due(self) -> Counts:
        """Return the notes to commit beside `offset`."""
        assert self.offset is not None, "a note has an offset, that of its record"
        behind = sorted(offset for offset in self.wanted if offset >= self.offset)
        return {offset: self.wanted[offset] for offset in behind[:MOST_NOTED]}

    @property
    def stale(self) -> bool:
        """The broker has other notes than it should."""
        return self.offset is not None and (self.committing or self.due() != self.committed)


class Starts:
    """The notes of this worker. For the thread that polls.

    A commit of notes is confirmed by reading it back. The client reports commits only to a worker that polls for records, and
    a worker that is full does not. Until then no transaction of the partition begins. Its offset travels on another
    connection, and the older offset could arrive last.
    """

    def __init__(
        self, consumer: Consumer, max_crashes: int, *, transactional: bool, now: Callable[[], float] = monotonic
    ) -> None:
        self._consumer = consumer
        self._max_crashes = max_crashes
        self._transactional = transactional
        self._now = now
        self._again_at = 0.0
        self.topic_id: str | None = None
        """Id of the request topic, if its broker gives topics ids."""
        self._bookmarks: dict[Partition, _Bookmark] = {}

    # Partitions come and go.

    def open(self, partitions: list[TopicPartition]) -> list[TopicPartition]:
        """Read the notes of assigned partitions; return the partitions with the offsets to read from.

        A partition of a topic that was created again since the last commit is read from its beginning.
        """
        beginnings: list[TopicPartition] = []
        for found in self._read(partitions):
            place = (found.topic, found.partition)
            topic_id, counts = parse_notes(found.metadata)
            offset = found.offset if found.offset >= 0 else None
            if self.topic_id is not None and topic_id not in (None, self.topic_id):
                _log_restart(place)
                beginnings.append(TopicPartition(*place, OFFSET_BEGINNING))
                offset, counts = None, {}
            self._bookmarks[place] = _Bookmark(offset, counts, dict(counts))
        others = [place for place in partitions if place.partition not in {beginning.partition for beginning in beginnings}]
        return others + beginnings

    def _read(self, partitions: list[TopicPartition]) -> list[TopicPartition]:
        """Return the committed offsets with their metadata; without them if they cannot be read."""
        wanted = [TopicPartition(place.topic, place.partition) for place in partitions]
        try:
            return self._consumer.committed(wanted, timeout=READ_TIMEOUT_S)
        except KafkaException as exc:
            log.warning("notes of earlier starts cannot be read", reason=exc.args[0].str(), error_code=exc.args[0].name())
            return wanted

    def restart(self, topic_id: str, partitions: Iterable[Partition]) -> None:
        """Forget all offsets and notes of partitions whose topic was created again with that id."""
        self.topic_id = topic_id
        for place in partitions:
            _log_restart(place)
            self._bookmarks[place] = _Bookmark(None, {}, {})

    def forget(self, partitions: Collection[Partition]) -> None:
        """Forget partitions that belong to another worker now."""
        for place in partitions:
            self._bookmarks.pop(place, None)

    def offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int | None]:
        """Return the offset to commit next in each of these partitions; None if it is not known yet."""
        return {place: self._bookmarks[place].offset for place in partitions}

    # A request comes, begins and ends.

    def taken(self, job: RecordJob) -> None:
        """Set the identity of a job that was just taken, and its count of crashes."""
        record = job.record
        job.origin = self.topic_id and f"{self.topic_id}/{record.partition}/{record.offset}"
        bookmark = self._bookmark(job)
        if bookmark is not None:
            job.crashes = bookmark.wanted.get(record.offset, 0)
            job.condemned = job.crashes > self._max_crashes
            bookmark.offset = record.offset if bookmark.offset is None else bookmark.offset

    def begin(self, job: RecordJob) -> None:
        """Note a start, to be committed by `commit`."""
        bookmark = self._bookmark(job)
        if bookmark is not None:
            bookmark.wanted[job.record.offset] = job.crashes + 1

    def end(self, job: RecordJob) -> None:
        """Remove the note of a start that ended without a result: the attempt failed, or the job is left to another worker."""
        bookmark = self._bookmark(job)
        if bookmark is not None:
            bookmark.wanted.pop(job.record.offset, None)
            if job.crashes:
                bookmark.wanted[job.record.offset] = job.crashes

    def noted(self, job: RecordJob) -> bool:
        """Return whether the broker has the note of this start, or cannot get one."""
        bookmark = self._bookmark(job)
        offset = job.record.offset
        return (
            bookmark is None
            or job.attempts > 0  # it did not crash in its first attempt
            or offset not in (due := bookmark.due())
            or (not bookmark.committing and bookmark.committed.get(offset) == due[offset])
        )

    def position_after(self, job: RecordJob) -> TopicPartition | None:
        """Return the offset behind a job's record, to be committed with its response, with the notes of the jobs behind it.

        None if the record's topic is gone.
        """
        bookmark = self._bookmark(job)
        if bookmark is None:
            return None
        offset = job.record.offset + 1
        job.notes = {other: count for other, count in bookmark.due().items() if other >= offset}
        return self._position(job.partition, offset, job.notes)

    def acknowledged(self, job: RecordJob) -> None:
        """Take the acknowledgement of a job whose `position_after` was committed."""
        bookmark = self._bookmark(job)
        if bookmark is not None:
            bookmark.offset = job.record.offset + 1
            bookmark.wanted.pop(job.record.offset, None)
            bookmark.committed = job.notes

    def _bookmark(self, job: RecordJob) -> _Bookmark | None:
        return None if job.orphaned else self._bookmarks.get(job.partition)

    # Commits of notes alone.

    def committing(self, place: Partition) -> bool:
        """Return whether notes of this partition were sent and are not confirmed, so that no transaction may begin."""
        return self._transactional and place in self._bookmarks and self._bookmarks[place].committing

    def pending(self, partitions: Collection[Partition] | None = None) -> bool:
        """Return whether notes of these partitions, or of all, have to be committed."""
        return any(bookmark.stale for place, bookmark in self._bookmarks.items() if partitions is None or place in partitions)

    def commit(self, publishing: Collection[Partition]) -> None:
        """Commit the notes that changed, except of partitions with a response on its way. Wait CONFIRM_TIMEOUT_S at most.

        Notes that the broker does not confirm are committed again by a later call.
        """
        stale = {place: bookmark for place, bookmark in self._bookmarks.items() if bookmark.stale and place not in publishing}
        if not stale or self._now() < self._again_at:
            return
        for bookmark in stale.values():
            bookmark.committing = True
        try:
            self._consumer.commit(offsets=[self._noted_position(*item) for item in stale.items()], asynchronous=True)
            found = self._consumer.committed([TopicPartition(*place) for place in stale], timeout=CONFIRM_TIMEOUT_S)
        except KafkaException as exc:
            log.debug("notes of starts are not confirmed", reason=exc.args[0].str(), error_code=exc.args[0].name())
        else:
            for position in found:
                self._confirm(position)
        if any(bookmark.committing for bookmark in stale.values()):
            self._again_at = self._now() + AGAIN_AFTER_S

    def _confirm(self, found: TopicPartition) -> None:
        bookmark = self._bookmarks[found.topic, found.partition]
        notes = parse_notes(found.metadata)[1]
        if found.offset == bookmark.offset and notes == bookmark.due():
            bookmark.committed, bookmark.committing = notes, False

    def _noted_position(self, place: Partition, bookmark: _Bookmark) -> TopicPartition:
        assert bookmark.offset is not None, "a note has an offset, that of its record"
        return self._position(place, bookmark.offset, bookmark.due())

    def _position(self, place: Partition, offset: int, notes: Counts) -> TopicPartition:
        return TopicPartition(*place, offset, metadata=format_notes(self.topic_id, notes))


def _log_restart(place: Partition) -> None:
    log.error("request topic was created again, reading it from its beginning", topic=place[0], partition=place[1])


def format_notes(topic_id: str | None, notes: Counts) -> str:
    """Return notes as the metadata of a committed offset; empty if there is nothing to note."""
    if topic_id is None and not notes:
        return ""
    return json.dumps({"topic": topic_id, "starts": notes}, separators=(",", ":"))


def parse_notes(metadata: str | None) -> tuple[str | None, Counts]:
    """Return the topic's id and the notes of a committed offset; none if other software wrote its metadata."""
    try:
        found = json.loads(metadata or "{}")
        counts = {int(offset): int(count) for offset, count in found.get("starts", {}).items()}
        topic_id = found.get("topic")
    except (ValueError, TypeError, AttributeError):
        return None, {}
    return topic_id if isinstance(topic_id, str) else None, {offset: count for offset, count in counts.items() if count > 0}
