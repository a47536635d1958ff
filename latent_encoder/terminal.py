"""Standard output and standard error: colours, encodings, standard output kept for responses, and streams that take nothing.

A stream takes nothing if its disk is full, if it is closed, or if it is a pipe that nobody reads. The exit status stays true
then: Python flushes both streams once more at its end, and would end with status 120 if that failed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

import click

from latent_encoder.masking import masked

STDOUT, STDERR = 1, 2  # file descriptors

ERASE_LINE = "\r\x1b[K"

ASCII_MARKS = str.maketrans({"✓": "+", "✗": "x", "…": "...", "→": "->", "×": "x"})
"""ASCII for the characters that our reports use and that not every encoding has."""


def is_dumb() -> bool:
    """Return whether the terminal understands no sequences: a line that was written cannot be changed any more."""
    return os.environ.get("TERM") == "dumb"


def forced_colours() -> bool | None:
    """Return whether the environment demands or forbids colours, or None if it leaves that to the stream.

    `NO_COLOR` (https://no-color.org) wins over its counterpart `FORCE_COLOR`.
    """
    if os.environ.get("NO_COLOR") or is_dumb():
        return False
    return True if os.environ.get("FORCE_COLOR") else None


def takes_colours(stream: TextIO) -> bool:
    """Return whether text for `stream` may have colours."""
    choice = forced_colours()
    return stream.isatty() if choice is None else choice


def encodable(text: str, encoding: str) -> str:
    r"""Return the text in characters that `encoding` has: `✓` is `+` in ASCII, `ä` is `\xe4`."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(ASCII_MARKS).encode(encoding, "backslashreplace").decode(encoding)
    return text


def printable(text: str) -> str:
    """Return the text with everything escaped that a terminal does not show: control characters, bytes that are no UTF-8."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else character.encode("unicode_escape").decode() for character in text)


def complain(text: str) -> None:
    """Write a line without secrets to standard error. If that fails, the exit status is the only report left."""
    with suppress(OSError):
        click.echo(masked(text), err=True)


def show_progress(text: str) -> None:
    """Show a text on a line of standard error that the next text replaces. Only a terminal gets it."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        complain_at_once(f"\r\x1b[K{text}\r")  # a log line overwrites it


def complain_at_once(text: str) -> None:
    """Write text to standard error without a buffer: a signal handler may interrupt a write to the buffer."""
    with suppress(OSError):
        os.write(STDERR, text.encode())


@contextmanager
def stdout_on_stderr() -> Iterator[int]:
    """Send everything that is printed inside to standard error, and yield the descriptor of standard output itself.

    The descriptor is redirected, not `sys.stdout`: custom node packages start child processes, such as pip, which print too.
    """
    sys.stdout.flush()
    saved = os.dup(STDOUT)
    os.dup2(STDERR, STDOUT)
    try:
        yield saved
    finally:
        sys.stdout.flush()
        os.dup2(saved, STDOUT)
        os.close(saved)


def open_closed_streams() -> None:
    """Open each of the two streams that is closed, because a file or a connection would get its descriptor otherwise.

    Writing to standard output still fails. Text for standard error is dropped.
    """
    if sys.stdout is None:
        sys.stdout = _opened(STDOUT, os.O_RDONLY)
    if sys.stderr is None:
        sys.stderr = _opened(STDERR, os.O_WRONLY)


def drop_unwritten() -> None:
    """Drop unwritten text that a stream does not take, so that Python has nothing to flush. Its failure was reported."""
    for stream, descriptor in ((sys.stdout, STDOUT), (sys.stderr, STDERR)):
        try:
            stream.flush()
        except (OSError, ValueError):  # ValueError: foreign code closed it
            _point_at_nothing(descriptor, os.O_WRONLY)


def _opened(descriptor: int, flags: int) -> TextIO:
    _point_at_nothing(descriptor, flags)
    return open(descriptor, "w", encoding="utf-8", closefd=False)  # a descriptor


def _point_at_nothing(descriptor: int, flags: int) -> None:
    nothing = os.open(os.devnull, flags)
    if nothing != descriptor:
        os.dup2(nothing, descriptor)
        os.close(nothing)
    os.set_inheritable(descriptor, True)
