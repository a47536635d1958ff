"""The contents of a contact sheet: an entry for each latent, and the failures."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median

from latent_encoder.contact_sheet.thumbnails import Stored
from latent_encoder.inspection.findings import Inspection
from latent_encoder.masking import masked
from latent_encoder.terminal import printable
from models import Roundtrip

LONGEST_SHOWN = 240
"""Characters of a name or a reason in the page: more than most paths have, and 10,000 of them are a small part of the page."""


@dataclass(frozen=True)
class Entry:
    """One latent in the sheet."""

    name: str
    """The image as it was given; the latent's file if that is not known."""
    latent: str
    facts: str
    problems: tuple[str, ...]
    roundtrip: Roundtrip | None
    thumbnails: dict[str, Stored] = field(default_factory=dict)
    """By the field's name in `OutputFiles`, and `latent`; a missing image has none."""

    @property
    def badness(self) -> tuple[int, float, float]:
        """The place in the sheet, worst first: problems, then low PSNR, then low SSIM, then latents without a comparison."""
        if self.problems:
            return 0, 0.0, 0.0
        if self.roundtrip is None:
            return 2, 0.0, 0.0
        return 1, psnr_of(self.roundtrip), 1.0 if self.roundtrip.ssim is None else self.roundtrip.ssim


@dataclass(frozen=True)
class Failure:
    """An image without a latent, or a latent that cannot be read."""

    name: str
    code: str
    reason: str


def psnr_of(roundtrip: Roundtrip) -> float:
    """Return the PSNR in decibels; infinity if both images are equal."""
    return math.inf if roundtrip.psnr_db is None else roundtrip.psnr_db


def entry_of(inspection: Inspection, image_path: str | None, thumbnails: dict[str, Stored]) -> Entry:
    """Return the entry of a latent. `image_path` is its image; None if only the metadata may know it."""
    metadata = inspection.metadata
    named = image_path or getattr(metadata, "image_path", None)
    _, channels, height, width = inspection.latent.shape
    size = "{1} x {0} px, ".format(*metadata.original_image_shape) if metadata else ""
    cells = f"latent {width} x {height}, {channels} channels"
    return Entry(
        name=shown(named or inspection.files.latent.name),
        latent=shown(str(inspection.files.latent)),
        facts=f"{size}{cells}",
        problems=tuple(shown(problem) for problem in inspection.problems),
        roundtrip=metadata.roundtrip if metadata else None,
        thumbnails=thumbnails,
    )


def shown(text: str) -> str:
    """Return text that a page can show: without secrets and control characters, and not too long.

    The end of a path matters most.
    """
    text = masked(text)
    text = printable(text[: LONGEST_SHOWN // 2] + text[-LONGEST_SHOWN:] if len(text) > 2 * LONGEST_SHOWN else text)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN // 3]}…{text[-2 * LONGEST_SHOWN // 3 :]}"


def summary_of(roundtrips: list[Roundtrip]) -> str | None:
    """Return the range of the PSNR in words; None without a comparison."""
    values = [psnr_of(roundtrip) for roundtrip in roundtrips]
    if not values:
        return None
    return f"PSNR from {decibels(min(values))} to {decibels(max(values))}, median {decibels(median(values))}"


def decibels(value: float) -> str:
    """Return a PSNR in words."""
    return "equal" if math.isinf(value) else f"{value:.2f} dB"
