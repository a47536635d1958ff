"""The line of one image on a terminal, in as much detail as the window has columns for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from latent_encoder.columns import padded, shortened, width
from latent_encoder.standalone.screen import Screen
from models import ErrorResponse, SuccessResponse

SHAPE, TIME = 10, 7
"""Columns of a shape with sides of three digits, and of a time such as `100.5 s`."""

FOR_LATENT, FOR_SHAPE, FOR_TIME = 56, 34, 22
"""The fewest columns of a line that shows the latent's name, its shape, and the time: a dozen is left for the image's name."""

MOST_OF_NAME = 0.5
"""The part of the columns for names that the image's takes at most; the rest is for the latent's."""

LEAST_REASON = 12
"""Columns. Less of a reason says nothing; the message at the end of the run has all of it."""

SUBJECT = re.compile("^Image file (?=(is|has) )")


@dataclass(frozen=True)
class Line:
    """The conditions of a line: the image's name, its place and the screen."""

    name: str
    longest: int | None
    """The columns of the longest name of the run; None if it is not known."""
    screen: Screen
    with_latent: bool

    @property
    def columns(self) -> int:
        return self.screen.columns

    @property
    def for_latent(self) -> bool:
        """The line has room for the latent's name, or for the reason of a failure."""
        return self.with_latent and self.columns >= FOR_LATENT

    @property
    def room_for_names(self) -> int:
        """The columns for the names of the image and of the latent."""
        return self.columns - len("✓  →  ") - len("  ") - SHAPE - len("  ") - TIME

    def named(self, room: int) -> str:
        """Return the name in at most `room` columns, and in as many as the names of the other lines."""
        name = shortened(self.name, room, self.screen.dots)
        return padded(name, min(room, self.longest)) if self.longest is not None and self.with_latent else name


def success_line(line: Line, response: SuccessResponse, *, stored: bool) -> str:
    """Return the line of an image with a latent; `stored` if it was made before."""
    screen, columns = line.screen, line.columns
    tail = _tail(line, response, stored=stored)
    mark = screen.styled("=", fg="cyan") if stored else screen.styled(screen.shown("✓"), fg="green")
    if not line.for_latent:
        return f"{mark} {line.named(columns - 2 - width(tail))}{tail}"
    latent, between = Path(response.latent_file_path), f" {screen.arrow} "
    name = line.named(int(line.room_for_names * MOST_OF_NAME))
    room = columns - 2 - width(name + between + tail)
    file = shortened(screen.shown(latent.name), room, screen.dots, end=len(latent.suffix))
    return f"{mark} {name}{between}{screen.styled(padded(file, room), dim=True)}{tail}"


def failure_line(line: Line, response: ErrorResponse, reason: str) -> str:
    """Return the line of an image without a latent, with as much of the reason as there is room for."""
    screen, columns = line.screen, line.columns
    code = shortened(response.error_code, max(columns - 6, 1), screen.dots)
    room = columns - 4 - width(code)
    name = line.named(min(room, int(line.room_for_names * MOST_OF_NAME)) if line.for_latent else room)
    text = f"{screen.styled(screen.shown('✗'), fg='red')} {name}  {screen.styled(code, fg='red')}"
    room -= width(name) + 2
    if not reason or room < LEAST_REASON:
        return text
    return f"{text}  {_beginning(screen.shown(reason), room, screen.dots)}"


def reason_of(message: str, path: str | None) -> str:
    """Return an error message without the path, which the line has already.

    `Image file is empty: a.png` becomes `the file is empty`.
    """
    return SUBJECT.sub("the file ", message.removesuffix(f": {path}"))


def _tail(line: Line, response: SuccessResponse, *, stored: bool) -> str:
    """Return the shape and the time, as far as there is room for them; the columns of several lines are aligned."""
    _, *sides = response.latent_shape
    shape = line.screen.times.join(map(str, sides))
    time = "stored" if stored else f"{response.metadata.processing_time_ms / 1000:.1f} s"
    if line.with_latent:
        shape, time = f"{shape:>{SHAPE}}", f"{time:>{TIME}}"
    parts = [text for text, least in ((shape, FOR_SHAPE), (time, FOR_TIME)) if line.columns >= least]
    return "".join(f"  {part}" for part in parts)


def _beginning(text: str, columns: int, dots: str) -> str:
    return shortened(text, columns, dots, end=0)
