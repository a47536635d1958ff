"""Suggestions for a mistyped name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

FILE_NAMES = 0.85
"""The likeness to demand of file names. Their common suffix makes unlike names alike: at the default of 0.6,
`tiny_qwen_vae.safetensors` would be suggested for `qwen_image_vae.safetensors`."""


def closest(name: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """Return the known name that is most like `name`, ignoring case, or None if none is like it.

    `likeness`, from 0 to 1, is the share of both names that has to be equal, as `difflib` counts it.
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = get_close_matches(name.lower(), by_lower, n=1, cutoff=likeness)
    return by_lower[matches[0]] if matches else None
