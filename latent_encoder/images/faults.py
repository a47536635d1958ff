"""The fault of an image file."""

from __future__ import annotations


class ImageFault(ValueError):
    """A fault of an image's content, in words for the sender; no path."""


class ImageDamage(ImageFault):
    """Damage to an image that a tolerant decoder may still show in part."""


def png_damage(fault: str) -> ImageDamage:
    """Return the damage of a PNG, with the next step."""
    return ImageDamage(f"is damaged: {fault}; fetch or export it again")
