"""Kafka mode: requests come from a topic, and each ends in an acknowledged answer before its offset is committed.

One thread, the one that calls `KafkaHandler.run`, polls the consumer without ever waiting for an encode: however long that
takes, the group keeps this worker. It owns all that is said here; `Stages` and a publisher work beside it and put what
they have to say into its queue.
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
import time
from collections.abc import Callable, Collection
from datetime import datetime
from functools import partial
from queue import Empty, SimpleQueue

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from config import VERSION, Settings
from errors import KafkaFailed, MessageUnusable, RequestError, ResponseRefused, as_request_error
from latent_encoder.kafka import telemetry as kafka_telemetry
from latent_encoder.kafka.connection import Connection, failure, is_fatal
from latent_encoder.kafka.lanes import Job, Lanes, Partition
from latent_encoder.kafka.properties import consumer_properties, make_client, producer_properties
from latent_encoder.kafka.publishers import AnswerThenCommit, AnswerWithCommit, Publisher, Refusal, Reports
from latent_encoder.kafka.records import Incoming, Outgoing, dead_letter, read_request, response_record, sender_of
from latent_encoder.kafka.topics import create_topics, topics_of
from latent_encoder.stages import Stages
from latent_encoder.telemetry.health import Health
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.telemetry.metrics import IN_FLIGHT, INFO, REBALANCES, RETRIES, observe_lag
from models import ErrorResponse, Response, ResponseMessage, SuccessResponse
from service import LatentEncoder, log_failure, utc_now

log = get_logger("latent_encoder.kafka")

BUSY_POLL_S = 0.01  # how long an outcome may wait for the thread that polls
IDLE_POLL_S = 0.2  # how long a signal may
PAUSE_AFTER_S = 2.0  # librdkafka takes up to a second to fetch again after a pause: not worth it for short encodes
TOPICS_RETRY_S = 1.0
AGAIN_S = 1.0  # between attempts to commit, or to publish on a topic that is gone
MAX_BACKOFF_S = 60.0
JITTER = 0.25
DEFAULT_MAX_POLL_INTERVAL_MS = 300_000  # librdkafka's
# What a broker that lost a topic, or was given it back a moment ago, answers.
TOPIC_GONE = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION}

Timer = tuple[float, int, Callable[[], None]]


class KafkaHandler:
    """One worker of the consumer group. Make it, call `run`, and `stop` it from a signal handler or another thread."""

    def __init__(self, settings: Settings, clock: Callable[[], datetime] = utc_now) -> None:
        """Make the clients; they connect by themselves, and nothing is consumed yet.

        Raises:
            SettingsError: librdkafka refuses a property.
        """
        self._settings = settings
        self._clock = clock
        self.health = Health(settings.encode_timeout_s)
        self._connection = Connection(settings.kafka_bootstrap_servers)
        properties = consumer_properties(settings) | {
            "error_cb": self._connection.on_error,
            "stats_cb": self._on_statistics,
            "on_commit": self._on_commit,
        }
        max_poll_interval = float(properties.get("max.poll.interval.ms", DEFAULT_MAX_POLL_INTERVAL_MS)) / 1000
        self._revoke_timeout = min(settings.kafka_revoke_timeout_s, 0.8 * max_poll_interval)
        self._pause_after = min(PAUSE_AFTER_S, 0.25 * max_poll_interval)
        self._consumer = make_client(Consumer, properties, settings)

        self._lanes = Lanes(kafka_telemetry.dropped)
        self._answered_offsets: dict[Partition, int] = {}
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._timers: list[Timer] = []
        self._timer_numbers = itertools.count()
        self._paused = False
        self._full_since = 0.0
        self._group_fault: str | None = "not joined yet"
        self._ready = False
        self._stopping = False
        self._failure: KafkaFailed | None = None

        reports = Reports(
            answered=self._posted(self._answered),
            refused=self._posted(self._refused),
            again=self._posted(self._publish_again),
            failed=self._posted(self._fail),
        )
        publisher = AnswerWithCommit if settings.kafka_transactional_id else AnswerThenCommit
        self._publisher: Publisher = publisher(self._consumer, self._make_producer, reports)

    # The life of a worker.

    def run(self, encoder: LatentEncoder) -> bool:
        """Serve until `stop`. Tells whether all work in hand was finished then; what was not is delivered to another worker.

        Raises:
            KafkaFailed: the service cannot go on. What was not answered is not committed.
        """
        self._stages = Stages(encoder, self._posted(self._finished), self.health)
        self.health.needs([*self._stages.threads, *self._publisher.threads])
        self.health.ready_if("model", None)
        INFO.info({"version": VERSION, **encoder.versions})
        try:
            self._wait_for_topics()
            self._consumer.subscribe(
                [self._settings.kafka_request_topic],
                on_assign=self._on_assign,
                on_revoke=self._on_revoke,
                on_lost=self._on_lost,
            )
            while not self._stopping:
                self._tick()
            return self._finish()
        finally:
            self._lanes.drop()
            self._stages.close()
            self._publisher.close()
            self._consumer.close()
            log.info("stopped")

    def stop(self) -> None:
        """Take no new work, finish what is in hand, and end. Safe in a signal handler and from another thread."""
        self._stopping = True

    def _wait_for_topics(self) -> None:
        """Wait until the broker is there and has the topics; create them where that is wanted."""
        said: set[str] = set()
        while not self._stopping:
            try:
                missing = set(topics_of(self._settings)) - self._consumer.list_topics(timeout=TOPICS_RETRY_S).topics.keys()
                self._connection.observed(up=True)
                if missing and self._settings.kafka_create_topics:
                    create_topics(self._settings, missing)
                    missing = set()
            except KafkaException:
                self._connection.observed(up=False)
            else:
                if not missing:
                    return
                self._group_fault = f"waiting for topics: {', '.join(sorted(missing))}"
                if missing != said:
                    log.warning("waiting for topics: create them, or set KAFKA_CREATE_TOPICS=true", missing=sorted(missing))
                said = missing
            self._consumer.poll(TOPICS_RETRY_S)  # for its callbacks
            self.health.turn()
            self._say_whether_ready()
            self._raise_failure()

    def _finish(self) -> bool:
        """Finish what is being encoded or answered, within the time there is for it."""
        deadline = time.monotonic() + self._settings.shutdown_timeout_s
        self._group_fault = "stopping"
        self._lanes.drop_unstarted()
        self._say_whether_ready()
        log.info("stopping", in_flight=len(self._lanes))
        while (self._lanes or not self._publisher.settled) and time.monotonic() < deadline:
            self._tick()
        unfinished = len(self._lanes)
        if unfinished:
            log.error("stopped before all was answered; it will be delivered again", unfinished=unfinished)
        return not unfinished

    # One turn of the loop.

    def _tick(self) -> None:
        patience = BUSY_POLL_S if self._lanes else IDLE_POLL_S
        if not self._full:
            self._pause(pause=False)
            self._poll(patience)
            self._full_since = time.monotonic()
            self._work(0)
        else:
            if time.monotonic() - self._full_since > self._pause_after:
                self._pause(pause=True)
                self._poll(0)
            self._work(patience)
        IN_FLIGHT.set(len(self._lanes))
        self._say_whether_ready()
        self._look_for_overdue_answers()
        self._raise_failure()

    def _poll(self, patience: float) -> None:
        message = self._consumer.poll(patience)
        if message is not None:
            self._received(message)

    @property
    def _full(self) -> bool:
        return self._stopping or len(self._lanes) >= self._settings.kafka_prefetch

    def _work(self, wait: float) -> None:
        """Everything but polling the consumer: acknowledgements, outcomes, retries that are due, answers whose turn it is."""
        self.health.turn()
        self._publisher.poll()
        try:
            self._events.get(timeout=wait)() if wait else self._events.get_nowait()()
            while True:
                self._events.get_nowait()()
        except Empty:
            pass
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()
        for job in self._lanes.ready():
            job.sent_at = time.monotonic()
            self._publisher.publish(job)

    def _pause(self, *, pause: bool) -> None:
        """Pause all partitions, so that polling fetches nothing, or resume them."""
        if pause != self._paused:
            (self._consumer.pause if pause else self._consumer.resume)(self._consumer.assignment())
            self._paused = pause

    def _say_whether_ready(self) -> None:
        self._connection.settle()
        self.health.ready_if("broker", self._connection.fault)
        self.health.ready_if("group", self._group_fault)
        ready = self.health.ready().ok
        if ready != self._ready:
            log.info("ready" if ready else "not ready", group=self._settings.kafka_consumer_group)
            self._ready = ready

    def _look_for_overdue_answers(self) -> None:
        """An answer may wait for a broker that is away, but not without a word for one that is there, with a full disk say."""
        now = time.monotonic()
        if not self._connection.up_for(now, self._settings.kafka_ack_timeout_s):
            return
        for job in self._lanes.sent_before(now - self._settings.kafka_ack_timeout_s):
            waiting = f"No acknowledgement within KAFKA_ACK_TIMEOUT_S={self._settings.kafka_ack_timeout_s:g}"
            if job.dead_lettered:
                self._fail(KafkaFailed(f"{waiting} for a dead letter in topic {self._settings.kafka_dlq_topic}."))
            elif not job.overdue:
                log.error("answer is not acknowledged", reason=waiting, **job.record.place)
                job.overdue = True

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._connection.check()

    # A request's way.

    def _received(self, message: Message) -> None:
        error = message.error()
        if error is not None:
            self._consumer_error(error)
        elif not self._stopping:
            job = Job(Incoming.of(message))
            kafka_telemetry.taken(job, self._settings)
            self._lanes.add(job)
            try:
                job.request = read_request(job.record, self._settings)
            except RequestError as exc:
                self._failed(job, exc)
            else:
                self._begin(job)

    def _begin(self, job: Job) -> None:
        if not job.dropped:
            job.attempts += 1
            self._stages.submit(job)

    def _finished(self, job: Job, outcome: SuccessResponse | BaseException) -> None:
        if job.dropped:
            return
        if isinstance(outcome, BaseException):
            self._failed(job, as_request_error(outcome))
        else:
            assert job.request is not None
            job.outcome = outcome
            job.answer = (self._response(job, outcome, job.request.correlation_id),)

    def _failed(self, job: Job, error: RequestError) -> None:
        """A retry later, or an error response, a dead letter, or both."""
        sender = sender_of(job.record, self._settings.kafka_max_message_bytes)
        log_failure(error, request_id=sender.request_id, attempt=job.attempts, **job.record.place)
        if error.retryable and job.attempts <= self._settings.kafka_max_retries:
            job.encoding = False
            RETRIES.inc()
            if self._stopping:
                self._lanes.drop_unstarted()
            else:
                self._later(self._backoff(job.attempts), partial(self._begin, job))
            return
        job.outcome = error
        answer: tuple[Outgoing, ...] = ()
        if sender.request_id is not None:
            response = ErrorResponse.of(error, sender.request_id, self._clock())
            answer += (self._response(job, response, sender.correlation_id),)
        if error.retryable or isinstance(error, MessageUnusable):
            answer += (self._dead_letter(job, error),)
        job.answer = answer

    def _response(self, job: Job, response: Response, correlation_id: str | None) -> Outgoing:
        message = ResponseMessage.of(response, correlation_id, self._clock())
        return response_record(job.record, message, self._settings.kafka_response_topic)

    def _dead_letter(self, job: Job, error: RequestError) -> Outgoing:
        job.dead_lettered = True
        return dead_letter(job.record, error, job.attempts, self._settings)

    def _backoff(self, attempt: int) -> float:
        """Seconds before the next attempt: doubled each time, and varied so that many workers do not try at once."""
        seconds = min(self._settings.kafka_retry_backoff_s * 2.0 ** (attempt - 1), MAX_BACKOFF_S)
        return seconds * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311  # nothing secret depends on it

    # What becomes of an answer.

    def _answered(self, job: Job) -> None:
        if not job.dropped:
            self._lanes.answered(job)
            self._answered_offsets[job.partition] = job.record.offset + 1
            kafka_telemetry.answered(job, self._settings)

    def _refused(self, job: Job, refusals: list[Refusal]) -> None:
        """A response that its topic does not take becomes a dead letter; a dead letter that is not taken ends the service."""
        if job.dropped:
            return
        for record, error in refusals:
            is_response = record.topic == self._settings.kafka_response_topic
            if error.code() in TOPIC_GONE:
                log.error("topic is gone, waiting for it", gone=record.topic, reason=error.str(), **job.record.place)
            elif is_response and error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
                log.error("response refused", refused_by=record.topic, reason=error.str(), **job.record.place)
                refused = ResponseRefused(
                    f"Topic {record.topic} refused the response: {error.str()}. Raise its max.message.bytes."
                )
                job.outcome = refused
                instead = () if job.dead_lettered else (self._dead_letter(job, refused),)
                job.answer = tuple(other for other in job.answer or () if other is not record) + instead
            else:
                kind = "response" if is_response else "dead letter"
                self._fail(failure(f"Topic {record.topic} refused a {kind}", error))
        self._publish_again(job)

    def _publish_again(self, job: Job) -> None:
        def unsent() -> None:
            job.sent_at = None

        self._later(AGAIN_S, unsent)

    def _on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        if not self._publisher.on_commit(error, partitions):
            self._later(AGAIN_S, self._publisher.commit_again)

    # Partitions that come and go.

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        consumer.incremental_assign(partitions)
        if self._paused:
            consumer.pause(partitions)
        self._group_fault = None
        REBALANCES.labels("assigned").inc()
        log.info("partitions assigned", partitions=_numbers(partitions))

    def _on_revoke(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        """Finish what is being encoded or answered on them within the deadline, drop the rest uncommitted."""
        keys = _keys(partitions)
        dropped = self._lanes.drop_unstarted(keys)
        deadline = time.monotonic() + self._revoke_timeout
        while any(self._lanes.jobs(keys)) and time.monotonic() < deadline and self._failure is None:
            self._work(BUSY_POLL_S)
        dropped += self._lanes.drop(keys)
        if self._failure is None:
            self._publisher.settle(keys)
        self._publisher.forget(keys)
        REBALANCES.labels("revoked").inc()
        log.info("partitions revoked", partitions=_numbers(partitions), dropped=len(dropped))

    def _on_lost(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        """They are another worker's already: commit nothing."""
        keys = _keys(partitions)
        dropped = self._lanes.drop(keys)
        self._publisher.forget(keys)
        self._group_fault = "partitions lost"
        REBALANCES.labels("lost").inc()
        log.warning("partitions lost", partitions=_numbers(partitions), dropped=len(dropped))

    def _on_statistics(self, statistics: str) -> None:
        """The consumer's `stats_cb`, every second."""
        found = json.loads(statistics)
        self._connection.on_statistics(found["brokers"])
        observe_lag(found["topics"], self._answered_offsets)

    def _consumer_error(self, error: KafkaError) -> None:
        if is_fatal(error):
            self._fail(failure(f"Cannot consume topic {self._settings.kafka_request_topic}", error))
        else:
            log.warning("consumer error", reason=error.str(), error_code=error.name())

    # Tools.

    def _make_producer(self) -> Producer:
        properties = producer_properties(self._settings) | {"error_cb": self._connection.on_error}
        return make_client(Producer, properties, self._settings)

    def _fail(self, reason: KafkaFailed) -> None:
        self._failure = self._failure or reason

    def _posted(self, call: Callable[..., None]) -> Callable[..., None]:
        """`call`, but from whatever thread, to be run by the one that polls."""
        return lambda *arguments: self._events.put(partial(call, *arguments))

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._timer_numbers), call))


def _keys(partitions: Collection[TopicPartition]) -> set[Partition]:
    return {(partition.topic, partition.partition) for partition in partitions}


def _numbers(partitions: Collection[TopicPartition]) -> list[int]:
    return sorted(partition.partition for partition in partitions)
