"""The three topics: creating them if KAFKA_CREATE_TOPICS is set, waiting until they exist, and watching them from then on."""

from __future__ import annotations

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
"""Wait between later looks. The lag is as old as that at most, and a look takes three small requests."""

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


@dataclass(frozen=True)
class Seen:
    """The broker's responses to one look."""

    at: float
    """Seconds of the monotonic clock."""
    missing: frozenset[str]
    starts: Mapping[int, int]
    """The first offset that the broker still has, of each partition of the request topic."""
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
        self._closing = threading.Event()
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

    def close(self) -> None:
        """Look no more. A look that is under way ends by itself."""
        self._closing.set()

    def _run(self) -> None:
        while not self._closing.is_set():
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
            self._closing.wait(LOOK_EVERY_S if self.existed else FIRST_LOOKS_S)

    def _look(self) -> None:
        """Ask the broker for the topics and for the offsets of the request topic, and create missing topics at the start.

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
            self._note_id(str(topic.topic_id))
        numbers = [partition.id for partition in topic.partitions] if topic is not None else []
        self.seen = Seen(time.monotonic(), missing, self._offsets(numbers, EARLIEST), self._offsets(numbers, LATEST))
        self.existed = self.existed or not missing

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
        """Return an offset of each partition of the request topic that has a leader now."""
        wanted = {TopicPartition(self._settings.kafka_request_topic, number): spec for number in partitions}
        if not wanted:
            return {}
        results = self._admin.list_offsets(
            wanted, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=LOOK_TIMEOUT_S
        )
        offsets = {}
        for partition, result in results.items():
            try:
                offsets[partition.partition] = result.result().offset
            except KafkaException as exc:
                log.debug("offset unknown", partition=partition.partition, reason=exc.args[0].str())
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
