"""The decision about a job after each event: publish a response, publish a dead letter, try again later, or stop.

The functions are pure: they read no clock, draw no random number and change nothing. `work.py` carries them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from confluent_kafka import KafkaError

from config import Settings
from errors import DeviceLost, KafkaFailed, MessageUnusable, RequestCrashesWorker, RequestError, ResponseRefused
from latent_encoder.kafka.connection import kafka_failed
from latent_encoder.kafka.jobs import RecordJob
from latent_encoder.kafka.records import Outgoing, RefusedRecord, dead_letter, response_record, smaller
from models import ErrorResponse, Response, ResponseMessage, SuccessResponse

MAX_BACKOFF_S = 60.0
"""Longest wait for an attempt: a volume that comes back is noticed within a minute."""

JITTER = 0.25
"""Largest relative deviation from a wait, so that workers that failed together do not try again together."""

RESEND_AFTER_S = 1.0
"""Wait before publishing on a topic that is gone: an operator creates it by hand, and one call a second is cheap."""

TOPIC_GONE = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION}
"""Errors of a broker that lost a topic, or got it back a moment ago."""

TOO_LARGE = {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE}
"""Errors of a record that is over the limit of its topic, or of the topic's segments."""

REFUSED_RECORD = TOO_LARGE | {KafkaError.INVALID_RECORD, KafkaError.INVALID_MSG, KafkaError._INVALID_ARG, KafkaError._BAD_MSG}
"""Errors that concern one record: its size, or bytes that cannot be produced."""


@dataclass(frozen=True)
class Retry:
    """Submit the job again after a wait."""

    after_s: float


@dataclass(frozen=True)
class Finish:
    """Publish these records when it is the job's turn."""

    result: SuccessResponse | RequestError
    records: tuple[Outgoing, ...]
    dead_lettered: bool = False


@dataclass(frozen=True)
class Replace:
    """Publish these records instead of the refused ones, after a wait."""

    finish: Finish
    after_s: float = RESEND_AFTER_S


@dataclass(frozen=True)
class Stop:
    """Stop the worker with the offset uncommitted; another worker gets the request."""

    reason: KafkaFailed


Decision = Retry | Finish | Replace | Stop


def after_success(job: RecordJob, response: SuccessResponse, settings: Settings, now: datetime) -> Finish:
    """Decide about a job whose files are written."""
    return Finish(response, (_response(job, response, settings, now),))


@dataclass(frozen=True)
class Failure:
    """A failed attempt, or a record without a valid request."""

    error: RequestError
    moment: datetime
    jitter: float
    """A factor between 1 - JITTER and 1 + JITTER for the wait."""
    accuses_machine: bool = False
    """The machine may be at fault, so another attempt can help."""
    machine_broken: bool = False
    """The breaker is open, so a failure that accuses the machine does not count."""


def after_failure(job: RecordJob, failure: Failure, settings: Settings) -> Retry | Finish | Stop:
    """Decide about a job whose attempt failed, or whose record holds no valid request.

    A lost device stops the worker. A retryable error gets KAFKA_MAX_RETRIES further attempts, and any number while the machine
    is broken. Any other error is final. A final error becomes an error response if the request has an id, and a dead letter if
    another attempt could have helped, or if the message is unusable or crashes workers.
    """
    error, now = failure.error, failure.moment
    if isinstance(error, DeviceLost):
        return Stop(KafkaFailed(f"{error}."))
    retryable = error.retryable or failure.accuses_machine
    uncounted = failure.accuses_machine and failure.machine_broken
    if retryable and (uncounted or job.counted_attempts <= settings.kafka_max_retries):
        return Retry(backoff_s(job.counted_attempts, settings) * failure.jitter)
    records: tuple[Outgoing, ...] = ()
    if job.sender.request_id is not None:
        response = ErrorResponse.of(error, job.sender.request_id, now)
        records += (_response(job, response, settings, now),)
    dead_lettered = retryable or isinstance(error, MessageUnusable | RequestCrashesWorker)
    if dead_lettered:
        records += (dead_letter(job.record, error, job.attempts, settings),)
    return Finish(error, records, dead_lettered)


def backoff_s(attempts: int, settings: Settings) -> float:
    """Return the seconds to wait after that many attempts: KAFKA_RETRY_BACKOFF_S, doubled after each further one."""
    doubled = min(max(attempts, 1) - 1, 64)  # 2**64 s is longer than any wait, and a float has room for it
    return min(settings.kafka_retry_backoff_s * 2.0**doubled, MAX_BACKOFF_S)


def after_refusal(
    job: RecordJob, refused: Sequence[RefusedRecord], undelivered: tuple[Outgoing, ...], settings: Settings
) -> Replace | Stop:
    """Decide about a job some of whose records the broker refused; `undelivered` are those not acknowledged yet.

    A topic that is gone may come back. A response that its topic refuses for its size or content becomes a dead letter, and
    a dead letter is published without its largest part. Every other refusal stops the worker, because the record would be
    lost.
    """
    assert job.result is not None, "only a finished job is published"
    finish = Finish(job.result, undelivered, job.dead_lettered)
    for record, error in refused:
        is_response = record.topic == settings.kafka_response_topic
        if error.code() in TOPIC_GONE:
            continue
        instead = None if is_response else smaller(record)
        if error.code() not in REFUSED_RECORD or not (is_response or instead):
            kind = "response" if is_response else "dead letter"
            return Stop(kafka_failed(f"Topic {record.topic} refused a {kind}", error))
        if instead is None:
            finish = _instead_of_response(job, finish, record, error, settings)
        else:
            finish = replace(finish, records=tuple(instead if other is record else other for other in finish.records))
    return Replace(finish)


def _instead_of_response(
    job: RecordJob, finish: Finish, response: Outgoing, refusal: KafkaError, settings: Settings
) -> Finish:
    """Replace a response that its topic refuses by a dead letter, unless the job has one."""
    advice = " Raise its max.message.bytes." if refusal.code() in TOO_LARGE else ""
    error = ResponseRefused(f"Topic {response.topic} refused the response: {refusal.str()}.{advice}")
    others = tuple(record for record in finish.records if record is not response)
    instead = () if finish.dead_lettered else (dead_letter(job.record, error, job.attempts, settings),)
    return Finish(error, others + instead, dead_lettered=True)


def if_overdue(job: RecordJob, settings: Settings) -> Stop | None:
    """Decide about a job that the broker, which is reachable, does not acknowledge in time.

    A dead letter stops the worker: nothing else tells a person about the request. A response goes on waiting.
    """
    if not job.dead_lettered:
        return None
    return Stop(KafkaFailed(f"{late(settings)} for a dead letter in topic {settings.kafka_dlq_topic}."))


def late(settings: Settings) -> str:
    """Return the reason to report about an overdue job."""
    return f"No acknowledgement within KAFKA_ACK_TIMEOUT_S={settings.kafka_ack_timeout_s:g}"


def _response(job: RecordJob, response: Response, settings: Settings, now: datetime) -> Outgoing:
    message = ResponseMessage.of(response, job.sender.correlation_id, now)
    return response_record(job.record, message, settings.kafka_response_topic)
