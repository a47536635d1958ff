"""Images drawn in the characters of a terminal, two pixels in each."""

from __future__ import annotations

from typing import Any

import click
from PIL import Image

UPPER_HALF = "▀"  # two pixels: the foreground colours the upper half of a character, the background the lower half
INDENT = "  "


def drawing(pixels: Image.Image, columns: int, lines: int) -> str:
    """Return an RGB image as coloured text of at most that many columns and lines; `pixels` itself is reduced to that size.

    A smaller image keeps its size.
    """
    pixels.thumbnail((max(columns - len(INDENT), 1), max(2 * lines, 2)), Image.Resampling.BOX)
    rows = [[pixels.getpixel((x, y)) for x in range(pixels.width)] for y in range(pixels.height)]
    rows += [[None] * pixels.width] if pixels.height % 2 else []
    return "\n".join(INDENT + _line(upper, lower) for upper, lower in zip(rows[::2], rows[1::2], strict=True))


def _line(upper: list[Any], lower: list[Any]) -> str:
    return "".join(click.style(UPPER_HALF, fg=above, bg=below) for above, below in zip(upper, lower, strict=True))
