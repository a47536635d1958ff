"""Standard output and standard error that take nothing: on a full disk, closed, or a pipe that nobody reads.

The exit status stays true then. Python flushes both once more when it ends, and ends with status 120 where that fails.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO

import click

STDOUT, STDERR = 1, 2  # file descriptors


def open_closed_streams() -> None:
    """Open what is closed of both: else a file or a connection would get its descriptor, and the output with it.

    Writing to standard output fails as before. What goes to standard error is dropped.
    """
    if sys.stdout is None:
        sys.stdout = _opened(STDOUT, os.O_RDONLY)
    if sys.stderr is None:
        sys.stderr = _opened(STDERR, os.O_WRONLY)


def drop_unwritten() -> None:
    """Drop the rest of what one of both does not take, so that Python finds nothing to flush. Its failure was reported."""
    for stream, descriptor in ((sys.stdout, STDOUT), (sys.stderr, STDERR)):
        try:
            stream.flush()
        except (OSError, ValueError):  # ValueError: somebody closed it
            _point_at_nothing(descriptor, os.O_WRONLY)


def complain(text: str) -> None:
    """Write a line to standard error. Where it takes none, nobody can be told: the exit status says it all the same."""
    with suppress(OSError):
        click.echo(text, err=True)


def complain_at_once(text: str) -> None:
    """As `complain`, without a buffer, for signal handlers, which may interrupt a write to it."""
    with suppress(OSError):
        os.write(STDERR, text.encode())


def _opened(descriptor: int, flags: int) -> TextIO:
    _point_at_nothing(descriptor, flags)
    return open(descriptor, "w", encoding="utf-8", closefd=False)  # a descriptor


def _point_at_nothing(descriptor: int, flags: int) -> None:
    nothing = os.open(os.devnull, flags)
    if nothing != descriptor:
        os.dup2(nothing, descriptor)
        os.close(nothing)
    os.set_inheritable(descriptor, True)
