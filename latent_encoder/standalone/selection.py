"""What the command line asks of standalone mode."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageSelection:
    """Which images: `paths` are files, folders and globs; `input_list` is a file of JSON Lines requests, or `-`."""

    paths: tuple[str, ...] = ()
    recursive: bool = False
    input_list: str | None = None


@dataclass(frozen=True)
class RunOptions:
    """How they are gone through."""

    force: bool = False
    """Whether to encode also what has whole and matching files."""
    fail_fast: bool = False
    """Whether the first failure ends the run."""
    workers: int = 1
    """Processes that share the images."""
    quiet: bool = False
    """Whether to leave out progress bar and summary."""
