"""The page of a contact sheet, made part by part: memory never holds all thumbnails."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from latent_encoder.contact_sheet.entries import Entry, Failure, decibels, psnr_of, summary_of
from latent_encoder.contact_sheet.thumbnails import ThumbnailStore, share_of
from latent_encoder.inspection import page as inspection_page
from latent_encoder.outputs.marks import HTML_MARK

HERE = Path(__file__).parent

ROWS, FAILURE_ROWS = 50, 10
"""Latents and failures on one page of the sheet: a browser draws 150 thumbnails at once, and few failures hide no latents."""

PARTS_AT_ONCE = 200
"""Pieces of the template that are joined before they are written, about one row."""

KINDS = {"scaled_image": "Image", "latent": "Latent", "roundtrip": "Round trip"}
LONGEST_ALT = 60  # characters of a name that a screen reader reads three times in a row

FULL_SIDE, SMALL_SIDE = "14rem", "8rem"
"""Sides of a thumbnail on the screen, and with as many images that thumbnails have fewer pixels than that."""
MANY = 1000
"""Images, from which on a thumbnail's share of the page is less than 15 kB, so that most have under 256 pixels a side."""


@dataclass(frozen=True)
class PageImage:
    """A thumbnail in the page."""

    title: str
    alt: str
    data: str
    cells: bool


@dataclass(frozen=True)
class Row:
    """One entry, as the page shows it."""

    entry: Entry
    place: int
    """Number in the order of the run."""
    images: tuple[PageImage | None, ...]
    psnr: str
    ssim: float | None


def page_parts(
    entries: Sequence[Entry], failures: Sequence[Failure], store: ThumbnailStore, *, title: str, unfinished: str | None
) -> Iterator[bytes]:
    """Yield the page in UTF-8. `unfinished` says that images are missing, and why."""
    kinds = [kind for kind in KINDS if kind != "roundtrip" or any(kind in entry.thumbnails for entry in entries)]
    script = (HERE / "sheet.js").read_text("utf-8")
    compared = [entry.roundtrip for entry in entries if entry.roundtrip is not None]
    stream = (
        inspection_page.templates(HERE, Path(inspection_page.__file__).parent)
        .get_template("sheet.html")
        .stream(
            mark=HTML_MARK,
            script=script,
            script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            title=title,
            unfinished=unfinished,
            count=len(entries),
            columns=[KINDS[kind] for kind in kinds],
            compared=bool(compared),
            summary=summary_of(compared),
            rows=_rows(entries, kinds, store),
            rows_a_page=ROWS,
            failures=failures,
            failures_a_page=FAILURE_ROWS,
            side=FULL_SIDE if len(entries) < MANY else SMALL_SIDE,
        )
    )
    stream.enable_buffering(PARTS_AT_ONCE)
    for part in stream:
        yield part.encode()


def _rows(entries: Sequence[Entry], kinds: Sequence[str], store: ThumbnailStore) -> Iterator[Row]:
    most_bytes = share_of(len(entries))
    for place, entry in sorted(enumerate(entries), key=lambda item: item[1].badness):
        found = entry.roundtrip
        yield Row(
            entry,
            place,
            images=tuple(_page_image(entry, kind, store, most_bytes) for kind in kinds),
            psnr=decibels(psnr_of(found)) if found else "-",
            ssim=found.ssim if found else None,
        )


def _page_image(entry: Entry, kind: str, store: ThumbnailStore, most_bytes: int) -> PageImage | None:
    place = entry.thumbnails.get(kind)
    data = store.read(place, most_bytes) if place is not None else None
    if data is None:
        return None
    alt = f"{KINDS[kind]}: {entry.name[-LONGEST_ALT:]}"
    return PageImage(KINDS[kind], alt, base64.b64encode(data).decode(), cells=kind == "latent")
