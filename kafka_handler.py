"""Kafka mode: each request from the topic ends in an acknowledged response or dead letter before its offset is committed.

One thread, the caller of `KafkaHandler.run`, polls the consumer and never waits for an encode. So the worker stays in its
group however long an encode takes. This thread owns the jobs and everything else in this module. The stages and the publisher
work beside it and put their events into its queue.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection
from datetime import datetime

from confluent_kafka import KafkaError, TopicPartition

from config import VERSION, Settings
from errors import KafkaFailed
from latent_encoder.kafka.assignment import Assignment, Holdings
from latent_encoder.kafka.clients import Clients
from latent_encoder.kafka.commits import OffsetCommits, PublishThenCommit
from latent_encoder.kafka.connection import BrokerState, is_fatal
from latent_encoder.kafka.events import Events
from latent_encoder.kafka.guards import client_faults, harmless
from latent_encoder.kafka.jobs import Partition, RecordJob
from latent_encoder.kafka.limits import report_limits
from latent_encoder.kafka.membership import Membership, refused_membership
from latent_encoder.kafka.progress import Progress
from latent_encoder.kafka.publishers import Publisher, PublisherEvents
from latent_encoder.kafka.readiness import Acknowledgements, Readiness
from latent_encoder.kafka.records import Incoming
from latent_encoder.kafka.retention import Retention
from latent_encoder.kafka.starts import Starts
from latent_encoder.kafka.topics import TopicWatch
from latent_encoder.kafka.transactions import PublishInTransaction
from latent_encoder.kafka.work import Work
from latent_encoder.stages import Stages
from latent_encoder.telemetry.health import Health
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.telemetry.metrics import IN_FLIGHT, INFO
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

STATISTICS_REST = 20
"""Multiple of the time to read the consumer's statistics for which no others are read, so that they take a twentieth of the
thread. With a topic of 1,000 partitions that is 0.3 s, less than until they come again; with 5,000 it is 1.5 s."""

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
        self.health = Health(settings.encode_timeout_s)
        self._broker = BrokerState(settings.kafka_bootstrap_servers, settings.kafka_auth_timeout_s)
        self._readiness = Readiness(self.health, self._broker, settings.kafka_consumer_group)
        self._events = Events()
        self._full_since = 0.0
        self._statistics_from = 0.0
        """Time before which no statistics are read, in seconds of the monotonic clock."""
        self._stop_by = math.inf
        """Time by which a worker that stops has to end, in seconds of the monotonic clock."""
        self._stop_reason: KafkaFailed | None = None

        self._clients = Clients(settings, self._broker, self._on_statistics, self._on_commit)
        self._consumer = self._clients.consumer
        self._starts = Starts(
            self._consumer, settings.kafka_max_crashes, transactional=settings.kafka_transactional_id is not None
        )
        self._work = Work(settings, clock, self._starts, self.health, self._stop_because)
        self._lanes = self._work.lanes
        self._commits = OffsetCommits(self._consumer, self._work.timers, self._stop_because)
        self._publisher = self._make_publisher()
        self._topics = TopicWatch(
            settings, self._events.posted(self._topic_recreated), self._events.posted(self._stop_because)
        )
        self._progress = Progress(settings, self._consumer, self._broker, self._topics, self._lanes)
        held = Holdings(self._lanes, self._publisher, self._starts, self._progress)
        self._assignment = Assignment(self._consumer, held, self._readiness, self._before_revoke)
        self._retention = Retention(settings)
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
            acknowledged=self._events.posted(self._work.acknowledged),
            refused=self._events.posted(self._work.refused),
            aborted=self._events.posted(self._work.aborted),
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
        self._stages = Stages(encoder, self._events.posted(self._work.encoded), self.health)
        self._topics.start()
        self._retention.start()
        self.health.needs([*self._publisher.threads, *self._topics.threads])
        self.health.ready_if("model", None)
        INFO.info({"version": VERSION, **encoder.versions})
        try:
            self._wait_for_topics()
            report_limits(self._settings)
            self._assignment.subscribe(self._settings.kafka_request_topic)
            Membership(self._settings, self._consumer, self._work.timers, self._stop_because).confirm()
            while not self._work.stopping:
                self._turn()
            return self._finish()
        finally:
            self._retention.close()
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
        self._work.stopping = True

    def _wait_for_topics(self) -> None:
        while not self._work.stopping and not self._topics.existed:
            self._poll(IDLE_POLL_S)  # no records yet; librdkafka reports a refused group once, before it is joined
            if self._topics.reached is not None:
                self._broker.observed(up=self._topics.reached)
            self._advance(0)
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
            self._advance(BUSY_POLL_S)

    # One turn of the loop.

    def _turn(self) -> None:
        timeout = BUSY_POLL_S if self._lanes else IDLE_POLL_S
        full = self._work.full
        self._progress.turn(room=not full, paused=self._assignment.paused)
        if not full:
            self._assignment.pause(self._lanes.crowded(MOST_SET_ASIDE))
            self._poll(timeout)
            self._full_since = time.monotonic()
            self._advance(0)
        else:
            if time.monotonic() - self._full_since > self._clients.pause_after_s:
                self._assignment.pause(self._assignment.partitions)
                self._poll(0)
            self._advance(timeout)
        IN_FLIGHT.set(len(self._lanes))
        self.health.ready_if("machine", self._work.machine_fault)
        self.health.stalled(self._progress.watchdog.hung)
        self._readiness.update()
        if self._broker.up_for(time.monotonic(), self._settings.kafka_ack_timeout_s):
            self._work.check_overdue()
        self._raise_stop_reason()

    def _advance(self, timeout: float) -> None:
        """Do everything except polling the consumer: acknowledgements, events, timers, jobs whose turn it is."""
        self.health.turn()
        self._publisher.poll()
        self._events.run(timeout)
        self._work.timers.run_due()
        for job in self._work.publish():
            self._publisher.publish(job)
        for job in self._work.begin():
            self._stages.submit(job)

    def _raise_stop_reason(self) -> None:
        if self._stop_reason is not None:
            raise self._stop_reason
        self._broker.check()

    def _poll(self, timeout: float) -> None:
        message = self._consumer.poll(timeout)
        if message is None:
            return
        error = message.error()
        if error is not None:
            self._consumer_error(error)
        elif not self._work.stopping:
            job = RecordJob(Incoming.of(message))
            self._progress.taken(job)
            self._work.take(job)

    def _consumer_error(self, error: KafkaError) -> None:
        if is_fatal(error):
            self._stop_because(refused_membership(error, self._settings))
        else:
            log.warning("consumer error", reason=error.str(), error_code=error.name())

    def _stop_because(self, reason: KafkaFailed) -> None:
        self._stop_reason = self._stop_reason or reason

    # Callbacks of the topic watch and of the consumer.

    def _topic_recreated(self, topic_id: str) -> None:
        """Read the new topic from its beginning; requests of the old one get their responses, and no offset is committed."""
        self._work.orphan()
        self._starts.restart(topic_id, self._assignment.partitions)
        self._progress.restart()
        self._publisher.forget(self._assignment.partitions)
        self._assignment.read_from_start()

    def _before_revoke(self, partitions: Collection[Partition]) -> None:
        """Finish and commit the jobs of partitions that are about to be revoked, in time for the rebalance."""
        deadline = min(time.monotonic() + self._clients.revoke_timeout_s, self._stop_by)
        while any(self._lanes.jobs(partitions)) and time.monotonic() < deadline and self._stop_reason is None:
            self._advance(BUSY_POLL_S)
        self._settle_notes(partitions)
        if self._stop_reason is None:
            self._publisher.before_revoke(partitions, deadline)

    def _on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        self._commits.on_commit(error, partitions)

    @harmless("statistics of the client cannot be used")
    def _on_statistics(self, statistics: str) -> None:
        """Take the consumer's statistics (its `stats_cb`), which come every second and have all partitions of the topic."""
        if time.monotonic() < self._statistics_from:
            return
        began = time.thread_time()
        found = json.loads(statistics)
        self._broker.on_statistics(found["brokers"])
        self._progress.observe(found["topics"])
        self._statistics_from = time.monotonic() + STATISTICS_REST * (time.thread_time() - began)
