"""The telemetry of Kafka mode: one log event, metrics and a span for each request, and the consumer's lag."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from config import Settings
from latent_encoder.kafka.decisions import TOPIC_GONE
from latent_encoder.kafka.jobs import Partition, RecordJob
from latent_encoder.kafka.records import RefusedRecord
from latent_encoder.telemetry import tracing
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.telemetry.metrics import (
    CONSUMER_LAG,
    DEAD_LETTERS,
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
    else:
        error, code = result, result.code.value
        event |= {"outcome": "error", "error_code": code, "reason": str(result), "dead_lettered": job.dead_lettered}
    log.info("request answered", **event, attempts=job.attempts, seconds=round(seconds, 3), **job.record.place)
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
            log.error("topic is gone, waiting for it", gone=record.topic, reason=error.str(), **job.record.place)
        else:
            event = "response refused" if record.topic == settings.kafka_response_topic else "dead letter refused"
            log.error(event, refused_by=record.topic, reason=error.str(), **job.record.place)


def dropped(job: RecordJob) -> None:
    """Report that a request was left to another worker."""
    REQUESTS.labels("dropped", "").inc()
    tracing.end(job.span, None)


class ConsumerLag:
    """The count of records that wait in this worker's partitions, those in flight included.

    librdkafka's own `consumer_lag` is unknown before the first commit, and always if transactions commit the offsets.
    So the offsets behind the last acknowledged jobs count too.
    """

    def __init__(self) -> None:
        self._next_offsets: dict[Partition, int] = {}

    def acknowledged(self, job: RecordJob) -> None:
        """Count a job, and all before it in its partition, as done."""
        self._next_offsets[job.partition] = job.record.offset + 1

    def observe(self, topics: Mapping[str, Any]) -> None:
        """Set the metric from the `topics` of librdkafka's statistics.

        The fields: https://github.com/confluentinc/librdkafka/blob/master/STATISTICS.md
        """
        lags = {
            (name, number): partition["ls_offset"] - self._done((name, int(number)), partition)
            for name, topic in topics.items()
            for number, partition in topic["partitions"].items()
            if partition["fetch_state"] == "active" and partition["ls_offset"] >= 0  # else not ours, or not known yet
        }
        shown = {
            (sample.labels["topic"], sample.labels["partition"])
            for family in CONSUMER_LAG.collect()
            for sample in family.samples
        }
        for place in shown - lags.keys():
            CONSUMER_LAG.remove(*place)
        for place, lag in lags.items():
            CONSUMER_LAG.labels(*place).set(lag)

    def _done(self, place: Partition, partition: Mapping[str, int]) -> int:
        """Return the offset behind the last done record; never past the end of the partition."""
        done = max(partition["lo_offset"], partition["committed_offset"], self._next_offsets.get(place, 0))
        return min(done, partition["ls_offset"])
