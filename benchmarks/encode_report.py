"""How the encode benchmark puts its figures: repeated runs as median and range, tables in Markdown, units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import click


@dataclass(frozen=True)
class Spread:
    """What the same measurement gave each time."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.runs)

    def text(self, digits: int = 2, factor: float = 1.0) -> str:
        """Median, and range where there are several runs; each times `factor`."""
        middle, low, high = (f"{value * factor:.{digits}f}" for value in (self.median, min(self.runs), max(self.runs)))
        return f"{middle} [{low}-{high}]" if len(self.runs) > 1 else middle


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gigabytes(count: float) -> str:
    """Bytes in units of 10^9."""
    return f"{count / 1e9:.2f} GB"


def megapixels_text(megapixels: float) -> str:
    return f"{megapixels:g} MP"


def progress(text: str) -> None:
    """Say on standard error what is done now."""
    click.echo(f"… {text}", err=True)
