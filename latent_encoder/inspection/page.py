"""An inspection as one self-contained HTML page: images, histograms and styles are embedded."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from latent_encoder.inspection.findings import Inspection
from latent_encoder.inspection.text import metadata_rows, number_text, space_text
from latent_encoder.masking import masked
from latent_encoder.outputs.marks import HTML_MARK
from latent_encoder.outputs.png import png_bytes
from latent_encoder.terminal import printable

if TYPE_CHECKING:
    from latent_encoder.inspection.images import Painter

BINS = 48
"""Bins of a histogram: 5 units wide each in the drawing, which is wide enough to be seen."""
HISTOGRAM_WIDTH, HISTOGRAM_HEIGHT = 240, 60  # units of the drawing, which the page scales


@dataclass(frozen=True)
class Figure:
    """An image in the page."""

    title: str
    alt: str
    data: str
    """The PNG as a data URI."""
    cells: bool = False
    """A pixel stands for a cell of the latent, and is shown as a square."""


@dataclass(frozen=True)
class Histogram:
    """The frequencies of the values of a channel."""

    outline: str
    """An SVG path from the lowest bin to the highest; the fullest bin is as high as the drawing."""
    alt: str


def templates(*folders: Path) -> Environment:
    """Return the templates in these folders. They escape markup."""
    environment = Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number_text, printable=printable)
    return environment


def as_page(inspection: Inspection, painter: Painter) -> str:
    """Return the page. Markup in metadata and names is escaped."""
    low, high = value_range(inspection.latent)
    image = inspection.metadata.image_path if inspection.metadata else None
    template = templates(Path(__file__).parent).get_template("page.html")
    return template.render(
        found=inspection,
        mark=HTML_MARK,
        image=printable(masked(image or "")),
        name=printable(inspection.files.latent.name),
        space=space_text(inspection),
        figures=_figures(inspection, painter),
        histograms=[histogram(values, low, high) for values in inspection.latent.unbind(1)],
        low=low,
        high=high,
        width=HISTOGRAM_WIDTH,
        height=HISTOGRAM_HEIGHT,
        metadata=metadata_rows(inspection.metadata) if inspection.metadata else {},
    )


def _figures(inspection: Inspection, painter: Painter) -> list[Figure]:
    height, width = inspection.latent.shape[-2:]
    figures = []
    if scaled := painter.whole(inspection, "scaled_image"):
        figures.append(Figure("Scaled image", "The image as it was scaled before it was encoded.", _data_uri(scaled)))
    if (image := painter.image(inspection)) is not None:
        alt = f"The latent in colours, {width} by {height} cells."
        figures.append(Figure("Latent", alt, _data_uri(png_bytes(image)), cells=True))
    if roundtrip := painter.whole(inspection, "roundtrip"):
        figures.append(Figure("Round trip", "The image that the VAE decodes from the latent.", _data_uri(roundtrip)))
    return figures


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def value_range(latent: torch.Tensor) -> tuple[float, float]:
    """Return the least and the greatest finite value, widened if they are equal; 0 and 1 if there is none."""
    values = latent.double()
    kept = values[values.isfinite()]
    if not len(kept):
        return 0.0, 1.0
    low, high = kept.min().item(), kept.max().item()
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def histogram(values: torch.Tensor, low: float, high: float) -> Histogram:
    """Return the histogram of a channel's finite values. All channels have the same range, so that they can be compared."""
    values = values.double()
    kept = values[values.isfinite()]
    counts = torch.histc(kept, BINS, low, high)
    most = int(counts.argmax())
    width, left = (high - low) / BINS, low + (high - low) / BINS * most
    return Histogram(
        outline=_outline((counts / counts.max().clamp(min=1)).tolist()),
        alt=f"Most values lie between {number_text(left)} and {number_text(left + width)}."
        if len(kept)
        else "No finite values.",
    )


def _outline(heights: list[float]) -> str:
    """Return steps with these heights, in [0, 1], as the `d` of an SVG path."""
    step = HISTOGRAM_WIDTH / len(heights)
    tops = (f"V{HISTOGRAM_HEIGHT * (1 - height):.4g}H{step * (number + 1):.4g}" for number, height in enumerate(heights))
    return f"M0 {HISTOGRAM_HEIGHT}{''.join(tops)}V{HISTOGRAM_HEIGHT}Z"
