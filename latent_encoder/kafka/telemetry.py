"""What is told of a request in Kafka mode, when it is taken and when it ended: one log event, metrics, and a span."""

from __future__ import annotations

import time
from typing import Any

from config import Settings
from latent_encoder.kafka.lanes import Job
from latent_encoder.kafka.records import sender_of
from latent_encoder.telemetry import tracing
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.telemetry.metrics import DEAD_LETTERS, QUEUE_SECONDS, REDELIVERIES, REQUEST_SECONDS, REQUESTS
from models import SuccessResponse

log = get_logger("latent_encoder.kafka")


def taken(job: Job, settings: Settings) -> None:
    """The request came from its topic; begin its span.

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


def answered(job: Job, settings: Settings) -> None:
    """The broker acknowledged its answer, its dead letter, or both."""
    outcome = job.outcome
    assert outcome is not None, "what is answered has an outcome"
    sender = job.request or sender_of(job.record, settings.kafka_max_message_bytes)
    seconds = time.monotonic() - job.taken_at
    event: dict[str, Any] = {"request_id": sender.request_id, "correlation_id": sender.correlation_id}
    if isinstance(outcome, SuccessResponse):
        error, code = None, ""
        event |= {"outcome": "success", "redelivered": job.redelivered, "latent": outcome.latent_file_path}
        if not job.redelivered:  # else they are those of the first time
            event |= outcome.metadata.timings_ms.model_dump()
    else:
        error, code = outcome, outcome.code.value
        event |= {"outcome": "error", "error_code": code, "reason": str(outcome), "dead_lettered": job.dead_lettered}
    log.info("request answered", **event, attempts=job.attempts, seconds=round(seconds, 3), **job.record.place)
    REQUESTS.labels(event["outcome"], code).inc()
    REQUEST_SECONDS.observe(seconds)
    if job.dead_lettered:
        DEAD_LETTERS.labels(code).inc()
    if job.redelivered:
        REDELIVERIES.inc()
    tracing.end(job.span, error)


def dropped(job: Job) -> None:
    """Its partition went to another worker, or this one ends: it is delivered again."""
    REQUESTS.labels("dropped", "").inc()
    tracing.end(job.span, None)
