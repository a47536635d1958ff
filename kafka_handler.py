"""Kafka mode: each request from the topic ends in an acknowledged response or dead letter before its offset is committed.

One thread, the caller of `KafkaHandler.run`, polls the consumer and never waits for an encode. So the worker stays in its
group however long an encode takes. This thread owns the jobs and everything else in this module. The stages and the publisher
work beside it and put their events into its queue.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from functools import partial

from confluent_kafka import KafkaError, TopicPartition

from config import VERSION, Settings
from errors import DeviceLost, KafkaFailed, RequestError, as_request_error
from latent_encoder.kafka import decisions, telemetry
from latent_encoder.kafka.assignment import Assignment, Holdings
from latent_encoder.kafka.breaker import Breaker, accused
from latent_encoder.kafka.clients import Clients
from latent_encoder.kafka.commits import OffsetCommits, PublishThenCommit
from latent_encoder.kafka.connection import BrokerState, is_fatal
from latent_encoder.kafka.decisions import Decision, Failure, Finish, Replace, Retry, Stop
from latent_encoder.kafka.events import Events
from latent_encoder.kafka.guards import client_faults, harmless
from latent_encoder.kafka.jobs import Partition, RecordJob, State
from latent_encoder.kafka.lanes import Lanes
from latent_encoder.kafka.limits import report_limits
from latent_encoder.kafka.membership import Membership, refused_membership
from latent_encoder.kafka.progress import Progress
from latent_encoder.kafka.publishers import Publisher, PublisherEvents
from latent_encoder.kafka.readiness import Acknowledgements, Readiness
from latent_encoder.kafka.records import Incoming, Outgoing, RefusedRecord, Sender, read_request, sender_of
from latent_encoder.kafka.schedule import to_begin
from latent_encoder.kafka.starts import Starts
from latent_encoder.kafka.timers import Timers
from latent_encoder.kafka.topics import TopicWatch
from latent_encoder.kafka.transactions import PublishInTransaction
from latent_encoder.stages import Stages
from latent_encoder.telemetry.health import Health
from latent_encoder.telemetry.logs import get_logger, log_failure
from latent_encoder.telemetry.metrics import IN_FLIGHT, INFO, RETRIES
from models import SuccessResponse
from service import LatentEncoder, utc_now

log = get_logger("latent_encoder.kafka")

BUSY_POLL_S = 0.01
"""Poll timeout while requests are held: the longest time that an event waits for this thread."""

IDLE_POLL_S = 0.2
"""Poll timeout while none are held: the longest delay until a stop is noticed."""

MOST_SET_ASIDE = 32
"""Most jobs of a partition that wait for a retry, or behind one. More would fill the memory, so the partition is paused."""

LAST_NOTES_S = 2.0
"""Longest time to remove the notes of requests that are left to other workers: one commit, which takes milliseconds."""

CLOSE_TIMEOUT_S = 5.0
"""Longest time to end a transaction and to leave the group at the end. A broker that is there takes milliseconds."""


class KafkaHandler:
    """One worker of the consumer group. Make it, call `run`, and call `stop` from a signal handler or another thread."""

    def __init__(self, settings: Settings, clock: Callable[[], datetime] = utc_now) -> None:
        """Make the clients. They connect by themselves; nothing is consumed yet.

        Raises:
            SettingsError: librdkafka refuses a property.
        """
        self._settings = settings
        self._clock = clock
        self.health = Health(settings.encode_timeout_s)
        self._broker = BrokerState(settings.kafka_bootstrap_servers, settings.kafka_auth_timeout_s)
        self._readiness = Readiness(self.health, self._broker, settings.kafka_consumer_group)
        self._lanes = Lanes(self._dropped)
        self._events = Events()
        self._timers = Timers()
        self._breaker = Breaker(settings)
        self._vaes: set[str] = set()
        """Names of the VAEs that have encoded here."""
        self._full_since = 0.0
        self._stopping = False
        self._stop_by = math.inf
        """Time by which a worker that stops has to end, in seconds of the monotonic clock."""
        self._stop_reason: KafkaFailed | None = None

        self._clients = Clients(settings, self._broker, self._on_statistics, self._on_commit)
        self._consumer = self._clients.consumer
        self._starts = Starts(
            self._consumer, settings.kafka_max_crashes, transactional=settings.kafka_transactional_id is not None
        )
        self._commits = OffsetCommits(self._consumer, self._timers, self._stop_because)
        self._publisher = self._make_publisher()
        self._topics = TopicWatch(
            settings, self._events.posted(self._topic_recreated), self._events.posted(self._stop_because)
        )
        self._progress = Progress(settings, self._consumer, self._broker, self._topics, self._lanes)
        held = Holdings(self._lanes, self._publisher, self._starts, self._progress)
        self._assignment = Assignment(self._consumer, held, self._readiness, self._before_revoke)
        self._add_parts()

    def _add_parts(self) -> None:
        """Make the worker ready only if the topics exist, responses are acknowledged and requests are fetched."""
        acknowledgements = Acknowledgements(self._settings.kafka_ack_timeout_s)
        self._readiness.add("topics", lambda: self._topics.fault)
        self._readiness.add("responses", lambda: acknowledgements.fault(self._lanes.published))
        self._readiness.add("fetch", lambda: self._progress.watchdog.fault)
        if self._settings.kafka_transactional_id:
            self._readiness.add("transactions", lambda: self._publisher.fault)

    def _make_publisher(self) -> Publisher:
        events = PublisherEvents(
            acknowledged=self._events.posted(self._acknowledged),
            refused=self._events.posted(self._refused),
            aborted=self._events.posted(self._aborted),
            failed=self._events.posted(self._stop_because),
        )
        if self._settings.kafka_transactional_id:
            return PublishInTransaction(self._consumer, self._clients.make_producer, self._starts.position_after, events)
        return PublishThenCommit(self._commits, self._clients.make_producer(), self._starts.position_after, events)

    # The life of a worker.

    @client_faults()
    def run(self, encoder: LatentEncoder) -> bool:
        """Serve requests until `stop` is called.

        Returns:
            True if every request in flight was finished; another worker gets the others.

        Raises:
            KafkaFailed: the worker cannot go on. The offset of a request without a response is not committed.
        """
        self._stages = Stages(encoder, self._events.posted(self._encoded), self.health)
        self._topics.start()
        self.health.needs([*self._stages.threads, *self._publisher.threads, *self._topics.threads])
        self.health.ready_if("model", None)
        INFO.info({"version": VERSION, **encoder.versions})
        try:
            self._wait_for_topics()
            report_limits(self._settings)
            self._assignment.subscribe(self._settings.kafka_request_topic)
            Membership(self._settings, self._consumer, self._timers, self._stop_because).confirm()
            while not self._stopping:
                self._turn()
            return self._finish()
        finally:
            self._lanes.drop()
            self._settle_notes()
            self._stages.close()
            self._topics.close()
            deadline = time.monotonic() + CLOSE_TIMEOUT_S
            self._publisher.close(deadline)
            self._clients.close(deadline)
            log.info("stopped")

    def stop(self) -> None:
        """Take no new requests, finish those in flight, and end. Safe in a signal handler and from another thread."""
        self._stopping = True

    def _wait_for_topics(self) -> None:
        while not self._stopping and not self._topics.existed:
            self._poll(IDLE_POLL_S)  # no records yet; librdkafka reports a refused group once, before it is joined
            if self._topics.reached is not None:
                self._broker.observed(up=self._topics.reached)
            self._work(0)
            self._readiness.update()
            self._raise_stop_reason()
        self._starts.topic_id = self._topics.topic_id

    def _finish(self) -> bool:
        """Finish the jobs whose encode has begun, for SHUTDOWN_TIMEOUT_S at most; return False if that was too short."""
        self._stop_by = time.monotonic() + self._settings.shutdown_timeout_s
        self._readiness.group_fault = "stopping"
        self._lanes.drop_unstarted()
        self._readiness.update()
        log.info("stopping", in_flight=len(self._lanes))
        while (self._lanes or not self._publisher.settled) and time.monotonic() < self._stop_by:
            self._turn()
        unfinished = len(self._lanes)
        if unfinished:
            log.error("stopped before all was answered; it will be delivered again", unfinished=unfinished)
        return not unfinished

    def _settle_notes(self, partitions: Collection[Partition] | None = None) -> None:
        """Remove the notes of requests of these partitions, or of all, that are left to other workers."""
        deadline = time.monotonic() + LAST_NOTES_S
        while self._starts.pending(partitions) and time.monotonic() < deadline:
            self._work(BUSY_POLL_S)

    # One turn of the loop.

    def _turn(self) -> None:
        timeout = BUSY_POLL_S if self._lanes else IDLE_POLL_S
        full = self._full
        self._progress.turn(room=not full, paused=self._assignment.paused)
        if not full:
            self._assignment.pause(self._lanes.crowded(MOST_SET_ASIDE))
            self._poll(timeout)
            self._full_since = time.monotonic()
            self._work(0)
        else:
            if time.monotonic() - self._full_since > self._clients.pause_after_s:
                self._assignment.pause(self._assignment.partitions)
                self._poll(0)
            self._work(timeout)
        IN_FLIGHT.set(len(self._lanes))
        self.health.ready_if("machine", self._breaker.fault)
        self.health.stalled(self._progress.watchdog.hung)
        self._readiness.update()
        self._check_overdue()
        self._raise_stop_reason()

    @property
    def _full(self) -> bool:
        """No further request may be taken."""
        return (
            self._stopping
            or self._lanes.in_hand >= self._settings.kafka_prefetch
            or not self._breaker.takes(list(self._lanes.jobs()), time.monotonic())
        )

    def _work(self, timeout: float) -> None:
        """Do everything except polling the consumer: acknowledgements, events, timers, jobs whose turn it is."""
        self.health.turn()
        self._publisher.poll()
        self._events.run(timeout)
        self._timers.run_due()
        for job in self._lanes.ready():
            if not self._starts.committing(job.partition):
                job.sent(time.monotonic())
                self._publisher.publish(job)
        self._begin_jobs()

    def _begin_jobs(self) -> None:
        """Begin the jobs whose turn it is, each when the broker has the note of its start."""
        now = time.monotonic()
        jobs = sorted(self._lanes.jobs(), key=lambda job: job.taken_at)
        for job in self._to_begin(jobs, now):
            if job.condemned:
                self._begin(job)
            else:
                job.note()
                self._starts.begin(job)
        self._starts.commit(self._lanes.sending)
        for job in jobs:
            if job.state is State.NOTING and self._starts.noted(job):
                self._begin(job)

    def _to_begin(self, jobs: Sequence[RecordJob], now: float) -> Sequence[RecordJob]:
        if self._stopping:
            return ()
        if self._breaker.fault is not None:
            return self._breaker.to_try(jobs, now)
        return to_begin(jobs, self._settings.kafka_prefetch, now)

    def _check_overdue(self) -> None:
        """Look for jobs that a reachable broker does not acknowledge in time, for example because its disk is full."""
        timeout = self._settings.kafka_ack_timeout_s
        now = time.monotonic()
        if not self._broker.up_for(now, timeout):
            return
        for job in self._lanes.sent_before(now - timeout):
            stop = decisions.if_overdue(job, self._settings)
            if stop is not None:
                self._stop_because(stop.reason)
            elif not job.overdue:
                log.error("response is not acknowledged", reason=decisions.late(self._settings), **job.record.place)
                job.overdue = True

    def _raise_stop_reason(self) -> None:
        if self._stop_reason is not None:
            raise self._stop_reason
        self._broker.check()

    # The way of a request.

    def _poll(self, timeout: float) -> None:
        message = self._consumer.poll(timeout)
        if message is None:
            return
        error = message.error()
        if error is not None:
            self._consumer_error(error)
        elif not self._stopping:
            self._take(RecordJob(Incoming.of(message)))

    def _take(self, job: RecordJob) -> None:
        """Begin the job of a record, or decide about it at once if it holds no valid request."""
        telemetry.taken(job, self._settings)
        self._lanes.add(job)
        self._starts.taken(job)
        self._progress.taken(job)
        try:
            job.request = read_request(job.record, self._settings)
        except RequestError as exc:
            job.sender = sender_of(job.record, self._settings.kafka_max_message_bytes)
            self._request_failed(job, exc)
        else:
            job.sender = Sender(job.request.request_id, job.request.correlation_id)

    def _begin(self, job: RecordJob) -> None:
        job.begin()
        self._stages.submit(job)

    def _encoded(self, job: RecordJob, result: SuccessResponse | BaseException) -> None:
        """Take the result of an attempt from the stages."""
        if job.dropped:
            return
        if isinstance(result, BaseException):
            self._request_failed(job, as_request_error(result))
        else:
            self._encode_succeeded(job, result)
            self._carry_out(job, decisions.after_success(job, result, self._settings, self._clock()))

    def _encode_succeeded(self, job: RecordJob, response: SuccessResponse) -> None:
        """Take the success as a sign that the machine works, unless the response was stored."""
        if job.redelivered:
            return
        self._vaes.add(response.metadata.vae_model_name)
        if self._breaker.succeeded():
            for other in self._lanes.jobs():
                other.forgive()

    def _request_failed(self, job: RecordJob, error: RequestError) -> None:
        log_failure(error, request_id=job.sender.request_id, attempt=job.attempts, **job.record.place)
        job.blamed = isinstance(error, DeviceLost)
        fault = accused(error, job, self._settings, self._vaes)
        self._breaker.failed(job, fault, time.monotonic())
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
                if self._stopping:
                    self._lanes.drop_unstarted()
            case Replace(finish, after_s):
                self._later(after_s, job, partial(self._carry_out, job, finish))
            case Stop(reason):
                self._stop_because(reason)

    def _later(self, seconds: float, job: RecordJob, call: Callable[[], None]) -> None:
        """Make a call about a job after a while, unless the job is dropped by then."""
        self._timers.after(seconds, lambda: None if job.dropped else call())

    # Events of the publisher.

    def _acknowledged(self, job: RecordJob) -> None:
        if not job.dropped:
            self._lanes.acknowledged(job)
            self._starts.acknowledged(job)
            telemetry.acknowledged(job)

    def _refused(self, job: RecordJob, refused: Sequence[RefusedRecord], undelivered: tuple[Outgoing, ...]) -> None:
        if job.dropped:
            return
        telemetry.refused(job, refused, self._settings)
        self._carry_out(job, decisions.after_refusal(job, refused, undelivered, self._settings))

    def _aborted(self, job: RecordJob) -> None:
        if not job.dropped:
            self._later(decisions.RESEND_AFTER_S, job, job.resend)

    # Other events.

    def _dropped(self, job: RecordJob) -> None:
        """Note that a job is left to another worker, which is no crash unless a step hangs or the job lost the device."""
        telemetry.dropped(job)
        if "steps" not in self.health.alive().faults and not job.blamed:
            self._starts.end(job)

    def _topic_recreated(self, topic_id: str) -> None:
        """Read the new topic from its beginning; requests of the old one get their responses, and no offset is committed."""
        log.error("request topic was created again, reading it from its beginning", topic=self._settings.kafka_request_topic)
        for job in self._lanes.jobs():
            job.orphaned = True
        self._starts.restart(topic_id, self._assignment.partitions)
        self._progress.restart()
        self._publisher.forget(self._assignment.partitions)
        self._assignment.read_from_start()

    # Callbacks of the consumer, made while it is polled.

    def _before_revoke(self, partitions: Collection[Partition]) -> None:
        """Finish and commit the jobs of partitions that are about to be revoked, in time for the rebalance."""
        deadline = min(time.monotonic() + self._clients.revoke_timeout_s, self._stop_by)
        while any(self._lanes.jobs(partitions)) and time.monotonic() < deadline and self._stop_reason is None:
            self._work(BUSY_POLL_S)
        self._settle_notes(partitions)
        if self._stop_reason is None:
            self._publisher.before_revoke(partitions, deadline)

    def _on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        self._commits.on_commit(error, partitions)

    @harmless("statistics of the client cannot be used")
    def _on_statistics(self, statistics: str) -> None:
        """Take the consumer's statistics (its `stats_cb`), which come every second."""
        found = json.loads(statistics)
        self._broker.on_statistics(found["brokers"])
        self._progress.observe(found["topics"])

    def _consumer_error(self, error: KafkaError) -> None:
        if is_fatal(error):
            self._stop_because(refused_membership(error, self._settings))
        else:
            log.warning("consumer error", reason=error.str(), error_code=error.name())

    def _stop_because(self, reason: KafkaFailed) -> None:
        self._stop_reason = self._stop_reason or reason
