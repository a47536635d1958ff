"""The file that KAFKA_CLIENT_CONFIG names: one property of librdkafka a line, as `name=value`.

Blank lines and lines that begin with `#` are left out. The value is the rest of its line without the spaces around it, quotes
included. Every other line is refused with its number and the reason, because a line that is read in another way than it was
meant changes the client without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from config import SettingsError
from latent_encoder.masking import keep_secret
from latent_encoder.small_files import read_small_file

MOST_FAULTS_SHOWN = 3
"""A key that was pasted over many lines gives a fault for each; the first ones show the cause."""

_NAME = re.compile(r"[a-z][a-z0-9._-]*")
_DOTTED = re.compile(r"[A-Za-z][A-Za-z0-9]*([._-][A-Za-z0-9]+)+")  # a line of a key in Base64 has none of `.`, `_`, `-`
_SECRET = re.compile(
    r"passw|passphrase|secret|token|jaas|credential|key\.pem|private\.key|oauthbearer\.config|assertion\.claim"
)
_PLACE = re.compile(r"\.(url|file|location)$")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_NUMERIC = re.compile(r"\.(ms|bytes|kbytes|messages)$")
_BEGINS_AS_NUMBER = re.compile(r"[+-]?\d")
_INTEGER = re.compile(r"-?\d{1,10}")
_DECIMAL = re.compile(r"\d{1,10}\.\d+")
_TAKE_DECIMALS = ("linger.ms", "queue.buffering.max.ms")

LARGEST_NUMBER = 2**31 - 1
"""librdkafka keeps these properties in 32 bits, and takes a larger number for another one."""


ALIASES = {
    "compression.type": "compression.codec",
    "max.in.flight": "max.in.flight.requests.per.connection",
    "queue.buffering.max.ms": "linger.ms",
    "sasl.mechanisms": "sasl.mechanism",
}
"""librdkafka's second names of properties that the file may set, with their first names."""


class Property(NamedTuple):
    """One line of the file."""

    line: int
    value: str


class Fault(NamedTuple):
    """A line that cannot be used, and the reason without the content of the line."""

    line: int
    reason: str
    of_value: bool
    """True if the line has a name and a value, and the value is at fault."""


def is_secret(name: str) -> bool:
    """Return whether the value of a property must never be shown."""
    return _SECRET.search(name) is not None


def read_property_file(path: Path) -> dict[str, Property]:
    """Return the properties in a file by their names. The secrets among them are masked in all logs from now on.

    Raises:
        SettingsError: the file cannot be read, or a line cannot be used. The text has no value and no unreadable line.
    """
    try:
        text = read_small_file(path)
    except ValueError as exc:
        raise SettingsError(f"KAFKA_CLIENT_CONFIG: {path} cannot be read ({exc}).") from None
    properties: dict[str, Property] = {}
    faults = list(_read_into(properties, text))
    for name, found in properties.items():
        if is_secret(name) and not _PLACE.search(name):
            keep_secret(found.value)
    if faults:
        raise SettingsError(f"KAFKA_CLIENT_CONFIG: {path} {_listed(faults)}.")
    return properties


def _listed(faults: list[Fault]) -> str:
    wrong = "cannot be used" if all(fault.of_value for fault in faults) else "is not a file of name=value lines"
    shown = "; ".join(f"line {fault.line}: {fault.reason}" for fault in faults[:MOST_FAULTS_SHOWN])
    more = f"; and {len(faults) - MOST_FAULTS_SHOWN} more" if len(faults) > MOST_FAULTS_SHOWN else ""
    return f"{wrong}: {shown}{more}"


def _read_into(properties: dict[str, Property], text: str) -> Iterator[Fault]:
    """Add the properties in a text; yield each line that cannot be used."""
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        content = line.removesuffix("\r").rstrip(" \t")
        if not content or content.lstrip(" \t").startswith("#"):
            continue
        name, equals, value = (part.strip(" \t") for part in content.partition("="))
        before = lines.setdefault(ALIASES.get(name, name), number)
        if fault := _fault_of_line(content) or _fault_of_name(name, equals):
            yield Fault(number, fault, of_value=False)
        elif before != number:
            yield Fault(number, f"{name} was set in line {before}", of_value=False)
        elif fault := _fault_of_value(name, value):
            yield Fault(number, fault, of_value=True)
        else:
            properties[name] = Property(number, value)


def _fault_of_line(content: str) -> str | None:
    if content[0] in " \t":
        return "begins with a space; a value cannot go on in the next line"
    if content[0] == "[":
        return "sections in [brackets] are not known; remove it"
    if content[0] in ";!":
        return f"a comment begins with #, not with {content[0]}"
    if _CONTROL.search(content):
        return "has a control character"
    return None


def _fault_of_name(name: str, equals: str) -> str | None:
    if not equals:
        return "has no ="
    if _NAME.fullmatch(name):
        return None
    shown = f"{name} is" if _DOTTED.fullmatch(name) else "the part before = is"
    return f"{shown} no property: names have lower-case letters, digits, dots, _ and -"


def _fault_of_value(name: str, value: str) -> str | None:
    if not value:
        return f"{name} has no value; remove the line"
    if value.endswith("\\"):
        return f"{name} ends with a backslash; a value cannot go on in the next line"
    if re.search(r"\s[#;]", value) and not is_secret(name) and not name.endswith(".cmd"):
        return f"{name} has a comment behind its value; put it into a line of its own"
    if _NUMERIC.search(name) and _BEGINS_AS_NUMBER.match(value) and not _is_number(name, value):
        return f"{name} must be a whole number without a unit, at most {LARGEST_NUMBER}"
    return None


def _is_number(name: str, value: str) -> bool:
    """Return whether librdkafka reads the whole value. It would take `45s` for 45, and `0x10` for 16."""
    if name in _TAKE_DECIMALS and _DECIMAL.fullmatch(value):
        return True
    return _INTEGER.fullmatch(value) is not None and abs(int(value)) <= LARGEST_NUMBER
