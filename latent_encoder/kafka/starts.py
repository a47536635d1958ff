"""Notes of the requests that a worker has begun, in the metadata of the group's committed offsets.

A worker that dies cannot report the request that killed it. So each start is noted at the broker before it begins, beside the
offset of its partition, and removed when it ended. The next owner of the partition finds the starts that never ended.

    {"topic":"pSXSm6xCQeGcMhxvEXqtMQ","starts":{"17":2}}

means that the request at offset 17 was begun by two workers and ended in none. The topic's id shows if the topic was deleted
and created again: then offset and notes are those of other records.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from queue import SimpleQueue

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

from latent_encoder.kafka.jobs import Partition, RecordJob
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder.kafka")

Counts = dict[int, int]
"""Count of the starts of each request that have not ended, by the offset of its record."""

MOST_NOTED = 100
"""Largest count of requests in one note. A broker takes 4096 bytes of metadata by default, and a request takes 25 at most."""

READ_TIMEOUT_S = 10.0
"""Timeout of reading the notes: a rebalance waits for it, and the coordinator has responded a moment ago."""

CLOSE_TIMEOUT_S = 1.0
"""Longest wait for a commit that is under way while the worker stops. It may wait for a broker that is away."""


@dataclass
class _Bookmark:
    """The committed offset of a partition, and the notes beside it."""

    offset: int | None
    """The next offset to commit; None before the first record of a partition without a committed offset."""
    earlier: Counts
    """The notes that were found when the partition was assigned."""
    committed: Counts
    """The notes that the broker has."""
    wanted: Counts = field(default_factory=dict)
    """The notes that the broker should have."""
    committing: bool = False

    def due(self) -> Counts:
        """Return the notes to commit beside `offset`."""
        assert self.offset is not None, "a note has an offset, that of its record"
        behind = sorted(offset for offset in self.wanted if offset >= self.offset)
        return {offset: self.wanted[offset] for offset in behind[:MOST_NOTED]}

    @property
    def stale(self) -> bool:
        """The broker has other notes than it should."""
        return self.offset is not None and self.due() != self.committed


@dataclass(frozen=True)
class NotesCommit:
    """A commit of notes alone."""

    bookmark: _Bookmark
    position: TopicPartition
    notes: Counts


class Starts:
    """The notes of this worker. A thread commits them, because the loop must not wait for the broker.

    While a note is being committed, the job at the head of its partition is not published, and the other way round. Of two
    commits that are under way at once, the older one could arrive last and take the offset back.
    """

    def __init__(
        self, consumer: Consumer, max_crashes: int, committed: Callable[[NotesCommit, KafkaError | None], None]
    ) -> None:
        """Start the thread, which calls `committed` with the outcome of each commit; the loop then calls `settle`."""
        self._consumer = consumer
        self._max_crashes = max_crashes
        self._report = committed
        self.topic_id: str | None = None
        """Id of the request topic, if its broker gives topics ids."""
        self._bookmarks: dict[Partition, _Bookmark] = {}
        self._inbox: SimpleQueue[NotesCommit | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="starts", daemon=True)
        self._thread.start()

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        """The thread without which no request begins."""
        return (self._thread,)

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
                log.error("request topic was created again, reading it from its beginning", topic=place[0], partition=place[1])
                beginnings.append(TopicPartition(*place, OFFSET_BEGINNING))
                offset, counts = None, {}
            self._bookmarks[place] = _Bookmark(offset, counts, committed=counts, wanted=dict(counts))
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
            self._bookmarks[place] = _Bookmark(None, {}, {})

    def forget(self, partitions: Collection[Partition]) -> None:
        """Forget partitions that belong to another worker now."""
        for place in partitions:
            self._bookmarks.pop(place, None)

    # A request comes, begins and ends.

    def taken(self, job: RecordJob) -> None:
        """Set the identity of a job that was just taken, and its count of crashes."""
        record = job.record
        job.origin = f"{self.topic_id or record.topic}/{record.partition}/{record.offset}"
        job.max_crashes = self._max_crashes
        bookmark = self._bookmark(job)
        if bookmark is not None:
            job.crashes = bookmark.earlier.get(record.offset, 0)
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
        """Return whether a note of this partition is being committed."""
        return place in self._bookmarks and self._bookmarks[place].committing

    def pending(self, partitions: Collection[Partition] | None = None) -> bool:
        """Return whether notes of these partitions, or of all, have to be committed or are being committed."""
        return any(
            bookmark.stale or bookmark.committing
            for place, bookmark in self._bookmarks.items()
            if partitions is None or place in partitions
        )

    def commit(self, publishing: Collection[Partition]) -> None:
        """Begin to commit the notes that changed, except of partitions with a response on its way."""
        for place, bookmark in self._bookmarks.items():
            if bookmark.stale and not bookmark.committing and place not in publishing:
                assert bookmark.offset is not None
                notes = bookmark.due()
                bookmark.committing = True
                self._inbox.put(NotesCommit(bookmark, self._position(place, bookmark.offset, notes), notes))

    def settle(self, commit: NotesCommit, *, confirmed: bool) -> None:
        """Take the outcome of a commit. Notes that were refused are committed again by a later `commit`."""
        commit.bookmark.committing = False
        if confirmed:
            commit.bookmark.committed = commit.notes

    def close(self) -> None:
        """End the thread."""
        self._inbox.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)

    def _position(self, place: Partition, offset: int, notes: Counts) -> TopicPartition:
        return TopicPartition(*place, offset, metadata=format_notes(self.topic_id, notes))

    def _run(self) -> None:
        while (commit := self._inbox.get()) is not None:
            try:
                (confirmed,) = self._consumer.commit(offsets=[commit.position], asynchronous=False)
                self._report(commit, confirmed.error)
            except KafkaException as exc:
                self._report(commit, exc.args[0])


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
