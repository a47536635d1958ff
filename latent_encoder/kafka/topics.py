"""The three topics: creating them if KAFKA_CREATE_TOPICS is set, waiting until they exist, and watching them from then on."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from confluent_kafka import IsolationLevel, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._listoffsets import OffsetSpec  # the package exports both without their types
from confluent_kafka.admin._topic import TopicDescription
from confluent_kafka.cimpl import NewTopic  # `confluent_kafka.admin` exports it without its types

from config import Settings
from errors import KafkaFailed
from latent_encoder.kafka.connection import is_fatal, kafka_failed
from latent_encoder.kafka.decisions import TOPIC_GONE
from latent_encoder.kafka.properties import admin_properties, make_client
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder.kafka")

DLQ_CONFIG = {"max.message.bytes": "10485760", "retention.ms": "-1"}
"""Limits of the dead-letter topic. 10 MiB: a dead letter is a request of any size with its headers. No retention limit: it
stays until a person looked at it."""

BROKER_DEFAULT = -1
"""The replication factor that stands for the broker's own default."""

FIRST_LOOKS_S = 1.0
"""Wait between two looks before all topics exist: an operator creates them by hand, and one call a second is cheap."""

LOOK_EVERY_S = 5.0
"""Mean wait between later looks. A look asks for the offsets of the worker's own partitions, and the lag is about as old."""

SPREAD = 0.25
"""Largest relative deviation from a wait, so that workers that were started together do not all look in the same second."""

TOPIC_LOOK_S_A_PARTITION = 0.05
"""Wait between two looks at the topics themselves, in seconds for each partition. Such a look has all partitions in it: if it
came every five seconds, 1,000 workers would get those of 2,000 partitions 400,000 times a second. Up to 100 partitions, each
look is at the topics too."""

LONGEST_TOPIC_LOOK_S = 60.0
"""Longest of these waits: a topic that was removed or created again is noticed within about a minute."""

LOOK_TIMEOUT_S = 5.0
"""Timeout of each request of a look: a broker that responds later counts as away."""

CREATE_TIMEOUT_S = 10
"""Timeout of creating topics: a broker that is starting takes some seconds."""

UNREACHABLE = {KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError.REQUEST_TIMED_OUT, KafkaError.NOT_CONTROLLER}
"""Errors of a broker that may be reachable at the next attempt."""

EARLIEST = OffsetSpec.earliest()  # type: ignore[no-untyped-call]
LATEST = OffsetSpec.latest()  # type: ignore[no-untyped-call]

NO_ID = "A" * 22
"""The id of a topic, sixteen bytes of zero in base64, that a broker without topic ids gives."""


def topics_of(settings: Settings) -> tuple[str, str, str]:
    """Return the topics of requests, responses and dead letters."""
    return (settings.kafka_request_topic, settings.kafka_response_topic, settings.kafka_dlq_topic)


def topics_every_s(partitions: int) -> float:
    """Return the seconds between two looks at the topics, if that of the requests has so many partitions."""
    return min(max(LOOK_EVERY_S, partitions * TOPIC_LOOK_S_A_PARTITION), LONGEST_TOPIC_LOOK_S)


@dataclass(frozen=True)
class Seen:
    """The broker's responses to one look."""

    at: float
    """Seconds of the monotonic clock."""
    missing: frozenset[str]
    starts: Mapping[int, int]
    """The first offset that the broker still has, of each partition that was looked at."""
    ends: Mapping[int, int]
    """The offset behind the last record that a consumer may read, without those of open transactions."""


