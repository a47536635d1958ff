"""`--mode dlq-replay`: sends the records of dead letters back to their topic, each at most once in all replays.

The letters stay in their topic. A replay reads it twice, from its start to the end that it had at the beginning: first for
the letters that are successors of others, then to choose and send. A successor is the letter of a record that was sent by a
replay and failed again: only the last one of such a chain is ever sent.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime

from confluent_kafka import Consumer, Producer

from config import Settings
from errors import ErrorCode
from latent_encoder.kafka.connection import BrokerState
from latent_encoder.kafka.letter_topic import LetterTopic, replay_group
from latent_encoder.kafka.letters import Letter
from latent_encoder.kafka.places import Places
from latent_encoder.kafka.properties import Properties, consumer_properties, make_client
from latent_encoder.kafka.records import Incoming, Outgoing
from latent_encoder.kafka.replay_memory import Letters, ReplayMemory
from latent_encoder.kafka.replay_transactions import ReplayTransactions, replay_producer_properties

BATCH = 100
"""The most letters of one transaction: with more, the time of a transaction no longer counts."""

BATCH_BYTES = 8 * 2**20
"""Bytes of letters after which a transaction begins, so that large ones do not fill the memory."""

BATCHES_A_SECOND = 10
"""Transactions in a second of a replay with a rate, if that has so many letters: a burst is a tenth of them."""

WAIT_S = 0.1
"""Longest wait until a stop is noticed, while the rate allows no further letter."""

LEFT_OUT: dict[str, str] = {
    ErrorCode.MESSAGE_UNUSABLE: "it would fail again",
    ErrorCode.REQUEST_CRASHES_WORKER: "it would crash workers again",
}
"""Codes of letters that are sent only if their code is asked for, with the reasons."""


@dataclass(frozen=True)
class Selection:
    """The choice of dead letters to send back."""

    error_codes: frozenset[ErrorCode] = frozenset()
    """Only dead letters with one of these codes; every code except those of `LEFT_OUT` if empty."""
    since: datetime | None = None
    """Only dead letters written at that time or later."""
    until: datetime | None = None
    """Only dead letters written before that time."""
    request_id: str | None = None
    """Only dead letters of the request with that id."""
    places: tuple[Places, ...] = ()
    """Only dead letters at one of these places."""
    limit: int | None = None
    """The largest count of dead letters."""
    again: bool = False
    """Also letters that were sent before and have no successor."""

    def takes(self, letter: Letter) -> bool:
        """Return whether the letter is chosen; the limit, `again` and `LEFT_OUT` are not considered."""
        written = letter.record.timestamp or 0
        return (
            (not self.error_codes or letter.error_code in self.error_codes)
            and (self.since is None or written >= self.since.timestamp() * 1000)
            and (self.until is None or written < self.until.timestamp() * 1000)
            and (not self.places or any(places.have(letter.record) for places in self.places))
            and (self.request_id is None or letter.request_id == self.request_id)
        )


@dataclass
class ReplayTally:
    """The counts of records of a run. Those from `sent_before` to `not_whole` count letters that the selection takes."""

    read: int = 0
    foreign: int = 0
    """Records of the topic that are no dead letters of this service, or those of another consumer group."""
    sent_before: int = 0
    """Letters that a replay has sent, successors or not."""
    left_out: int = 0
    """Letters with a code of `LEFT_OUT`."""
    not_whole: int = 0
    """Letters without the whole value of their record."""
    chosen: int = 0
    sent: int = 0
    refused: int = 0

    def __str__(self) -> str:
        return (
            f"{self.read} read, {self.foreign} foreign, {self.sent_before} sent before, {self.left_out} left out, "
            f"{self.not_whole} not whole, {self.chosen} chosen, {self.sent} sent, {self.refused} refused"
        )


@dataclass(frozen=True)
class Chosen:
    """A letter that is to be sent."""

    letter: Letter
    record: Outgoing
    stretch: Letters


@dataclass
class Replay:
    """One run. `report` is called with a line of JSON for each chosen dead letter; in a dry run, for each selected one."""

    settings: Settings
    selection: Selection
    dry_run: bool
    report: Callable[[str], None]
    rate: float | None = None
    """The most letters to send in a second."""
    tally: ReplayTally = field(default_factory=ReplayTally)
    stopped: bool = False

    def stop(self) -> None:
        """End after the letters under way. Safe in a signal handler."""
        self.stopped = True

    def run(self) -> ReplayTally:
        """Send the chosen dead letters back, and remember them.

        Raises:
            SettingsError: librdkafka refuses a property.
            KafkaFailed: the broker cannot be reached, refuses access, or has no such topic; or another replay has begun.
            Exception: `report` raised it. The records sent before are counted in the tally, and remembered.
        """
        broker = BrokerState(self.settings.kafka_bootstrap_servers)
        callbacks = {"error_cb": broker.on_error}
        consumer = make_client(Consumer, self._reader_properties() | callbacks, self.settings)
        topic = LetterTopic(self.settings, consumer, broker, lambda: self.stopped)
        try:
            topic.find()
            if self.dry_run:
                self._list(topic)
            else:
                producer = make_client(Producer, replay_producer_properties(self.settings) | callbacks, self.settings)
                self._send_all(topic, ReplayTransactions(self.settings, producer, consumer, broker))
        finally:
            consumer.close()
        broker.check()
        return self.tally

    def _reader_properties(self) -> Properties:
        """Return the properties of a consumer that is no member of its group, whose offsets it only reads."""
        properties = consumer_properties(self.settings)
        properties.pop("group.instance.id", None)
        return properties | {"group.id": replay_group(self.settings), "enable.partition.eof": True}

    def _list(self, topic: LetterTopic) -> None:
        self._memories = topic.memories()
        for chosen in self._chosen(topic):
            self._note(chosen.letter, "would be sent")

    def _send_all(self, topic: LetterTopic, transactions: ReplayTransactions) -> None:
        transactions.begin()
        self._memories = topic.memories()
        batch: list[Chosen] = []
        size, due = 0, time.monotonic()
        for chosen in self._chosen(topic):
            batch.append(chosen)
            size += len(chosen.letter.record.value or b"")
            if len(batch) >= self._batch or size >= BATCH_BYTES:
                due = self._send(transactions, batch, due)
                batch, size = [], 0
        self._send(transactions, batch, due)

    @property
    def _batch(self) -> int:
        return BATCH if self.rate is None else max(1, min(BATCH, int(self.rate / BATCHES_A_SECOND)))

    def _send(self, transactions: ReplayTransactions, batch: list[Chosen], due: float) -> float:
        """Send letters when they are due, and return the time at which the next ones are."""
        while time.monotonic() < due and not self.stopped:
            time.sleep(min(WAIT_S, max(0.0, due - time.monotonic())))
        begun = time.monotonic()
        while batch and not self.stopped:
            refused = transactions.send([chosen.record for chosen in batch], self._memories_after(batch))
            if not refused:
                self._sent(batch)
                break
            for record, error in refused:
                (chosen,) = (chosen for chosen in batch if chosen.record is record)
                batch.remove(chosen)
                self._refused(chosen.letter, error.str())
        return begun + (len(batch) / self.rate if self.rate else 0)

    def _memories_after(self, batch: list[Chosen]) -> dict[int, ReplayMemory]:
        memories = {n: memory.copy() for n, memory in self._memories.items()}
        for chosen in batch:
            memories[chosen.letter.record.partition].sent(chosen.stretch)
        return memories

    def _sent(self, batch: list[Chosen]) -> None:
        self._memories = self._memories_after(batch)
        self.tally.sent += len(batch)
        for chosen in batch:
            self._note(chosen.letter, "sent")

    def _refused(self, letter: Letter, reason: str) -> None:
        self.tally.refused += 1
        self._note(letter, "refused", reason=reason)

    def _chosen(self, topic: LetterTopic) -> Iterator[Chosen]:
        """Yield each letter to send, and put every letter that waits into the memory of its partition."""
        successors = self._successors(topic)
        last_ends = {n: first for n, (first, _) in topic.marks.items()}
        for letter in self._letters(topic):
            partition, end = letter.record.partition, letter.record.offset + 1
            stretch = Letters(last_ends[partition], end)
            last_ends[partition] = end
            if letter.is_whole:
                self._memories[partition].read(stretch)
            if self.selection.takes(letter) and self._is_to_be_sent(letter, successors):
                self.tally.chosen += 1
                yield Chosen(letter, letter.revived(), stretch)
                if self.tally.chosen == self.selection.limit:
                    return

    def _letters(self, topic: LetterTopic) -> Iterator[Letter]:
        """Yield the letters of our group."""
        for record in topic.records():
            self.tally.read += 1
            letter = self._ours(record)
            if letter is None:
                self.tally.foreign += 1
            else:
                yield letter

    def _ours(self, record: Incoming) -> Letter | None:
        letter = Letter.of(record, self.settings)
        return letter if letter is not None and letter.group == self.settings.kafka_consumer_group else None

    def _successors(self, topic: LetterTopic) -> set[tuple[str, bytes]]:
        """Return the place and the content of each letter that has a successor.

        The content counts because every client can write the header: a forged one must not hold back another request.
        """
        letters = (self._ours(record) for record in topic.records())
        return {(letter.replay_of, letter.content) for letter in letters if letter is not None and letter.replay_of}

    def _is_to_be_sent(self, letter: Letter, successors: set[tuple[str, bytes]]) -> bool:
        """Return whether a letter that the selection takes is to be sent; if it is not, count the reason."""
        superseded = (letter.place, letter.content) in successors
        sent = superseded or self._memories[letter.record.partition].was_sent(letter.record.offset)
        if not letter.is_whole:
            self.tally.not_whole += 1
            self._list_only(letter, "cannot be sent", "the dead letter has not the whole value of its record")
        elif sent and (superseded or not self.selection.again):
            self.tally.sent_before += 1
            self._list_only(letter, "sent before", "a later dead letter took its place" if superseded else None)
        elif letter.error_code in LEFT_OUT and not self.selection.error_codes:
            self.tally.left_out += 1
            self._list_only(letter, "left out", f"{LEFT_OUT[letter.error_code]}; --error-code {letter.error_code} chooses it")
        elif letter.original.topic != self.settings.kafka_request_topic:
            reason = f"its topic {letter.original.topic} is not the request topic {self.settings.kafka_request_topic}"
            self._refused(letter, f"{reason}; --request-topic names another")
        else:
            return True
        return False

    def _list_only(self, letter: Letter, action: str, reason: str | None) -> None:
        if self.dry_run:
            self._note(letter, action, reason)

    def _note(self, letter: Letter, action: str, reason: str | None = None) -> None:
        line = {"action": action, **letter.described(time.time() * 1000)}
        self.report(json.dumps(line | ({"reason": reason} if reason else {}), ensure_ascii=False))
