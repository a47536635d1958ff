"""Dead letters as they are read from their topic, and the records that a replay makes of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256

from config import Settings
from latent_encoder.kafka.records import (
    ATTEMPTS,
    DLQ_HEADERS,
    ERROR_CODE,
    ERROR_MESSAGE,
    GROUP,
    KEY_OMITTED,
    OMISSIONS,
    ORIGINAL_OFFSET,
    ORIGINAL_PARTITION,
    ORIGINAL_TOPIC,
    REPLAY_HEADERS,
    REPLAY_OF,
    REPLAYS,
    REQUEST_ID,
    VALUE_OMITTED,
    Incoming,
    Outgoing,
    header_count,
    header_text,
    omitted,
    sender_of,
)


@dataclass(frozen=True)
class Letter:
    """A dead letter of any worker of this service."""

    record: Incoming
    original: Incoming
    """The record that it was made of, as far as the letter has it."""
    max_bytes: int
    """Bytes of the largest request."""

    @classmethod
    def of(cls, record: Incoming, settings: Settings) -> Letter | None:
        """Return the letter that a record of the topic holds; None if it lacks one of the headers, or they are damaged."""
        texts = {name: header_text(record, name) for name in DLQ_HEADERS}
        numbers = [texts[name] or "" for name in (ORIGINAL_PARTITION, ORIGINAL_OFFSET)]
        names = {name for name, value in record.headers if value is not None}
        if not names.issuperset(DLQ_HEADERS) or not all(re.fullmatch(r"[0-9]{1,18}", number) for number in numbers):
            return None
        topic, code = texts[ORIGINAL_TOPIC], texts[ERROR_CODE]
        if topic is None or code is None:
            return None
        original = replace(record, topic=topic, partition=int(numbers[0]), offset=int(numbers[1]))
        return cls(record, original, settings.kafka_max_message_bytes)

    @property
    def place(self) -> str:
        return f"{self.record.topic}/{self.record.partition}/{self.record.offset}"

    @property
    def error_code(self) -> str:
        return header_text(self.record, ERROR_CODE) or ""

    @property
    def group(self) -> str:
        """The consumer group of the worker that made it."""
        return header_text(self.record, GROUP) or ""

    @property
    def attempts(self) -> int:
        return header_count(self.record, ATTEMPTS)

    @property
    def replays(self) -> int:
        """Count of replays before the failure that it reports."""
        return header_count(self.record, REPLAYS)

    @property
    def replay_of(self) -> str | None:
        """Place of the letter whose replay failed and became this one."""
        return header_text(self.record, REPLAY_OF)

    @property
    def is_whole(self) -> bool:
        """It has the key and the value of its record."""
        return not omitted(self.record).keys() & {VALUE_OMITTED, KEY_OMITTED}

    @cached_property
    def request_id(self) -> str | None:
        """The id of the request; a request without one has that of its first place. None if the message is unusable."""
        return sender_of(self.original, self.max_bytes).request_id

    @property
    def content(self) -> bytes:
        """A checksum of key and value, which a replay does not change."""
        parts = (self.record.key, self.record.value)
        return sha256(b"".join(b"-" if part is None else b"%d:%b" % (len(part), part) for part in parts)).digest()

    def described(self, now_ms: float) -> dict[str, str | int | None]:
        """Return the letter's facts for a person; `now_ms` is in milliseconds of Unix time."""
        written = self.record.timestamp
        return {
            "dead_letter": self.place,
            "request": f"{self.original.topic}/{self.original.partition}/{self.original.offset}",
            "key": None if self.record.key is None else self.record.key.decode(errors="backslashreplace"),
            "request_id": self.request_id,
            "error_code": self.error_code,
            "error_message": dict(self.record.headers)[ERROR_MESSAGE].decode(errors="replace"),  # type: ignore[union-attr]
            "attempts": self.attempts,
            "replays": self.replays,
            "age_s": None if written is None else max(0, round((now_ms - written) / 1000)),
        }

    def revived(self) -> Outgoing:
        """Return the record that it was made of, for its original topic, with the headers of a replay."""
        added = {ATTEMPTS: self.attempts, REQUEST_ID: self.request_id, REPLAYS: self.replays + 1, REPLAY_OF: self.place}
        dropped = {*DLQ_HEADERS, *REPLAY_HEADERS, *OMISSIONS}
        kept = tuple(header for header in self.record.headers if header[0] not in dropped)
        headers = kept + tuple((name, str(value).encode()) for name, value in added.items() if value is not None)
        return Outgoing(self.original.topic, self.record.key, self.record.value, headers)