class TopicWatch:
    """A thread that looks for the three topics, at the start and as long as the worker runs.

    The client has connections of its own, so that the loop never waits for its responses.
    """

    def __init__(self, settings: Settings, recreated: Callable[[str], None], failed: Callable[[KafkaFailed], None]) -> None:
        """`recreated` gets the new id of a request topic that was created again, `failed` an error that stops the worker.

        Both are called in the thread.
        """
        self._settings = settings
        self._recreated = recreated
        self._failed = failed
        self._admin = make_client(AdminClient, admin_properties(settings), settings)
        self._wake = threading.Event()
        self._closing = False
        self._watched: frozenset[int] = frozenset()
        self._partitions = 0
        """Count of the partitions of the request topic at the last look at it."""
        self._gone = False
        """At the last look, a broker did not know one of the partitions."""
        self._topics_due = 0.0
        """Time of the next look at the topics themselves, in seconds of the monotonic clock."""
        self._thread = threading.Thread(target=self._run, name="topics", daemon=True)
        self.threads = (self._thread,)
        """The thread without which the worker would not notice that a topic is gone."""
        self.topic_id: str | None = None
        """Id of the request topic; None if the broker gives its topics no ids, or before the first look."""
        self.seen: Seen | None = None
        """The last look; None before the first one."""
        self.reached: bool | None = None
        """The broker responded to the last look; None before the first one."""
        self.existed = False
        """All topics existed at some look."""

    @property
    def fault(self) -> str | None:
        """The reason why the worker cannot read or write all topics; None if they exist."""
        if self.seen is None:
            return "not looked for yet"
        return f"missing: {', '.join(sorted(self.seen.missing))}" if self.seen.missing else None

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def watch(self, partitions: Collection[int]) -> None:
        """Look at the offsets of these partitions of the request topic from now on, and at once if one of them is new."""
        before, self._watched = self._watched, frozenset(partitions)
        if self._watched - before:
            self._wake.set()

    def close(self) -> None:
        """Look no more. A look that is under way ends by itself."""
        self._closing = True
        self._wake.set()

    def _run(self) -> None:
        while not self._closing:
            self._wake.clear()
            try:
                self._look()
                self.reached = True
            except KafkaException as exc:
                self.reached = False
                log.debug("topics cannot be looked for", reason=exc.args[0].str())
            except KafkaFailed as exc:
                self._failed(exc)
                return
            self._admin.poll(0)  # serves its log messages
            self._wake.wait(_varied(LOOK_EVERY_S if self.existed else FIRST_LOOKS_S))

    def _look(self) -> None:
        """Ask the broker for the offsets of the worker's partitions, and for the topics if that is due.

        Raises:
            KafkaFailed: the broker refuses.
            KafkaException: it cannot be reached.
        """
        before = self.seen
        if before is None or before.missing or time.monotonic() >= self._topics_due:
            missing = self._look_at_topics()
            self.seen = self._offsets_now(missing)
            self.existed = self.existed or not missing
            return
        self.seen = self._offsets_now(before.missing)
        if self._gone or _ends_earlier(before, self.seen):
            self._topics_due = 0.0
            self._wake.set()

    def _look_at_topics(self) -> frozenset[str]:
        """Ask the broker for the topics, create missing ones at the start, and return those that are missing.

        Raises:
            KafkaFailed: the broker refuses.
            KafkaException: it cannot be reached.
        """
        found = self._existing()
        missing = frozenset(topics_of(self._settings)) - found.keys()
        if missing and self._settings.kafka_create_topics and not self.existed:
            create_topics(self._settings, missing)
            found = self._existing()
            missing = frozenset(topics_of(self._settings)) - found.keys()
        self._log_change(missing)
        topic = found.get(self._settings.kafka_request_topic)
        if topic is not None:
            self._partitions = len(topic.partitions)
            self._note_id(str(topic.topic_id))
        wait_s = topics_every_s(self._partitions)
        self._topics_due = time.monotonic() + (_varied(wait_s) if wait_s > LOOK_EVERY_S else 0)
        return missing

    def _offsets_now(self, missing: frozenset[str]) -> Seen:
        self._gone = False
        numbers = () if self._settings.kafka_request_topic in missing else self._watched
        return Seen(time.monotonic(), missing, self._offsets(numbers, EARLIEST), self._offsets(numbers, LATEST))

    def _existing(self) -> dict[str, TopicDescription]:
        """Return those of the three topics that exist."""
        found = {}
        names = TopicCollection(list(topics_of(self._settings)))
        for name, result in self._admin.describe_topics(names, request_timeout=LOOK_TIMEOUT_S).items():
            try:
                found[name] = result.result()
            except KafkaException as exc:
                error: KafkaError = exc.args[0]
                if is_fatal(error):
                    raise kafka_failed(f"Topic {name} cannot be looked for", error) from exc
                if error.code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise
        return found

    def _offsets(self, partitions: Collection[int], spec: OffsetSpec) -> dict[int, int]:
        """Return an offset of each of these partitions of the request topic that has a leader now.

        Raises:
            KafkaException: no broker can be reached.
        """
        wanted = {TopicPartition(self._settings.kafka_request_topic, number): spec for number in partitions}
        if not wanted:
            return {}
        results = self._admin.list_offsets(
            wanted, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=LOOK_TIMEOUT_S
        )
        offsets: dict[int, int] = {}
        away: KafkaException | None = None
        for partition, result in results.items():
            try:
                offsets[partition.partition] = result.result().offset
            except KafkaException as exc:
                away = exc if exc.args[0].code() in UNREACHABLE else away
                self._gone = self._gone or exc.args[0].code() in TOPIC_GONE
                log.debug("offset unknown", partition=partition.partition, reason=exc.args[0].str())
        if away is not None and not offsets:
            raise away
        return offsets

    def _note_id(self, topic_id: str) -> None:
        if topic_id == NO_ID:
            return
        before, self.topic_id = self.topic_id, topic_id
        if before not in (None, topic_id):
            self._recreated(topic_id)

    def _log_change(self, missing: frozenset[str]) -> None:
        before = self.seen.missing if self.seen is not None else frozenset()
        if missing == before:
            return
        if not missing:
            log.info("topics are there", topics=sorted(before))
        elif self.existed:
            log.error("topics are gone: create them again", missing=sorted(missing))
        else:
            log.warning("waiting for topics: create them, or set KAFKA_CREATE_TOPICS=true", missing=sorted(missing))


