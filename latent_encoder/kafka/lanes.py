"""The order of answers and commits: each partition is a lane whose requests are answered in the order of their offsets.

The encodes may end in any order. A request is answered, and its offset committed, only when it is the first of its lane;
so an offset that is committed never lies past work that is not answered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

from errors import RequestError
from latent_encoder.kafka.records import Incoming, Outgoing
from models import EncodeRequest, SuccessResponse

if TYPE_CHECKING:
    from opentelemetry.trace import Span

Partition = tuple[str, int]


@dataclass(eq=False)
class Job:
    """A request that this worker holds, from its record to the acknowledged answer."""

    record: Incoming
    request: EncodeRequest | None = None
    taken_at: float = field(default_factory=monotonic)
    """In seconds of the monotonic clock."""
    span: Span | None = None
    """Of OpenTelemetry, where that is installed."""
    attempts: int = 0
    encoding: bool = False
    """Whether the encode has begun, so that it pays to finish it."""
    redelivered: bool = False
    """Whether it was answered from the files of an earlier answer."""
    outcome: SuccessResponse | RequestError | None = None
    """What it came to; None until that is known."""
    answer: tuple[Outgoing, ...] | None = None
    """What is still to be acknowledged before the offset is committed; None until it is known."""
    dead_lettered: bool = False
    sent_at: float | None = None
    """When the answer went on its way, in seconds of the monotonic clock; None where it did not."""
    overdue: bool = False
    """Whether it was said that its acknowledgement takes too long."""
    dropped: bool = False
    """Whether its partition belongs to another worker now: whatever comes of it is ignored."""

    @property
    def partition(self) -> Partition:
        return (self.record.topic, self.record.partition)


class Lanes:
    """The jobs that are held, by partition."""

    def __init__(self, dropped: Callable[[Job], None] = lambda _: None) -> None:
        """`dropped` is told of each job that is forgotten."""
        self._dropped = dropped
        self._lanes: dict[Partition, deque[Job]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def jobs(self, partitions: Collection[Partition] | None = None) -> Iterator[Job]:
        """Those of these partitions, or all."""
        for partition in self._lanes.keys() if partitions is None else self._lanes.keys() & partitions:
            yield from self._lanes[partition]

    def add(self, job: Job) -> None:
        self._lanes.setdefault(job.partition, deque()).append(job)

    def ready(self) -> list[Job]:
        """Those whose turn it is to be answered: first of their lane, with an answer that is not on its way."""
        return [job for job in self._heads() if job.answer is not None and job.sent_at is None]

    def sent_before(self, moment: float) -> list[Job]:
        """Those whose answer is on its way since before that moment."""
        return [job for job in self._heads() if job.sent_at is not None and job.sent_at < moment]

    def _heads(self) -> list[Job]:
        return [lane[0] for lane in self._lanes.values()]

    def answered(self, job: Job) -> None:
        """The first of its lane is done."""
        lane = self._lanes[job.partition]
        assert lane[0] is job, "only the first of a lane is answered"
        lane.popleft()
        if not lane:
            del self._lanes[job.partition]

    def drop(self, partitions: Collection[Partition] | None = None) -> list[Job]:
        """Forget all that is held of these partitions, or of all."""
        dropped = list(self.jobs(partitions))
        for partition in {job.partition for job in dropped}:
            del self._lanes[partition]
        return self._forgotten(dropped)

    def drop_unstarted(self, partitions: Collection[Partition] | None = None) -> list[Job]:
        """Forget each lane from the first job on whose encode has not begun and that has no answer yet."""
        dropped: list[Job] = []
        for partition in list(self._lanes) if partitions is None else self._lanes.keys() & partitions:
            jobs = list(self._lanes.pop(partition))
            first = next((n for n, job in enumerate(jobs) if not job.encoding and job.answer is None), len(jobs))
            if first:
                self._lanes[partition] = deque(jobs[:first])
            dropped += jobs[first:]
        return self._forgotten(dropped)

    def _forgotten(self, jobs: list[Job]) -> list[Job]:
        for job in jobs:
            job.dropped = True
            self._dropped(job)
        return jobs
