"""The way of each request through a worker: taken, begun, encoded or failed, decided about, published, acknowledged.

It is a state machine for the thread that polls. It hands out the jobs to encode and the jobs to publish, and takes the events
about them. Apart from the notes of starts, it never calls a client, and never a stage.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial

from config import Settings
from errors import DeviceLost, KafkaFailed, RequestError, as_request_error
from latent_encoder.cpus import prefetch
from latent_encoder.kafka import decisions, telemetry
from latent_encoder.kafka.breaker import Breaker, accused
from latent_encoder.kafka.decisions import Decision, Failure, Finish, Replace, Retry, Stop
from latent_encoder.kafka.jobs import RecordJob, State
from latent_encoder.kafka.lanes import Lanes
from latent_encoder.kafka.records import Outgoing, RefusedRecord, Sender, read_request, sender_of
from latent_encoder.kafka.schedule import to_begin
from latent_encoder.kafka.starts import Starts
from latent_encoder.kafka.timers import Timers
from latent_encoder.telemetry.health import Health
from latent_encoder.telemetry.logs import get_logger, log_failure
from latent_encoder.telemetry.metrics import RETRIES
from models import SuccessResponse

log = get_logger("latent_encoder.kafka")


class Work:
    """The jobs that a worker holds. Times are seconds of the monotonic clock."""

    def __init__(
        self,
        settings: Settings,
        clock: Callable[[], datetime],
        starts: Starts,
        health: Health,
        stop_because: Callable[[KafkaFailed], None],
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._starts = starts
        self._prefetch = prefetch(settings)
        self._health = health
        self._stop_because = stop_because
        self._breaker = Breaker(settings)
        self._vaes: set[str] = set()
        """Names of the VAEs that have encoded here."""
        self.lanes = Lanes(self._dropped)
        self.timers = Timers()
        self.stopping = False
        """No attempt begins any more. A signal handler may set it."""

    @property
    def machine_fault(self) -> str | None:
        """The part of the machine that is broken, so that no requests are taken; None if all is well."""
        return self._breaker.fault

    @property
    def full(self) -> bool:
        """No further request may be taken."""
        return (
            self.stopping
            or self.lanes.in_hand >= self._prefetch
            or not self._breaker.takes(list(self.lanes.jobs()), time.monotonic())
        )

    # A record comes, and its attempts begin and end.

    def take(self, job: RecordJob) -> None:
        """Begin the job of a record, or decide about it at once if it holds no valid request."""
        telemetry.taken(job, self._settings)
        self.lanes.add(job)
        self._starts.taken(job)
        try:
            job.request = read_request(job.record, self._settings)
        except RequestError as exc:
            job.sender = sender_of(job.record, self._settings.kafka_max_message_bytes)
            self._failed(job, exc)
        else:
            job.sender = Sender(job.request.request_id, job.request.correlation_id, job.request.image_path)

    def begin(self) -> list[RecordJob]:
        """Begin attempts of the jobs whose turn it is; return those to encode: the broker has the notes of their starts."""
        jobs = sorted(self.lanes.jobs(), key=lambda job: job.taken_at)
        for job in self._due(jobs, time.monotonic()):
            job.note()
            if not job.condemned:
                self._starts.begin(job)
        self._starts.commit(self.lanes.sending)
        begun = [job for job in jobs if job.state is State.NOTING and (job.condemned or self._starts.noted(job))]
        for job in begun:
            job.begin()
        return begun

    def _due(self, jobs: Sequence[RecordJob], now: float) -> Sequence[RecordJob]:
        if self.stopping:
            return ()
        if self._breaker.fault is not None:
            return self._breaker.to_try(jobs, now)
        return to_begin(jobs, self._prefetch, now)

    def encoded(self, job: RecordJob, result: SuccessResponse | BaseException) -> None:
        """Take the result of an attempt from the stages."""
        if job.dropped:
            return
        if isinstance(result, BaseException):
            self._failed(job, as_request_error(result))
            return
        if not job.redelivered:  # a stored response says nothing about the machine
            self._machine_works(result)
        self._carry_out(job, decisions.after_success(job, result, self._settings, self._clock()))

    def _machine_works(self, response: SuccessResponse) -> None:
        self._vaes.add(response.metadata.vae_model_name)
        if self._breaker.succeeded():
            for job in self.lanes.jobs():
                job.forgive()

    def _failed(self, job: RecordJob, error: RequestError) -> None:
        log_failure(error, request_id=job.sender.request_id, attempt=job.attempts, **job.place)
        job.blamed = isinstance(error, DeviceLost)
        fault = accused(error, job, self._settings, self._vaes)
        certain = error.storage_fault is not None and error.storage_fault.certain
        self._breaker.failed(job, fault, time.monotonic(), certain=certain)
        failure = Failure(
            error,
            self._clock(),
            random.uniform(1 - decisions.JITTER, 1 + decisions.JITTER),  # noqa: S311  # nothing secret depends on it
            accuses_machine=fault is not None,
            machine_broken=self._breaker.fault is not None,
        )
        self._carry_out(job, decisions.after_failure(job, failure, self._settings))

    def _carry_out(self, job: RecordJob, decision: Decision) -> None:
        match decision:
            case Finish(result, records, dead_lettered):
                job.finish(result, records, dead_lettered=dead_lettered)
            case Retry(after_s):
                job.wait(time.monotonic() + after_s)
                self._starts.end(job)
                RETRIES.inc()
                if self.stopping:
                    self.lanes.drop_unstarted()
            case Replace(finish, after_s):
                self._later(after_s, job, partial(self._carry_out, job, finish))
            case Stop(reason):
                self._stop_because(reason)

    def _later(self, seconds: float, job: RecordJob, call: Callable[[], None]) -> None:
        """Make a call about a job after a while, unless the job is dropped by then."""
        self.timers.after(seconds, lambda: None if job.dropped else call())

    # Its records are published.

    def publish(self) -> list[RecordJob]:
        """Return the jobs whose turn it is to be published."""
        ready = [job for job in self.lanes.ready() if not self._starts.committing(job.partition)]
        for job in ready:
            job.sent(time.monotonic())
        return ready

    def acknowledged(self, job: RecordJob) -> None:
        """Take the broker's acknowledgement of all records of a job."""
        if not job.dropped:
            self.lanes.acknowledged(job)
            self._starts.acknowledged(job)
            telemetry.acknowledged(job)

    def refused(self, job: RecordJob, refused: Sequence[RefusedRecord], undelivered: tuple[Outgoing, ...]) -> None:
        """Take the broker's refusal of some records; `undelivered` are all that it has not acknowledged."""
        if not job.dropped:
            telemetry.refused(job, refused, self._settings)
            self._carry_out(job, decisions.after_refusal(job, refused, undelivered, self._settings))

    def aborted(self, job: RecordJob) -> None:
        """Take the end of a transaction in which nothing was published."""
        if not job.dropped:
            self._later(decisions.RESEND_AFTER_S, job, job.resend)

    def check_overdue(self) -> None:
        """Look for jobs that a reachable broker does not acknowledge in time, for example because its disk is full."""
        for job in self.lanes.sent_before(time.monotonic() - self._settings.kafka_ack_timeout_s):
            stop = decisions.if_overdue(job, self._settings)
            if stop is not None:
                self._stop_because(stop.reason)
            elif not job.overdue:
                log.error("response is not acknowledged", reason=decisions.late(self._settings), **job.place)
                job.overdue = True

    # Jobs that end otherwise.

    def orphan(self) -> None:
        """Note that the topic of all records is gone: the requests get their responses, and no offset is committed."""
        for job in self.lanes.jobs():
            job.orphaned = True

    def _dropped(self, job: RecordJob) -> None:
        """Note that a job is left to another worker, which is no crash unless a step hangs or the job lost the device."""
        telemetry.dropped(job)
        if not job.blamed and not self._health.hangs:
            self._starts.end(job)