def _varied(seconds: float) -> float:
    return seconds * random.uniform(1 - SPREAD, 1 + SPREAD)  # noqa: S311  # nothing secret depends on it


def _ends_earlier(before: Seen | None, now: Seen) -> bool:
    """Return whether a partition ends before an offset that it had: it belongs to a topic that was created again."""
    return before is not None and any(end < before.ends.get(number, 0) for number, end in now.ends.items())


def create_topics(settings: Settings, names: Collection[str]) -> None:
    """Create these of the three topics, with the settings' count of partitions and replicas.

    Raises:
        KafkaFailed: the broker refuses; it demands rights, or has too few brokers for that many replicas.
        KafkaException: the broker cannot be reached.
    """
    admin = make_client(AdminClient, admin_properties(settings), settings)
    replication = BROKER_DEFAULT if settings.kafka_topic_replication is None else settings.kafka_topic_replication
    new = [
        NewTopic(
            name,
            num_partitions=settings.kafka_topic_partitions,
            replication_factor=replication,
            config=DLQ_CONFIG if name == settings.kafka_dlq_topic else {},
        )
        for name in names
    ]
    for name, result in admin.create_topics(new, request_timeout=CREATE_TIMEOUT_S).items():
        try:
            result.result()
        except KafkaException as exc:
            error: KafkaError = exc.args[0]
            if error.code() == KafkaError.TOPIC_ALREADY_EXISTS:
                continue  # another worker was faster
            if error.code() in UNREACHABLE:
                raise
            raise KafkaFailed(f"Topic {name} cannot be created: {error.str()}") from exc
        log.info("topic created", topic=name, partitions=settings.kafka_topic_partitions)
