"""What the command line asks standalone mode for, beside the settings and the fields of a request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageSelection:
    """Which images to encode, as they were named."""

    paths: tuple[str, ...]
    """Files, folders and glob patterns, in the order given."""
    recursive: bool
    """Whether folders are searched to the bottom."""
    input_list: str | None
    """A file of requests as JSON Lines; `-` is standard input."""


@dataclass(frozen=True)
class RunOptions:
    """How to go through many images."""

    force: bool
    """Encode again what has its files already."""
    fail_fast: bool
    """Stop at the first image that fails."""
    workers: int
    """How many processes share the images."""
    quiet: bool
    """No progress bar and no summary."""
