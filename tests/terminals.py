"""Programs on a pseudo-terminal, and the screen that a person sees of their output."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import termios
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pexpect.fdpexpect import fdspawn

from tests.helpers import PATIENCE_S, PROJECT, clean_environment

PLAIN = {name: value for name, value in clean_environment().items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
PLAIN |= {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"}

TOKEN = re.compile(r"\x1b\[([\d;?]*)([A-Za-z])|\x1b(.)|(.)", re.DOTALL)


@dataclass
class Screen:
    """A terminal of `columns` columns that never scrolls a line away: the lines that a person sees, by xterm's rules."""

    columns: int
    lines: list[list[str]] = field(default_factory=lambda: [[]])
    row: int = 0
    column: int = 0
    wraps: int = 0
    """The lines that were too long for the window."""
    unknown: list[str] = field(default_factory=list)
    """Sequences that neither move the cursor up, nor erase a line, nor set colours."""

    def feed(self, text: str) -> Screen:
        for number, command, other, character in TOKEN.findall(text):
            if character:
                self._write(character)
            elif command == "K" and number in ("", "0"):
                del self.lines[self.row][self.column :]
            elif command == "A":
                self.row = max(0, self.row - int(number or 1))
            elif command != "m":
                self.unknown.append(command or other)
        return self

    @property
    def text(self) -> list[str]:
        """The lines, without spaces at their ends."""
        return ["".join(line).rstrip() for line in self.lines]

    def _write(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self._down()
        elif unicodedata.category(character) == "Cc":
            self.unknown.append(character)
        elif unicodedata.category(character) in ("Mn", "Me", "Cf"):
            self.lines[self.row][self.column - 1] += character
        else:
            self._put(character, 2 if unicodedata.east_asian_width(character) in "WF" else 1)

    def _put(self, character: str, width: int) -> None:
        if self.column + width > self.columns:
            self.wraps += 1
            self._down()
            self.column = 0
        line = self.lines[self.row]
        line += [" "] * (self.column + width - len(line))
        line[self.column : self.column + width] = [character, *[""] * (width - 1)]
        self.column += width

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append([])


@contextmanager
def on_terminal(
    *arguments: str | Path,
    folder: Path,
    columns: int = 100,
    env: Mapping[str, str] | None = None,
    redirection: str = "",
) -> Iterator[Any]:
    """Run the command line on a pseudo-terminal, some of its streams redirected as by a shell.

    `pexpect.spawn` forks in Python, which can hang if torch has started threads.
    """
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    command = ["setsid", "--ctty", "--wait", "sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable]
    command += [str(PROJECT / "main.py"), *map(str, arguments)]
    streams: dict[str, Any] = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen(command, cwd=folder, env={**PLAIN, **(env or {})}, **streams) as process:
        os.close(theirs)
        child: Any = fdspawn(ours, timeout=PATIENCE_S, encoding="utf-8")
        child.process = process
        try:
            yield child
        finally:
            child.close()  # hangs up


def resize(child: Any, columns: int) -> None:
    """Give the window another width; the kernel tells the programs in it."""
    termios.tcsetwinsize(child.child_fd, (24, columns))


def interrupt(child: Any) -> None:
    """Press Ctrl-C."""
    child.send("\x03")


def shown(*arguments: str | Path, folder: Path, status: int = 0, columns: int = 100, **options: Any) -> str:
    """Return all output of a command line on a terminal; its exit status is checked."""
    with on_terminal(*arguments, folder=folder, columns=columns, **options) as child:
        output: str = child.read()
        assert child.process.wait(PATIENCE_S) == status, output
    return output
