"""The records of the three topics: reading a request, making its response, making its dead letter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import methodcaller
from typing import Any, cast
from uuid import NAMESPACE_URL, uuid5

from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, KafkaError, Message

from config import VERSION, Settings
from errors import MessageUnusable, RequestError, one_line
from latent_encoder.requests import find_text, parse_request, read_fields, usable_text
from models import EncodeRequest, ResponseMessage

Headers = tuple[tuple[str, bytes | None], ...]
RawHeaders = list[tuple[str, str | bytes | None]]  # the client's stub also names a dict

# The headers that a dead letter has in addition to those of its record.
ERROR_CODE = "dlq.error.code"
ERROR_MESSAGE = "dlq.error.message"
ERROR_CLASS = "dlq.error.class"
ORIGINAL_TOPIC = "dlq.original.topic"
ORIGINAL_PARTITION = "dlq.original.partition"
ORIGINAL_OFFSET = "dlq.original.offset"
ORIGINAL_TIMESTAMP = "dlq.original.timestamp"
GROUP = "dlq.consumer.group"
ATTEMPTS = "dlq.attempts"
SERVICE_VERSION = "dlq.service.version"
DLQ_HEADERS = (
    ERROR_CODE,
    ERROR_MESSAGE,
    ERROR_CLASS,
    ORIGINAL_TOPIC,
    ORIGINAL_PARTITION,
    ORIGINAL_OFFSET,
    ORIGINAL_TIMESTAMP,
    GROUP,
    ATTEMPTS,
    SERVICE_VERSION,
)

# The headers of a dead letter that lacks a part of its record, with the count of bytes that the part had.
VALUE_OMITTED = "dlq.value.omitted"
KEY_OMITTED = "dlq.key.omitted"
HEADERS_OMITTED = "dlq.headers.omitted"
OMISSIONS = (VALUE_OMITTED, KEY_OMITTED, HEADERS_OMITTED)
UNREADABLE = "unreadable"
"""The content of HEADERS_OMITTED if the headers could not be read, so that their size is unknown."""
# The headers that a replayed record has, and the dead letter that is made of it. A dead letter has the id if it is known.
REQUEST_ID = "dlq.request.id"
REPLAYS = "dlq.replays"
REPLAY_OF = "dlq.replay.of"
REPLAY_HEADERS = (REQUEST_ID, REPLAYS, REPLAY_OF)

LONGEST_COUNT = 9
"""Digits of the largest count that a header may have. Every client can write these headers, and no real count is larger."""

_headers_of = methodcaller("headers")
"""The call of `Message.headers`. For a name that is not UTF-8 the client returns a damaged list beside its exception. Python
checks that for a call from C, and raises; its own calls skip the check once they are optimised.
"""


@dataclass(frozen=True)
class Incoming:
    """A record as it was consumed. `timestamp` is in milliseconds of Unix time, or None if the record has none.

    `headers_fault` is the reason why the headers could not be read; they are empty then.
    """

    topic: str
    partition: int
    offset: int
    timestamp: int | None
    key: bytes | None
    value: bytes | None
    headers: Headers
    headers_fault: str | None = None

    @classmethod
    def of(cls, message: Message) -> Incoming:
        """Copy a message that holds no error."""
        kind, timestamp = message.timestamp()
        topic, partition, offset = message.topic(), message.partition(), message.offset()
        assert topic is not None
        assert partition is not None
        assert offset is not None
        headers, fault = _read_headers(message)
        return cls(
            topic=topic,
            partition=partition,
            offset=offset,
            timestamp=None if kind == TIMESTAMP_NOT_AVAILABLE else timestamp,
            key=_bytes(message.key()),
            value=_bytes(message.value()),
            headers=headers,
            headers_fault=fault,
        )

    @property
    def place(self) -> dict[str, str | int]:
        """Topic, partition and offset, as fields of a log event."""
        return {"topic": self.topic, "partition": self.partition, "offset": self.offset}


@dataclass(frozen=True)
class Outgoing:
    """A record to produce."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers


RefusedRecord = tuple[Outgoing, KafkaError]
"""A record that the broker did not take, and the broker's error."""


@dataclass(frozen=True)
class Sender:
    """The ids that an error response is addressed with, and the image for log events."""

    request_id: str | None
    correlation_id: str | None
    image_path: str | None = None


def read_request(record: Incoming, settings: Settings) -> EncodeRequest:
    """Return the request that a record holds.

    A request without an id gets that of its header `dlq.request.id`, which a replay adds; without the header, one made of its
    topic, partition and offset. So a second delivery and a replay have the same id.

    Raises:
        MessageUnusable: the record holds no JSON object, is larger than `KAFKA_MAX_MESSAGE_BYTES`, or has headers that cannot
            be read.
        InvalidRequest: a field is missing, of the wrong type or out of range.
    """
    if record.headers_fault is not None:
        raise MessageUnusable(
            f"The headers of the record cannot be read: {record.headers_fault}. Send it with header names in UTF-8."
        )
    try:
        fields = _read_fields(record.value, settings.kafka_max_message_bytes)
        if fields.get("request_id") is None:
            fields["request_id"] = _id_of_header(record) or _id_of_place(record)
        return parse_request(fields, settings.request_defaults)
    except RequestError:
        raise
    except Exception as exc:  # one record that nobody thought of ends no worker
        raise MessageUnusable(f"The message cannot be read: {type(exc).__name__}: {one_line(exc)}.") from exc


