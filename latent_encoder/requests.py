"""Reading a request: from bytes to fields, from fields to an `EncodeRequest`, and the text of each fault in it."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal
from uuid import uuid4

from pydantic import ValidationError

from errors import InvalidRequest, MessageUnusable, one_line
from latent_encoder.masking import masked
from latent_encoder.suggestions import closest
from models import EncodeRequest

LONGEST_VALUE = 80  # characters of a wrong value in an error message: enough to recognise it, and it stays on one line

NOT_UTF8 = "is not UTF-8, so no response can hold it"

FieldName = Literal["request_id", "correlation_id", "image_path"]

SEARCHED_BYTES = 65_536
"""Length of the beginning and of the end of an unusable message in which an id is looked for. Senders write the id before or
after the large field that made the message unusable, and the short fields of a request fit into 64 KiB many times over."""

MOST_CANDIDATES = 100
"""The largest count of different texts that are tried as an id. A request has one; checking a hundred takes a millisecond."""

# Python's own `repr` fails on a deeply nested value, and takes seconds for one of some megabytes.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = LONGEST_VALUE


def read_fields(message: bytes) -> dict[str, Any]:
    """Return the fields of a request that is written as one JSON object in UTF-8.

    Raises:
        MessageUnusable: the message is anything else.
    """
    try:
        fields = json.loads(message.decode("utf-8-sig"))
    except UnicodeDecodeError as exc:
        raise MessageUnusable(f"The message is not UTF-8: {one_line(exc)}.") from exc
    except (ValueError, RecursionError, MemoryError) as exc:
        raise MessageUnusable(f"The message is not JSON: {one_line(exc)}.") from exc
    if not isinstance(fields, dict):
        raise MessageUnusable(f"The message is JSON but not an object: {type(fields).__name__}.")
    return fields


def parse_request(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> EncodeRequest:
    """Return the request with these fields. A field that is absent or null takes its value from `defaults`.

    Raises:
        InvalidRequest: a field is missing, of the wrong type or out of range; the text names each such field.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return EncodeRequest.model_validate({**defaults, **given})
    except ValidationError as exc:
        raise InvalidRequest(f"Invalid request: {'; '.join(descriptions(exc))}") from exc


def request_id_of(fields: Mapping[str, Any]) -> str:
    """Return the id for the response to an invalid request: its own if that is valid, else a new UUID4."""
    return usable_text(fields, "request_id") or str(uuid4())


def usable_text(fields: Mapping[str, Any], name: FieldName) -> str | None:
    """Return that field of a request, whose other fields may be invalid, or None if the field itself is absent or invalid."""
    try:
        value: str | None = getattr(EncodeRequest.model_validate({"image_path": "-", name: fields[name]}), name)
    except (KeyError, ValidationError):
        return None
    return value


def find_text(message: bytes, name: FieldName) -> str | None:
    """Return the valid value of that field in a message that is no JSON object, if exactly one can be found.

    The field may be at any depth. Only the first and the last SEARCHED_BYTES of the message are searched, so that the time and
    the memory do not grow with it.
    """
    literals: set[bytes] = set()
    for literal in _strings(message, name):
        literals.add(literal)
        if len(literals) > MOST_CANDIDATES:
            return None
    found = {value for literal in literals if (value := _usable_literal(literal, name)) is not None}
    return found.pop() if len(found) == 1 else None


def _usable_literal(literal: bytes, name: FieldName) -> str | None:
    try:
        return usable_text({name: json.loads(literal)}, name)
    except ValueError:  # the string itself is damaged: not UTF-8, or with a control character
        return None


def _strings(message: bytes, name: FieldName) -> Iterator[bytes]:
    """Yield every JSON string that follows that name, with its quotes."""
    # Possessive, so that the match keeps no way back for each character.
    pattern = re.compile(rb'"%s"\s*+:\s*+("(?:[^"\\]|\\.)*+")' % name.encode())
    whole = len(message) <= 2 * SEARCHED_BYTES
    for part in (message,) if whole else (message[:SEARCHED_BYTES], message[-SEARCHED_BYTES:]):
        for match in pattern.finditer(part):
            yield match[1]


def descriptions(
    exc: ValidationError, name: Callable[[str], str] = str, hides: Callable[[str, object], bool] = lambda _field, _value: False
) -> list[str]:
    """Return each fault that pydantic found as `field: reason (got value)`; `name` turns a field into the name to show.

    `hides` tells of a field and its value if the value must not be shown.
    """
    return [_description(dict(error), name, hides) for error in exc.errors(include_url=False)]


def _description(error: Mapping[str, Any], name: Callable[[str], str], hides: Callable[[str, object], bool]) -> str:
    field, given = str(error["loc"][0]), error["input"]
    reason = NOT_UTF8 if error["type"] == "string_unicode" else str(error["msg"]).removeprefix("Value error, ")
    if hides(field, given):
        reason += " (the value is not shown, because it may be a secret)"
    elif error["type"] != "missing":
        value = masked(_SHORT.repr(masked(given) if isinstance(given, str) else given))  # first masked, then cut
        shown = value if len(value) <= LONGEST_VALUE else value[: LONGEST_VALUE - 1] + "…"
        reason += f" (got {shown}{_suggestion(error)})"
    return f"{name(field)}: {reason}"


def _suggestion(error: Mapping[str, Any]) -> str:
    """Suggest the allowed name that is closest to a wrong one. pydantic lists the allowed ones in a text, each in quotes."""
    if error["type"] != "literal_error" or not isinstance(error["input"], str):
        return ""
    meant = closest(error["input"], re.findall(r"'([^']*)'", error["ctx"]["expected"]))
    return "" if meant is None else f"; did you mean {meant!r}?"
