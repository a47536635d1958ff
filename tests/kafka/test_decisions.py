"""The decision about a job after each event, without a broker."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from confluent_kafka import KafkaError
from hypothesis import given
from hypothesis import strategies as st

from config import Settings
from errors import (
    ErrorCode,
    ImageNotFound,
    InvalidRequest,
    MessageUnusable,
    OutputDirNotWritable,
    RequestCrashesWorker,
    RequestError,
    ResponseRefused,
)
from latent_encoder.kafka.decisions import (
    JITTER,
    MAX_BACKOFF_S,
    Failure,
    Finish,
    Replace,
    Retry,
    Stop,
    after_failure,
    after_refusal,
    backoff_s,
    if_overdue,
)
from latent_encoder.kafka.jobs import RecordJob
from latent_encoder.kafka.letters import Letter
from latent_encoder.kafka.records import (
    ATTEMPTS,
    ERROR_CODE,
    Incoming,
    Outgoing,
    dead_letter,
    omitted,
    sender_of,
    smaller,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
RECORD = Incoming("requests", 2, 7, None, b"key", b'{"request_id": "r1", "image_path": "a.png"}', (("trace", b"1"),))
SETTINGS = Settings(
    _env_file=None,
    kafka_response_topic="responses",
    kafka_dlq_topic="dlq",
    kafka_max_retries=2,
    kafka_retry_backoff_s=0.5,
)


def job(attempts: int = 1, value: bytes | None = RECORD.value) -> RecordJob:
    record = replace(RECORD, value=value)
    return RecordJob(record, sender=sender_of(record, SETTINGS.kafka_max_message_bytes), attempts=attempts)


def finished(decision: object) -> Finish:
    assert isinstance(decision, Finish)
    return decision


def failed(error: RequestError, attempts: int = 1, value: bytes | None = RECORD.value, jitter: float = 1.0) -> Any:
    return after_failure(job(attempts, value), Failure(error, NOW, jitter), SETTINGS)


def by_topic(finish: Finish) -> dict[str, Outgoing]:
    return {record.topic: record for record in finish.records}


def topics(finish: Finish) -> list[str]:
    return sorted(record.topic for record in finish.records)


@pytest.mark.parametrize(("attempts", "seconds"), [(1, 0.5), (2, 1.0)])
def test_retryable_error_is_tried_again_later(attempts: int, seconds: float) -> None:
    """The wait doubles with each attempt."""
    assert failed(OutputDirNotWritable("Full."), attempts) == Retry(seconds)


def test_last_attempt_ends_in_a_response_and_a_dead_letter() -> None:
    """After KAFKA_MAX_RETRIES further attempts there is no other; the dead letter has their count."""
    finish = finished(failed(OutputDirNotWritable("Full."), attempts=3))
    records = by_topic(finish)
    assert topics(finish) == ["dlq", "responses"]
    assert finish.dead_lettered
    response = json.loads(records["responses"].value or b"")
    assert (response["request_id"], response["error_code"]) == ("r1", "OUTPUT_DIR_NOT_WRITABLE")
    headers = dict(records["dlq"].headers)
    assert (headers[ERROR_CODE], headers[ATTEMPTS], headers["trace"]) == (b"OUTPUT_DIR_NOT_WRITABLE", b"3", b"1")
    assert (records["dlq"].key, records["dlq"].value) == (RECORD.key, RECORD.value)


@pytest.mark.parametrize("error", [ImageNotFound("No file."), InvalidRequest("No image_path.")])
def test_fault_of_the_request_is_a_response_alone(error: RequestError) -> None:
    """Trying again would not help, and the sender learns of it."""
    finish = finished(failed(error, attempts=1))
    assert (topics(finish), finish.dead_lettered, finish.result) == (["responses"], False, error)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"no JSON", ["dlq"]),
        (None, ["dlq"]),
        (b'{"request_id": "r1", "image_path": ', ["dlq", "responses"]),
        (b'{"request_id": "r1", "request_id": "r2", ', ["dlq"]),
    ],
)
def test_unusable_message_is_a_dead_letter(value: bytes | None, expected: list[str]) -> None:
    """It gets a response too if exactly one request id can be found in it."""
    finish = finished(failed(MessageUnusable("No JSON object."), attempts=0, value=value))
    assert (topics(finish), finish.dead_lettered) == (expected, True)


@given(st.integers(1, 10_000), st.floats(0, 1e6), st.floats(1 - JITTER, 1 + JITTER))
def test_wait_is_bounded_and_never_shrinks(attempts: int, base: float, jitter: float) -> None:
    """No count of attempts makes a wait longer than the limit and its jitter, or shorter than the wait before."""
    settings = SETTINGS.model_copy(update={"kafka_retry_backoff_s": base, "kafka_max_retries": attempts})
    decision = after_failure(job(attempts), Failure(OutputDirNotWritable("Full."), NOW, jitter), settings)
    assert isinstance(decision, Retry)
    assert 0 <= decision.after_s <= MAX_BACKOFF_S * (1 + JITTER)
    assert backoff_s(attempts, settings) <= backoff_s(attempts + 1, settings)


def sent(*, dead_lettered: bool = False, response: bool = True) -> RecordJob:
    """Return a job whose records are published."""
    sent = job(attempts=3)
    records = (Outgoing("responses", b"key", b"{}", ()),) * response + (Outgoing("dlq", b"key", b"{}", ()),) * dead_lettered
    sent.finish(
        OutputDirNotWritable("Full.") if dead_lettered else ImageNotFound("No file."), records, dead_lettered=dead_lettered
    )
    sent.sent(0.0)
    return sent


def refusal(job: RecordJob, topic: str, code: int) -> tuple[Outgoing, KafkaError]:
    (record,) = (record for record in job.records if record.topic == topic)
    return record, KafkaError(code)


@pytest.mark.parametrize("topic", ["responses", "dlq"])
def test_topic_that_is_gone_may_come_back(topic: str) -> None:
    """The undelivered records are published again later, as they are."""
    published = sent(dead_lettered=True)
    refused = refusal(published, topic, KafkaError.UNKNOWN_TOPIC_OR_PART)
    decision = after_refusal(published, [refused], (refused[0],), SETTINGS)
    assert isinstance(decision, Replace)
    assert decision.after_s > 0
    assert (decision.finish.records, decision.finish.result) == ((refused[0],), published.result)


@pytest.mark.parametrize("dead_lettered", [False, True])
def test_response_that_is_too_large_becomes_a_dead_letter(dead_lettered: bool) -> None:
    """There is one dead letter for a request, also if the failure has made one before."""
    published = sent(dead_lettered=dead_lettered)
    refused = refusal(published, "responses", KafkaError.MSG_SIZE_TOO_LARGE)
    decision = after_refusal(published, [refused], published.records, SETTINGS)
    assert isinstance(decision, Replace)
    assert topics(decision.finish) == ["dlq"]
    assert decision.finish.dead_lettered
    assert isinstance(decision.finish.result, ResponseRefused)


def test_dead_letter_that_is_too_large_loses_its_parts_one_by_one() -> None:
    """The largest goes first; a dead letter that has nothing left to lose stops the worker."""
    published = job(attempts=3)
    letter = dead_letter(published.record, OutputDirNotWritable("Full."), 3, SETTINGS)
    lost: list[str] = []
    while True:
        published.finish(OutputDirNotWritable("Full."), (letter,), dead_lettered=True)
        published.sent(0.0)
        decision = after_refusal(published, [(letter, KafkaError(KafkaError.MSG_SIZE_TOO_LARGE))], (letter,), SETTINGS)
        if isinstance(decision, Stop):
            break
        (letter,) = decision.finish.records
        lost.append(letter.headers[-1][0])
    assert lost == ["dlq.value.omitted", "dlq.headers.omitted", "dlq.key.omitted"]
    assert (letter.key, letter.value, letter.headers[0][0]) == (None, None, ERROR_CODE)
    assert "refused a dead letter" in str(decision.reason)


def test_dead_letter_of_a_dead_letter_is_its_own() -> None:
    """Headers of an earlier dead letter, which lacked its value, do not make the new one lack it."""
    earlier = smaller(dead_letter(RECORD, OutputDirNotWritable("Full."), 3, SETTINGS))
    assert earlier is not None
    record = replace(RECORD, headers=earlier.headers, offset=9)
    letter = dead_letter(record, MessageUnusable("No JSON."), 0, SETTINGS)
    consumed = replace(record, value=letter.value, headers=letter.headers)
    assert omitted(consumed) == {}
    again = Letter.of(consumed, SETTINGS)
    assert again is not None
    assert again.is_whole
    sent_back = again.revived()
    assert (sent_back.value, sent_back.headers[: len(RECORD.headers)]) == (RECORD.value, RECORD.headers)


@pytest.mark.parametrize(
    ("topic", "code", "kind"),
    [
        ("dlq", KafkaError.TOPIC_AUTHORIZATION_FAILED, "dead letter"),
        ("responses", KafkaError.TOPIC_AUTHORIZATION_FAILED, "response"),
    ],
)
def test_any_other_refusal_stops_the_worker(topic: str, code: int, kind: str) -> None:
    """A record that could neither be delivered nor replaced would be lost."""
    published = sent(dead_lettered=True)
    refused = refusal(published, topic, code)
    decision = after_refusal(published, [refused], (refused[0],), SETTINGS)
    assert isinstance(decision, Stop)
    assert f"Topic {topic} refused a {kind}: " in str(decision.reason)


def test_overdue_dead_letter_stops_the_worker_and_an_overdue_response_does_not() -> None:
    """A sender notices a missing response; nobody would notice a missing dead letter."""
    assert if_overdue(sent(), SETTINGS) is None
    stop = if_overdue(sent(dead_lettered=True), SETTINGS)
    assert stop is not None
    assert "for a dead letter in topic dlq" in str(stop.reason)


def test_every_error_class_has_a_decision() -> None:
    """Whatever fails, a request with an id gets a response, and every retryable error a dead letter in the end."""
    classes = {cls.code: cls for cls in RequestError.__subclasses__() if hasattr(cls, "code")}
    assert len(classes) > 10
    assert set(classes) <= set(ErrorCode)
    for cls in classes.values():
        finish = finished(failed(cls("It failed."), attempts=3))
        assert topics(finish) == (["dlq", "responses"] if finish.dead_lettered else ["responses"])
        assert finish.dead_lettered == (cls.retryable or issubclass(cls, MessageUnusable | RequestCrashesWorker))