def sender_of(record: Incoming, max_bytes: int) -> Sender:
    """Return the ids and the image of a request that may be invalid.

    An unusable message has an id only if exactly one can be found in it (`find_text`). For example, a message that was cut off
    after `"request_id": "a"` has the id `a`.
    """
    try:
        fields = _read_fields(record.value, max_bytes)
    except Exception:  # MessageUnusable, or a fault that `read_request` reports
        value = record.value or b""
        request_id = find_text(value, "request_id") or _id_of_header(record)
        return Sender(request_id, find_text(value, "correlation_id"), find_text(value, "image_path"))
    request_id = usable_text(fields, "request_id") or _id_of_header(record) or _id_of_place(record)
    return Sender(request_id, usable_text(fields, "correlation_id"), usable_text(fields, "image_path"))


def header_text(record: Incoming, name: str) -> str | None:
    """Return the last header of that name, or None if it is absent, empty or not UTF-8."""
    try:
        return (dict(record.headers).get(name) or b"").decode() or None
    except UnicodeDecodeError:
        return None


def header_count(record: Incoming, name: str) -> int:
    """Return the number in a header, 0 if it has none of at most `LONGEST_COUNT` digits."""
    text = header_text(record, name) or ""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= LONGEST_COUNT else 0


def _id_of_header(record: Incoming) -> str | None:
    return usable_text({"request_id": header_text(record, REQUEST_ID)}, "request_id")


def _id_of_place(record: Incoming) -> str:
    return str(uuid5(NAMESPACE_URL, f"kafka:{record.topic}/{record.partition}/{record.offset}"))


def _read_fields(value: bytes | None, max_bytes: int) -> dict[str, Any]:
    if value is None:
        raise MessageUnusable("The message has no value; a request is a JSON object.")
    if len(value) > max_bytes:
        raise MessageUnusable(f"The message has {len(value)} bytes, more than KAFKA_MAX_MESSAGE_BYTES={max_bytes}.")
    return read_fields(value)


def response_record(record: Incoming, message: ResponseMessage, topic: str) -> Outgoing:
    """Return the record of a response, with the headers and the key of the request's record; without a key, the request id."""
    key = message.request_id.encode() if record.key is None else record.key
    return Outgoing(topic, key, message.model_dump_json().encode(), record.headers)


def dead_letter(record: Incoming, error: RequestError, attempts: int, settings: Settings) -> Outgoing:
    """Return the dead letter of a record: its key, value and headers untouched, and the headers of `DLQ_HEADERS`.

    It keeps the headers of a replay (`REPLAY_HEADERS`). Its attempts include those before the replay.
    """
    cause = type(error.__cause__ or error)
    added = {
        ERROR_CODE: error.code,
        ERROR_MESSAGE: str(error),
        ERROR_CLASS: cause.__qualname__ if cause.__module__ == "builtins" else f"{cause.__module__}.{cause.__qualname__}",
        ORIGINAL_TOPIC: record.topic,
        ORIGINAL_PARTITION: record.partition,
        ORIGINAL_OFFSET: record.offset,
        ORIGINAL_TIMESTAMP: "" if record.timestamp is None else record.timestamp,
        GROUP: settings.kafka_consumer_group,
        ATTEMPTS: header_count(record, ATTEMPTS) + attempts,
        SERVICE_VERSION: VERSION,
    }
    request_id = sender_of(record, settings.kafka_max_message_bytes).request_id
    if request_id is not None:
        added[REQUEST_ID] = request_id
    if record.headers_fault is not None:
        added[HEADERS_OMITTED] = UNREADABLE
    kept = tuple((name, value) for name, value in record.headers if name not in added)
    headers = kept + tuple((name, str(value).encode()) for name, value in added.items())
    return Outgoing(settings.kafka_dlq_topic, record.key, record.value, headers)


def smaller(letter: Outgoing) -> Outgoing | None:
    """Return a dead letter without its largest part, which is the value, the key, or the headers of its record.

    A header has the count of bytes that are left out. Return None if nothing is left that could be left out.
    """
    original, own = _split(letter.headers)
    sizes = {
        VALUE_OMITTED: len(letter.value or b""),
        KEY_OMITTED: len(letter.key or b""),
        HEADERS_OMITTED: sum(len(name.encode()) + len(value or b"") for name, value in original),
    }
    largest = max(sizes, key=lambda part: sizes[part])
    if not sizes[largest]:
        return None
    marked = (*own, (largest, str(sizes[largest]).encode()))
    if largest == VALUE_OMITTED:
        return replace(letter, value=None, headers=original + marked)
    if largest == KEY_OMITTED:
        return replace(letter, key=None, headers=original + marked)
    return replace(letter, headers=marked)


def omitted(record: Incoming) -> dict[str, str]:
    """Return the parts that a dead letter lacks: of VALUE_OMITTED, KEY_OMITTED and HEADERS_OMITTED those in its headers."""
    _, own = _split(record.headers)
    return {name: (value or b"").decode() for name, value in own if name in OMISSIONS}


def _split(headers: Headers) -> tuple[Headers, Headers]:
    """Return the headers of the original record, and those that its dead letter added, which begin with ERROR_CODE."""
    last = max((n for n, (name, _) in enumerate(headers) if name == ERROR_CODE), default=len(headers))
    return headers[:last], headers[last:]


def _read_headers(message: Message) -> tuple[Headers, str | None]:
    """Return the headers of a message, or none and the reason. Call it once: a second call would return damaged headers."""
    try:
        found = cast(RawHeaders, _headers_of(message) or ())
        return tuple((name, _bytes(value)) for name, value in found), None
    except Exception as exc:  # SystemError, caused by UnicodeDecodeError
        return (), one_line(exc.__cause__ or exc)


def _bytes(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value
