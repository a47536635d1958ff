"""The ComfyUI trees that are compared, each named by its release."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click


@dataclass(frozen=True)
class Tree:
    """A ComfyUI tree and its name in tables: its release, with its path if two trees have the same release."""

    path: Path
    release: str


class TreeFailed(click.ClickException):
    """A tree that cannot be measured with the Python that runs the benchmark."""

    def __init__(self, tree: Tree, side: str, reason: str) -> None:
        super().__init__(
            f"ComfyUI {tree.release} in {tree.path} cannot be measured ({side}): {reason}\n"
            "Run the benchmark with a Python environment that has the packages that every tree named needs."
        )


def trees_of(paths: Sequence[Path]) -> list[Tree]:
    """Return the trees in their order, each once, with distinct names."""
    distinct = list(dict.fromkeys(path.resolve() for path in paths))
    releases = [comfyui_version(path) for path in distinct]
    counts = Counter(releases)
    return [
        Tree(path, release if counts[release] == 1 else f"{release} ({path})")
        for path, release in zip(distinct, releases, strict=True)
    ]


def comfyui_version(path: Path) -> str:
    """Return the release that a tree states in its file, without running any of its code."""
    file = path / "comfyui_version.py"
    found = re.search(r"""__version__\s*=\s*["']([^"']+)""", file.read_text(encoding="utf-8")) if file.exists() else None
    return found[1] if found else "unknown"
