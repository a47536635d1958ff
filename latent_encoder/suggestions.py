"""What somebody probably meant who mistyped a name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

FILE_NAMES = 0.85  # a likeness for names that share a suffix, which adds a good deal: tiny_qwen_vae is not qwen_image_vae


def closest(name: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The known name that is most like `name`, whatever its case, or None where none is like it.

    `likeness`, from 0 to 1, is how much of both has to be the same: see `FILE_NAMES`.
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = get_close_matches(name.lower(), by_lower, n=1, cutoff=likeness)
    return by_lower[matches[0]] if matches else None
