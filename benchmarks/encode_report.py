"""The form of the encode benchmark's figures: repeated runs as median and range, tables in Markdown, units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import click


@dataclass(frozen=True)
class Spread:
    """The results of a repeated measurement."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.runs)

    def text(self, digits: int = 2, factor: float = 1.0) -> str:
        """Return the median, and the range if there are several runs, each multiplied by `factor`."""
        middle, low, high = (f"{value * factor:.{digits}f}" for value in (self.median, min(self.runs), max(self.runs)))
        return f"{middle} [{low}-{high}]" if len(self.runs) > 1 else middle


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gigabytes(count: float) -> str:
    """Return a number of bytes in GB of 10^9 bytes."""
    return f"{count / 1e9:.2f} GB"


def megapixels_text(megapixels: float) -> str:
    return f"{megapixels:g} MP"


def progress(text: str) -> None:
    """Report the current step on standard error."""
    click.echo(f"… {text}", err=True)
