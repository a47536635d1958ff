"""The file `.env`: `NAME=value` lines, read as a shell reads them. A line that cannot be read so is a fault with its number.

python-dotenv knows the quotes, comments and `export`. Expanding `${NAME}` is done here, because python-dotenv expands it
between single quotes too, and takes an unset variable for an empty one.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

from dotenv.parser import Binding, parse_stream

from latent_encoder.small_files import read_small_file

MOST_FAULTS_SHOWN = 3
"""A file of another kind gives a fault for each line; the first ones show the cause."""

_NAME = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)
_SINGLE_QUOTED = re.compile(r"[^=]*=[^\S\r\n]*'")
_REFERENCE = re.compile(r"(?<!\\)\$\{([A-Za-z_]\w*)(?::-((?:(?!\$\{)[^}])*))?\}", re.ASCII)
_LINE = re.compile(r"\r\n|\n|\r")
_ASSIGNED = re.compile(r"\s*(?:export\s+)?([A-Za-z_]\w*)\s*=", re.ASCII)


@dataclass
class EnvFile:
    """The variables of the file by their names in lower case, and its faults, none of which shows a value."""

    variables: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    lines: dict[str, list[int]] = field(default_factory=dict)
    """The numbers of the lines that set each variable; the last one counts."""

    @property
    def repeated(self) -> dict[str, list[int]]:
        """The variables that several lines set, with the numbers of the lines."""
        return {name: lines for name, lines in self.lines.items() if len(lines) > 1}

    def shown_faults(self) -> list[str]:
        """Return the first faults, and the count of the others."""
        more = len(self.faults) - MOST_FAULTS_SHOWN
        return [*self.faults[:MOST_FAULTS_SHOWN], *([f".env: {more} more lines cannot be used"] if more > 0 else [])]


def read_env_file(path: Path, settings: Collection[str]) -> EnvFile:
    """Return the content of the file; empty if there is none.

    Only faults of lines that set one of the `settings`, given by their names in lower case, or that cannot be read at all are
    reported: other programs may share the file.
    """
    found = EnvFile()
    try:
        text = _text(path)
    except ValueError as exc:
        found.faults.append(f"{path}: cannot be read ({exc})")
        return found
    values: dict[str, str] = {}
    for binding in parse_stream(StringIO(text)):
        try:
            _read_into(found, values, binding, settings)
        except ValueError as exc:
            found.faults.append(f"{path}: line {_line_of(binding)}: {exc}")
    return found


def _text(path: Path) -> str:
    """Return the text of the file; empty if there is none, or a device such as `/dev/null` in its place.

    Raises:
        ValueError: it cannot be read. A virtual environment in a folder `.env` counts as no file.
    """
    if not os.path.lexists(path):
        return ""
    try:
        mode = path.stat().st_mode
    except OSError as exc:
        raise ValueError(exc.strerror or type(exc).__name__) from None
    if stat.S_ISCHR(mode) or (path / "pyvenv.cfg").is_file():
        return ""
    text = read_small_file(path)
    if "\0" in text:
        raise ValueError("it has NUL characters; save it as UTF-8")
    return text


def _read_into(found: EnvFile, values: dict[str, str], binding: Binding, settings: Collection[str]) -> None:
    """Add the variable of a line.

    Raises:
        ValueError: the line cannot be used. The text has the reason, without the content of the line.
    """
    if binding.error:
        raise ValueError("is not NAME=value, or has a quote without its second one")
    if binding.key is None:  # a comment, or blank lines at the end
        return
    if binding.value is None:
        raise ValueError("has no =")
    if not _NAME.fullmatch(binding.key):
        raise ValueError("has a name that no variable can have")
    name = binding.key.lower()
    _refuse_swallowed_lines(binding, name, settings)
    values[binding.key] = found.variables[name] = _value(binding, values, strict=name in settings)
    found.lines.setdefault(name, []).append(_line_of(binding))


def _refuse_swallowed_lines(binding: Binding, name: str, settings: Collection[str]) -> None:
    """Refuse a quoted value over several lines if it is a setting's, or if it swallows the line of a setting."""
    _, *others = _LINE.split(binding.original.string.strip())
    swallowed = {assigned[1].lower() for line in others if (assigned := _ASSIGNED.match(line))}
    if others and (name in settings or swallowed & set(settings)):
        raise ValueError(f"has a quoted value of {len(others) + 1} lines; is its second quote missing?")


def _value(binding: Binding, values: Mapping[str, str], *, strict: bool) -> str:
    """Return the value with each `${NAME}` and `${NAME:-default}` expanded, unless it stands between single quotes.

    An earlier line gives the value, else the environment. Only a `strict` value has to be expanded completely.

    Raises:
        ValueError: a variable is not set and has no default, or another form of `${` is used.
    """
    value = binding.value or ""
    if "${" not in value or _SINGLE_QUOTED.match(binding.original.string):
        return value
    setting = f"{binding.key}: " if strict else ""
    if strict and "${" in _REFERENCE.sub("", value):
        raise ValueError(
            f"{setting}only ${{NAME}} and ${{NAME:-default}} are expanded; put a value with another ${{ between single quotes"
        )

    def replaced(reference: re.Match[str]) -> str:
        given = values.get(reference[1], os.environ.get(reference[1]))
        if given is None and reference[2] is None and strict:
            raise ValueError(
                f"{setting}the variable in ${{…}} is not set; set it, give a default as in ${{NAME:-default}}, "
                "or put the value between single quotes"
            )
        return given or reference[2] or ""

    return _REFERENCE.sub(replaced, value)


def _line_of(binding: Binding) -> int:
    """Return the number of the line that a binding begins in; python-dotenv counts blank lines before it to it."""
    text = binding.original.string
    return binding.original.line + len(_LINE.findall(text[: len(text) - len(text.lstrip())]))


def repeated_lines(found: EnvFile, settings: Collection[str]) -> Iterator[str]:
    """Yield each setting that several lines set, with their numbers: `MEGAPIXELS (lines 1, 4)`."""
    for name, lines in sorted(found.repeated.items()):
        if name in settings:
            yield f"{name.upper()} (lines {', '.join(map(str, lines))})"
