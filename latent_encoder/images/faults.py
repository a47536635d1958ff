"""The fault of an image file."""

from __future__ import annotations


class ImageFault(ValueError):
    """A fault of an image's content, in words for the sender; no path."""
