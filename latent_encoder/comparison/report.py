"""A comparison as a table for people, and as JSON for programs. Differences are from the first side, ComfyUI's own encoder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latent_encoder.columns import padded, width, wrapped
from latent_encoder.comparison.sides import Facts, Result
from latent_encoder.storage.locations import shown as without_query
from latent_encoder.terminal import printable
from models import EncodeRequest

HEADER = ("", "encode", "memory", "largest difference", "encoder")
GAP = "  "
MISSING = "-"


@dataclass(frozen=True)
class Comparison:
    """The results of all sides for one image."""

    request: EncodeRequest
    results: Sequence[Result]

    @property
    def reference(self) -> Result:
        return self.results[0]


@dataclass(frozen=True)
class Difference:
    """The distance between two latents, in the latent's own unit."""

    max_abs: float
    mean_abs: float

    @classmethod
    def of(cls, latent: NDArray[np.float32], reference: NDArray[np.float32]) -> Difference | None:
        """Return the distance; None if the latents have different shapes."""
        if latent.shape != reference.shape:
            return None
        apart = np.abs(latent.astype(np.float64) - reference)
        return cls(float(apart.max()), float(apart.mean()))


def difference(result: Result, reference: Result) -> Difference | None:
    """Return the distance of a result's latent from the reference's; None if one has no latent, or another shape."""
    if result.latent is None or reference.latent is None:
        return None
    return Difference.of(result.latent, reference.latent)


def as_json(found: Comparison) -> str:
    """Return the comparison as one line of JSON."""
    return json.dumps(
        {
            "image_path": without_query(found.request.image_path),
            "vae_model_name": found.request.vae_model_name,
            "latent_deviation": None if found.reference.latent is None else float(found.reference.latent.std()),
            "sides": [_fields(result, found.reference) for result in found.results],
        },
        ensure_ascii=False,
    )


def _fields(result: Result, reference: Result) -> dict[str, Any]:
    apart = difference(result, reference)
    facts: dict[str, Any] = dict.fromkeys(Facts.__dataclass_fields__) if result.facts is None else asdict(result.facts)
    return {
        "name": result.side.name,
        "error": result.error,
        "comfyui_path": str(result.side.settings.comfyui_path),
        **facts,
        "median_s": result.facts.median_s if result.facts else None,
        "max_abs_difference": apart.max_abs if apart else None,
        "mean_abs_difference": apart.mean_abs if apart else None,
    }


def as_text(found: Comparison, columns: int) -> str:
    """Return the comparison as a table, with a heading above it and conclusions below.

    Where the table is wider than `columns`, each side has a paragraph in its place.
    """
    rows = [_row(result, found.reference) for result in found.results]
    table = list(_aligned([HEADER, *rows]))
    shown = table if max(map(width, table)) <= columns else [line for row in rows for line in _paragraph(row)]
    parts = (_folded([_heading(found)], columns), shown, _folded(_conclusions(found), columns))
    return "\n\n".join(map("\n".join, parts)) + "\n"


def _folded(sentences: Iterable[str], columns: int) -> list[str]:
    return [line for sentence in sentences for line in wrapped(sentence, columns)]


def _paragraph(row: Sequence[str]) -> Iterator[str]:
    yield row[0]
    yield from _aligned([("", *pair) for pair in zip(HEADER[1:], row[1:], strict=True)])


def _heading(found: Comparison) -> str:
    facts = next((result.facts for result in found.results if result.facts), None)
    heading = f"{printable(without_query(found.request.image_path))}, {found.request.vae_model_name}"
    if facts is None:
        return heading
    height, across = facts.scaled_size
    threads = f", {facts.threads} threads" if facts.device == "cpu" else ""
    return f"{heading}, {across} x {height} pixels, {facts.vae_dtype} on {facts.device}{threads}"


def _row(result: Result, reference: Result) -> tuple[str, ...]:
    if (facts := result.facts) is None:
        return (printable(result.side.name), MISSING, MISSING, MISSING, "failed")
    name = printable(result.side.name).replace("ComfyUI", f"ComfyUI {facts.comfyui_version}", 1)
    return (name, f"{facts.median_s:.3g} s", _memory(facts), _apart(result, reference), facts.encoder)


def _memory(facts: Facts) -> str:
    peaks = (facts.peak_bytes, facts.gpu_peak_bytes)
    return " + ".join(
        f"{peak / 1e9:.2f} GB{place}" for peak, place in zip(peaks, ("", " GPU"), strict=True) if peak is not None
    )


def _apart(result: Result, reference: Result) -> str:
    if result is reference:
        return MISSING
    if (apart := difference(result, reference)) is None:
        return MISSING if reference.latent is None else "another shape"
    return f"{apart.max_abs:.1e}" if apart.max_abs else "none"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield GAP.join(map(padded, row, widths)).rstrip()


def _conclusions(found: Comparison) -> Iterator[str]:
    stock, ours = (result.facts for result in found.results[:2])
    latent = found.reference.latent
    if latent is not None:
        yield f"The latent's standard deviation is {latent.std():.2g}."
    if stock and ours:
        of_time = f"{ours.median_s / stock.median_s:.2f} of the time of ComfyUI's"
        yield f"The service's encode takes {of_time}{_of_memory(stock, ours)}."
    if ours:
        yield f"Its encoder is {ours.encoder}: {ours.encoder_reason}."


def _of_memory(stock: Facts, ours: Facts) -> str:
    if not stock.peak_bytes or not ours.peak_bytes:
        return ""
    return f", and its process {ours.peak_bytes / stock.peak_bytes:.2f} of the memory"
