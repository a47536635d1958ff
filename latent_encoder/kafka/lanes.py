"""The order of responses and commits: each partition is a lane whose jobs are published in the order of their offsets.

Encodes may end in any order. A job is published, and its offset committed, only when it is the first of its lane. So a
committed offset never lies past a request without a response.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator

from latent_encoder.kafka.jobs import Partition, RecordJob, State


class Lanes:
    """The jobs that this worker holds, by partition."""

    def __init__(self, on_drop: Callable[[RecordJob], None] = lambda _: None) -> None:
        """`on_drop` is called with each job that is dropped."""
        self._on_drop = on_drop
        self._lanes: dict[Partition, deque[RecordJob]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def jobs(self, partitions: Collection[Partition] | None = None) -> Iterator[RecordJob]:
        """Yield the jobs of these partitions, or all jobs."""
        for partition in self._lanes.keys() if partitions is None else self._lanes.keys() & partitions:
            yield from self._lanes[partition]

    def add(self, job: RecordJob) -> None:
        """Append a job to the lane of its partition."""
        self._lanes.setdefault(job.partition, deque()).append(job)

    @property
    def in_hand(self) -> int:
        """Count of the jobs for KAFKA_PREFETCH: without those that wait for a retry, and those finished behind another job."""
        return sum(not self._set_aside(job) for job in self.jobs())

    def crowded(self, limit: int) -> set[Partition]:
        """Return the partitions in which that many jobs or more do not count for KAFKA_PREFETCH."""
        return {place for place, lane in self._lanes.items() if sum(map(self._set_aside, lane)) >= limit}

    def _set_aside(self, job: RecordJob) -> bool:
        return job.retrying or (job.state is State.FINISHED and self._lanes[job.partition][0] is not job)

    @property
    def sending(self) -> set[Partition]:
        """The partitions whose first job is published and not acknowledged."""
        return {job.partition for job in self._heads() if job.state is State.SENT}

    @property
    def published(self) -> list[RecordJob]:
        """The jobs that wait for an acknowledgement, or for being published again."""
        return [job for job in self._heads() if job.state in (State.FINISHED, State.SENT)]

    def ready(self) -> list[RecordJob]:
        """Return the jobs whose turn it is to be published: finished, and first of their lane."""
        return [job for job in self._heads() if job.state is State.FINISHED]

    def sent_before(self, moment: float) -> list[RecordJob]:
        """Return the jobs published before that moment (monotonic clock, s) that still wait for an acknowledgement."""
        return [job for job in self._heads() if job.sent_at is not None and job.sent_at < moment]

    def _heads(self) -> list[RecordJob]:
        return [lane[0] for lane in self._lanes.values()]

    def acknowledged(self, job: RecordJob) -> None:
        """Remove the first job of its lane; the next one has its turn."""
        lane = self._lanes[job.partition]
        assert lane[0] is job, "only the first job of a lane is published"
        job.acknowledged()
        lane.popleft()
        if not lane:
            del self._lanes[job.partition]

    def drop(self, partitions: Collection[Partition] | None = None) -> list[RecordJob]:
        """Drop all jobs of these partitions, or all jobs; return them."""
        dropped = list(self.jobs(partitions))
        for partition in {job.partition for job in dropped}:
            del self._lanes[partition]
        return self._drop(dropped)

    def drop_unstarted(self, partitions: Collection[Partition] | None = None) -> list[RecordJob]:
        """Drop the end of each lane, from its first unstarted job on; return the dropped jobs.

        The jobs behind an unstarted one cannot be committed before it, so they go too.
        """
        dropped: list[RecordJob] = []
        for partition in list(self._lanes) if partitions is None else self._lanes.keys() & partitions:
            jobs = list(self._lanes.pop(partition))
            first = next((n for n, job in enumerate(jobs) if job.unstarted), len(jobs))
            if first:
                self._lanes[partition] = deque(jobs[:first])
            dropped += jobs[first:]
        return self._drop(dropped)

    def _drop(self, jobs: list[RecordJob]) -> list[RecordJob]:
        for job in jobs:
            job.drop()
            self._on_drop(job)
        return jobs
