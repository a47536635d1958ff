"""Text measured in the columns of a terminal: wide characters take two, combining marks none."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

WIDE = ("W", "F")
"""The classes of Unicode's East Asian Width (UAX #11) that take two columns."""

INVISIBLE = ("Mn", "Me", "Cf")
"""The categories of characters that share the column of the one before them."""

EMOJI_STYLE = "\ufe0f"
"""A mark that turns the character before it into an emoji, which takes one column more in many terminals."""


def width(text: str) -> int:
    """Return the columns that a text takes, or a few more: an emoji of several characters counts as all of them."""
    return len(text) if text.isascii() else sum(map(_width_of, text))


def shortened(text: str, columns: int, dots: str, *, end: int | None = None) -> str:
    """Return the text in at most that many columns: `dots` replace a part of it if it is longer.

    The last `end` columns stay, or half of the text if that is not given.
    """
    if width(text) <= columns:
        return text
    room = columns - width(dots)
    if room < 0:
        return dots[: max(columns, 0)]
    after = _last(text, room // 2 if end is None else min(end, room))
    return _first(text, room - width(after)) + dots + after


def padded(text: str, columns: int) -> str:
    """Return the text with spaces behind it, so that it takes at least that many columns."""
    return text + " " * (columns - width(text))


def wrapped(text: str, columns: int) -> Iterator[str]:
    """Yield lines of at most that many columns, broken at spaces; a longer word is broken anywhere."""
    line = ""
    for word in text.split():
        if line and width(f"{line} {word}") > columns:
            yield line
            line = ""
        line = f"{line} {word}" if line else word
        while width(line) > columns and (begin := _first(line, columns)):
            yield begin
            line = line[len(begin) :]
    if line:
        yield line


def _width_of(character: str) -> int:
    if character == EMOJI_STYLE:
        return 1
    if unicodedata.category(character) in INVISIBLE:
        return 0
    return 2 if unicodedata.east_asian_width(character) in WIDE else 1


def _first(text: str, columns: int) -> str:
    """Return the longest beginning of the text that takes at most that many columns, with the marks on its last character."""
    taken = 0
    for place, character in enumerate(text):
        taken += _width_of(character)
        if taken > columns:
            return text[:place]
    return text


def _last(text: str, columns: int) -> str:
    """Return the longest end of the text that takes at most that many columns and does not begin with a mark."""
    place, taken = len(text), 0
    for start in range(len(text) - 1, -1, -1):
        taken += _width_of(text[start])
        if taken > columns:
            break
        if _width_of(text[start]):
            place = start
    return text[place:]
