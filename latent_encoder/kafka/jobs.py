"""A request that a worker holds, and the states that it goes through from its record to the acknowledged response.

    WAITING ──note──> NOTING ──begin──> SUBMITTED ──finish──> FINISHED ──sent──> SENT ──acknowledged──> ACKNOWLEDGED
       ^                                    │                    ^                 │
       └────────────────wait────────────────┘                    └─────resend──────┘

`begin` leads to SUBMITTED also from WAITING, for a request that may not be encoded any more. `finish` leads to FINISHED also
from WAITING, for an invalid request, and from SENT, for records that were refused. `drop` leads from every state before
ACKNOWLEDGED to DROPPED.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from time import monotonic
from typing import TYPE_CHECKING, BinaryIO

from errors import RequestError
from latent_encoder.kafka.records import Incoming, Outgoing, Sender
from models import EncodeRequest, SuccessResponse

if TYPE_CHECKING:
    from opentelemetry.trace import Span

Partition = tuple[str, int]
"""A topic and the number of one of its partitions."""


class State(Enum):
    """The progress of a job."""

    WAITING = auto()
    """Taken from its topic, or waiting for its next attempt."""
    NOTING = auto()
    """About to begin: the broker does not have the note of its start yet (`starts.py`)."""
    SUBMITTED = auto()
    """Handed to the stages."""
    FINISHED = auto()
    """Ready to be published as soon as it is the first of its lane."""
    SENT = auto()
    """Published; the broker has not acknowledged it yet."""
    ACKNOWLEDGED = auto()
    """Acknowledged by the broker."""
    DROPPED = auto()
    """Left to another worker: the partition was taken away, or this worker stops. Late results are ignored."""


_LEADS_TO = {
    State.WAITING: {State.NOTING, State.SUBMITTED, State.FINISHED, State.DROPPED},
    State.NOTING: {State.SUBMITTED, State.DROPPED},
    State.SUBMITTED: {State.WAITING, State.FINISHED, State.DROPPED},
    State.FINISHED: {State.SENT, State.DROPPED},
    State.SENT: {State.FINISHED, State.ACKNOWLEDGED, State.DROPPED},
    State.ACKNOWLEDGED: set[State](),
    State.DROPPED: set[State](),
}


@dataclass(eq=False)
class RecordJob:
    """A request that this worker holds, from its record to the acknowledged response.

    Only the thread that polls changes the state. The stages set `encoding`, `redelivered` and `held`.
    """

    record: Incoming
    request: EncodeRequest | None = None
    """None if the record holds no valid request."""
    sender: Sender = Sender(None, None)  # noqa: RUF009  # it is frozen
    """The ids that a response is addressed with, as far as the record has them; set when the record is read."""
    origin: str | None = None
    """Identity of the record, `topic id/partition/offset`: files that were written for it hold its response."""
    taken_at: float = field(default_factory=monotonic)
    """Seconds of the monotonic clock."""
    orphaned: bool = False
    """The record's topic was deleted: the request gets its response, and there is no offset to commit."""
    span: Span | None = None
    """OpenTelemetry's span of the request, if OpenTelemetry is installed."""
    attempts: int = 0
    """Count of attempts that were begun."""
    forgiven: int = 0
    """Count of attempts that failed while the machine was broken; they do not count for KAFKA_MAX_RETRIES."""
    due_at: float = 0.0
    """Time before which the next attempt does not begin, in seconds of the monotonic clock."""
    crashes: int = 0
    """Count of earlier starts, by any worker, that ended neither in a result nor in a failed attempt."""
    blamed: bool = False
    """The worker ends because of this attempt, which counts as a crash."""
    condemned: bool = False
    """The request crashed too many workers to be encoded again."""
    encoding: bool = False
    """The encode of this attempt has begun, so finishing it costs less than a new delivery."""
    redelivered: bool = False
    """The response was made from the files of an earlier one."""
    held: BinaryIO | None = None
    """An open file that keeps the files of the response from OUTPUT_TTL_DAYS; None without that setting."""
    result: SuccessResponse | RequestError | None = None
    """The final result; None before FINISHED."""
    records: tuple[Outgoing, ...] = ()
    """The records that the broker has to acknowledge before the offset is committed."""
    dead_lettered: bool = False
    """A dead letter is, or was, among `records`."""
    notes: dict[int, int] = field(default_factory=dict)
    """The notes of other starts (`starts.py`) that are committed with the offset behind this record."""
    sent_at: float | None = None
    """Seconds of the monotonic clock; None unless SENT."""
    overdue: bool = False
    """The late acknowledgement was logged."""
    state: State = State.WAITING

    @property
    def partition(self) -> Partition:
        return (self.record.topic, self.record.partition)

    @property
    def place(self) -> dict[str, str | int | None]:
        """The fields of a log event that name the request: its image, and the place of its record."""
        return {"image_path": self.sender.image_path, **self.record.place}

    @property
    def dropped(self) -> bool:
        return self.state is State.DROPPED

    @property
    def unstarted(self) -> bool:
        """Nothing is lost by leaving the job to another worker: no encode has begun and no result is known."""
        return self.state in (State.WAITING, State.NOTING, State.SUBMITTED) and not self.encoding

    @property
    def begun(self) -> bool:
        """An attempt is under way, or about to begin."""
        return self.state in (State.NOTING, State.SUBMITTED)

    @property
    def retrying(self) -> bool:
        """The job waits for another attempt."""
        return self.state is State.WAITING and self.attempts > 0

    @property
    def suspect(self) -> bool:
        """The request was in a worker that crashed, so it runs alone: if it crashes this one too, no other is suspected."""
        return self.crashes > 0

    @property
    def counted_attempts(self) -> int:
        """Count of attempts for KAFKA_MAX_RETRIES."""
        return self.attempts - self.forgiven

    def note(self) -> None:
        """Wait until the broker has the note of this start."""
        self._enter(State.NOTING)

    def begin(self) -> None:
        """Start an attempt."""
        self._enter(State.SUBMITTED)
        self.attempts += 1

    def wait(self, until: float) -> None:
        """Wait for the next attempt, after one that failed; `until` is in seconds of the monotonic clock."""
        self._enter(State.WAITING)
        self.encoding = False
        self.due_at = until

    def forgive(self) -> None:
        """Begin to count the attempts anew, because the machine was at fault, and let the next one begin at once."""
        self.forgiven = self.attempts
        self.due_at = 0.0

    def finish(self, result: SuccessResponse | RequestError, records: tuple[Outgoing, ...], *, dead_lettered: bool) -> None:
        """Take the final result and the records that report it; also instead of records that were refused."""
        self.resend()
        self.result, self.records, self.dead_lettered = result, records, dead_lettered

    def sent(self, now: float) -> None:
        """Note that the records were handed to the publisher; `now` is in seconds of the monotonic clock."""
        self._enter(State.SENT)
        self.sent_at = now

    def resend(self) -> None:
        """Have the records published when it is the job's turn, perhaps once more."""
        self._enter(State.FINISHED)
        self.sent_at = None

    def acknowledged(self) -> None:
        """Note that the broker acknowledged all records."""
        self._enter(State.ACKNOWLEDGED)

    def drop(self) -> None:
        """Leave the request to another worker."""
        self._enter(State.DROPPED)

    def _enter(self, state: State) -> None:
        assert state in _LEADS_TO[self.state], f"a job that is {self.state.name} cannot become {state.name}"
        self.state = state
        if not _LEADS_TO[state] and self.held is not None:
            self.held.close()
