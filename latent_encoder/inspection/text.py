"""An inspection as text and as a drawing for a terminal, and as JSON for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from latent_encoder.drawing import INDENT, drawing
from latent_encoder.inspection.findings import Channel, Inspection
from latent_encoder.masking import masked
from latent_encoder.terminal import printable
from models import Metadata

MOST_COLUMNS, MOST_LINES = 66, 32  # the largest drawing, which leaves room for text on a usual terminal
MOST_NUMBERS = 16  # of a list that is shown whole: those of most latent spaces, on a line of 160 characters
LARGE = 10_000  # from here on, decimals carry no information and need room


def as_text(inspection: Inspection, preview: Path | None, page: Path | None) -> str:
    """Return the findings for people. Control characters in names and metadata are escaped."""
    lines = [
        str(inspection.files.latent),
        *_indented(_pairs(_summary(inspection, preview, page))),
        "",
        *_indented(_channel_table(inspection.channels)),
        "",
        *_indented(_pairs({f"checksum of {check.path.name}": check.state for check in inspection.checks})),
        *([""] if inspection.checks else []),
        *_indented(_pairs(metadata_rows(inspection.metadata) if inspection.metadata else {})),
    ]
    return "\n".join(printable(line) for line in lines).rstrip()


def as_json(inspection: Inspection, preview: Path | None, page: Path | None) -> str:
    """Return the findings on one line; a missing number is null."""
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


def unreadable_as_json(name: str, error: str) -> str:
    """Return the line for a file that cannot be read as a latent."""
    return json.dumps({"file": name, "ok": False, "error": error})


def metadata_rows(metadata: Metadata) -> dict[str, str]:
    """Return each field and its value as text, without secrets; a field of a nested object has the name `outer.inner`."""
    return {name: masked(value) for name, value in _flat(json.loads(metadata.model_dump_json()))}


def _flat(fields: Mapping[str, Any], outer: str = "") -> Iterator[tuple[str, str]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{outer}{name}.")
        elif value is not None:
            yield outer + name, value if isinstance(value, str) else _written(value)


def _written(value: Any) -> str:
    """Return a value as JSON; of a long list, its first numbers and their count."""
    if isinstance(value, list) and len(value) > MOST_NUMBERS:
        return f"{json.dumps(value[:3])[:-1]}, …] ({len(value)} numbers)"
    return json.dumps(value, ensure_ascii=False)


def space_text(inspection: Inspection) -> str:
    """Return the latent space in words."""
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
    """Return a number with four decimals, or with four digits if it is large; a dash for None."""
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < LARGE else f"{value:.4g}"


def _indented(lines: list[str]) -> list[str]:
    return [INDENT + line for line in lines]


def drawn(image: torch.Tensor, columns: int, lines: int) -> str:
    """Return the first image of a float tensor `[batch, height, width, 3]` as coloured text.

    It is at most as large as a terminal of that size, and never enlarged.
    """
    pixels = Image.fromarray(image[0].mul(255).round().clamp(0, 255).to(torch.uint8).numpy())
    return drawing(pixels, min(columns, MOST_COLUMNS), min(lines, MOST_LINES))
