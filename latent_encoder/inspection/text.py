"""An inspection for a terminal, as text and as a drawing, and for scripts, as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image

from latent_encoder.inspection.findings import Channel, Inspection
from models import Metadata

UPPER_HALF = "▀"  # the foreground colours the upper half of a cell, the background the lower: two pixels
MOST_COLUMNS, MOST_LINES = 64, 32  # of a drawing
INDENT = "  "
LARGE = 10_000  # from here on, decimals say little


def as_text(inspection: Inspection, preview: Path | None, page: Path | None) -> str:
    """All that was found, for people. Nothing in it can steer a terminal, whatever names and metadata hold."""
    lines = [
        str(inspection.files.latent),
        *_indented(_pairs(_summary(inspection, preview, page))),
        "",
        *_indented(_channel_table(inspection.channels)),
        "",
        *_indented(_pairs({f"hash of {check.path.name}": check.state for check in inspection.checks})),
        *([""] if inspection.checks else []),
        *_indented(_pairs(metadata_rows(inspection.metadata) if inspection.metadata else {})),
    ]
    return "\n".join(printable(line) for line in lines).rstrip()


def as_json(inspection: Inspection, preview: Path | None, page: Path | None) -> str:
    """All that was found, on one line; numbers that are not there are null."""
    metadata = inspection.metadata
    return json.dumps(
        {
            "file": str(inspection.files.latent),
            "ok": not inspection.problems,
            "error": None,
            "format": inspection.latent_format,
            "shape": list(inspection.latent.shape),
            "dtype": inspection.dtype,
            "finite": inspection.finite,
            "channels": [vars(channel) for channel in inspection.channels],
            "latent_space": inspection.space.name,
            "latent_space_guessed": inspection.space.guessed,
            "hashes": {check.name: check.state for check in inspection.checks},
            "metadata": json.loads(metadata.model_dump_json()) if metadata else None,
            "metadata_note": inspection.metadata_note,
            "preview": str(preview) if preview else None,
            "page": str(page) if page else None,
        },
        allow_nan=False,
    )


def unreadable_as_json(path: Path, error: str) -> str:
    """A file that cannot be read as a latent; what could not be found out is not there."""
    return json.dumps({"file": str(path), "ok": False, "error": error})


def metadata_rows(metadata: Metadata) -> dict[str, str]:
    """Each field and its value, as text; those of an object inside as `outer.inner`."""
    return dict(_flat(json.loads(metadata.model_dump_json())))


def _flat(fields: Mapping[str, Any], outer: str = "") -> Iterator[tuple[str, str]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{outer}{name}.")
        elif value is not None:
            yield outer + name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def space_text(inspection: Inspection) -> str:
    """The latent's kind in words."""
    space, channels = inspection.space, inspection.latent.shape[1]
    if space.name is None:
        return f"not known for {channels} channels"
    return f"{space.name} (a guess, by its {channels} channels)" if space.guessed else space.name


def _summary(inspection: Inspection, preview: Path | None, page: Path | None) -> dict[str, str]:
    return {
        "format": inspection.latent_format,
        "shape": str(list(inspection.latent.shape)),
        "dtype": inspection.dtype,
        "values": "all finite" if inspection.finite else "NOT ALL FINITE",
        "latent space": space_text(inspection),
        "metadata": inspection.metadata_note or inspection.files.metadata.name,
        "preview": str(preview) if preview else "none",
        **({"page": str(page)} if page else {}),
    }


def _pairs(rows: Mapping[str, str]) -> list[str]:
    width = max((len(name) for name in rows), default=0)
    return [f"{name:{width}}  {value}" for name, value in rows.items()]


def _channel_table(channels: tuple[Channel, ...]) -> list[str]:
    heading = "channel      mean  deviation   minimum   maximum"
    return [heading, *(_channel_line(number, channel) for number, channel in enumerate(channels))]


def _channel_line(number: int, channel: Channel) -> str:
    mean, deviation, minimum, maximum = (
        number_text(value) for value in (channel.mean, channel.deviation, channel.minimum, channel.maximum)
    )
    mark = "" if channel.finite else "  not all finite"
    return f"{number:>7}{mean:>10}{deviation:>11}{minimum:>10}{maximum:>10}{mark}"


def number_text(value: float | None) -> str:
    """Four decimals, or four digits where the number is large; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < LARGE else f"{value:.4g}"


def _indented(lines: list[str]) -> list[str]:
    return [INDENT + line for line in lines]


def printable(text: str) -> str:
    """The text with everything escaped that is not shown as itself: control characters, and bytes that are no UTF-8."""
    return "".join(character if character.isprintable() else character.encode("unicode_escape").decode() for character in text)


def drawing(picture: torch.Tensor, columns: int, lines: int) -> str:
    """The first image of a float tensor `[batch, height, width, 3]` in colours for a terminal of that size, never enlarged."""
    image = Image.fromarray(picture[0].mul(255).round().clamp(0, 255).to(torch.uint8).numpy())
    widest, highest = min(columns - len(INDENT), MOST_COLUMNS), 2 * min(lines, MOST_LINES)
    image.thumbnail((max(widest, 1), max(highest, 2)), Image.Resampling.BOX)
    rows = [[image.getpixel((x, y)) for x in range(image.width)] for y in range(image.height)]
    rows += [[None] * image.width] if image.height % 2 else []
    return "\n".join(INDENT + _line(upper, lower) for upper, lower in zip(rows[::2], rows[1::2], strict=True))


def _line(upper: list[Any], lower: list[Any]) -> str:
    return "".join(click.style(UPPER_HALF, fg=above, bg=below) for above, below in zip(upper, lower, strict=True))
