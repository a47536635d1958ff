"""The telemetry of Kafka mode: one log event, metrics and a span for each request, and the consumer's lag."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prometheus_client import Gauge

from config import Settings
from latent_encoder.kafka.decisions import TOPIC_GONE
from latent_encoder.kafka.jobs import Partition, RecordJob
from latent_encoder.kafka.lanes import Lanes
from latent_encoder.kafka.positions import Reading
from latent_encoder.kafka.records import RefusedRecord
from latent_encoder.telemetry import tracing
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.telemetry.metrics import (
    CONSUMER_LAG,
    DEAD_LETTERS,
    IMAGE_NOTES,
    OLDEST_REQUEST,
    QUEUE_SECONDS,
    REDELIVERIES,
    REQUEST_SECONDS,
    REQUESTS,
)
from models import SuccessResponse

log = get_logger("latent_encoder.kafka")


def taken(job: RecordJob, settings: Settings) -> None:
    """Report that a request was taken from its topic, and begin its span.

    The span's attributes: https://opentelemetry.io/docs/specs/semconv/messaging/kafka
    """
    record = job.record
    if record.timestamp is not None:
        QUEUE_SECONDS.observe(max(0.0, time.time() - record.timestamp / 1000))
    attributes: dict[str, str | int] = {
        "messaging.system": "kafka",
        "messaging.operation.type": "process",
        "messaging.operation.name": "process",
        "messaging.consumer.group.name": settings.kafka_consumer_group,
        "messaging.destination.name": record.topic,
        "messaging.destination.partition.id": str(record.partition),
        "messaging.kafka.offset": record.offset,
    }
    job.span = tracing.begin(f"process {record.topic}", record.headers, attributes)


def acknowledged(job: RecordJob) -> None:
    """Report that the broker acknowledged the response, the dead letter, or both."""
    result = job.result
    assert result is not None, "an acknowledged job has a result"
    seconds = time.monotonic() - job.taken_at
    event: dict[str, Any] = {"request_id": job.sender.request_id, "correlation_id": job.sender.correlation_id}
    if isinstance(result, SuccessResponse):
        error, code = None, ""
        event |= {"outcome": "success", "redelivered": job.redelivered, "latent": result.latent_file_path}
        if not job.redelivered:  # the timings in a stored response are those of the first time
            event |= result.metadata.timings_ms.model_dump()
            for note in result.metadata.image_notes:
                IMAGE_NOTES.labels(note).inc()
    else:
        error, code = result, result.code.value
        event |= {"outcome": "error", "error_code": code, "reason": str(result), "dead_lettered": job.dead_lettered}
    log.info("request answered", **event, attempts=job.attempts, seconds=round(seconds, 3), **job.place)
    REQUESTS.labels(event["outcome"], code).inc()
    REQUEST_SECONDS.observe(seconds)
    if job.dead_lettered:
        DEAD_LETTERS.labels(code).inc()
    if job.redelivered:
        REDELIVERIES.inc()
    tracing.end(job.span, error)


def refused(job: RecordJob, records: Sequence[RefusedRecord], settings: Settings) -> None:
    """Log each record of a job that the broker refused, with the reason."""
    for record, error in records:
        if error.code() in TOPIC_GONE:
            log.error("topic is gone, waiting for it", gone=record.topic, reason=error.str(), **job.place)
        else:
            event = "response refused" if record.topic == settings.kafka_response_topic else "dead letter refused"
            log.error(event, refused_by=record.topic, reason=error.str(), **job.place)


def dropped(job: RecordJob) -> None:
    """Report that a request was left to another worker."""
    REQUESTS.labels("dropped", "").inc()
    tracing.end(job.span, None)


class Backlog:
    """The metrics of the requests without a response in this worker's partitions, those in flight included."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """`now` returns seconds of a clock that never goes back."""
        self._now = now
        self._waiting: dict[Partition, tuple[int, float]] = {}
        """The position of each partition with unread records, and the time at which the worker got there."""

    def observe(self, readings: Mapping[Partition, Reading], lanes: Lanes) -> None:
        """Set the metrics of these partitions, and remove those of all others."""
        before = self._waiting
        self._waiting = {}
        for gauge in (CONSUMER_LAG, OLDEST_REQUEST):
            for labels in _shown(gauge) - {(topic, str(number)) for topic, number in readings}:
                gauge.remove(*labels)
        for place, reading in readings.items():
            if reading.unread:
                known = before.get(place)
                self._waiting[place] = (
                    known if known is not None and known[0] == reading.position else (reading.position, self._now())
                )
            held = list(lanes.jobs([place]))
            CONSUMER_LAG.labels(*place).set(reading.unread + len(held))
            OLDEST_REQUEST.labels(*place).set(self._age(place, held))

    def _age(self, place: Partition, held: Sequence[RecordJob]) -> float:
        """Return the age of the oldest request. The timestamp of a record that was not read yet is not known."""
        if held:
            timestamp = held[0].record.timestamp
            return self._now() - held[0].taken_at if timestamp is None else max(0.0, time.time() - timestamp / 1000)
        return self._now() - self._waiting[place][1] if place in self._waiting else 0.0


def _shown(gauge: Gauge) -> set[tuple[str, ...]]:
    samples = (sample for family in gauge.collect() for sample in family.samples)
    return {(sample.labels["topic"], sample.labels["partition"]) for sample in samples}
