"""A terminal as the text for it sees it: its size now, its characters and its colours."""

from __future__ import annotations

import os
from typing import Any

import click

from latent_encoder.terminal import encodable, forced_colours, printable

DOTS, ARROW, TIMES = "…", "→", "×"

USUAL_SIZE = os.terminal_size((80, 24))
"""The size of a terminal that does not report one."""


class Screen:
    """The terminal behind a file descriptor. Its window may change its size at any time."""

    def __init__(self, descriptor: int, encoding: str) -> None:
        self._descriptor = descriptor
        self.encoding = encoding
        self.coloured = forced_colours() is not False
        self.draws = self.coloured and encoding.lower().startswith("utf")
        """It takes colours, and the characters that a drawing consists of."""
        self.dots, self.arrow, self.times = (self.shown(mark) for mark in (DOTS, ARROW, TIMES))

    @property
    def columns(self) -> int:
        """The columns of a line. The last one of the window stays empty: text there makes some terminals begin a new line."""
        return (self._size().columns or USUAL_SIZE.columns) - 1

    @property
    def lines(self) -> int:
        return self._size().lines or USUAL_SIZE.lines

    def shown(self, text: str) -> str:
        """Return foreign text as this terminal can show it, without anything that would control it."""
        return encodable(printable(text), self.encoding)

    def styled(self, text: str, **style: Any) -> str:
        return click.style(text, **style) if self.coloured else text

    def _size(self) -> os.terminal_size:
        try:
            return os.get_terminal_size(self._descriptor)
        except OSError:
            return USUAL_SIZE
