"""The time from the start of a process until ComfyUI's nodes can be called, ours against ComfyUI's own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.encode_report import Spread, gigabytes, markdown, progress
from benchmarks.encode_sides import COMFYUI, OURS
from benchmarks.encode_trees import Tree, TreeFailed
from benchmarks.process_memory import peak_bytes
from tests.helpers import PROJECT, clean_environment

READY = "ready "
SIDES = (OURS, COMFYUI)
HEADER = (
    "ComfyUI",
    "from the start of the process until the nodes can be called",
    "seconds",
    "of them loading ComfyUI",
    "peak memory",
)


@dataclass(frozen=True)
class Start:
    """One start of one side on one tree."""

    seconds: float
    loading_s: float
    """The part that loads ComfyUI, with torch imported already."""
    peak_bytes: int


@dataclass(frozen=True)
class SideStarts:
    """All starts of one side on one tree."""

    seconds: Spread
    loading_s: Spread
    peak_bytes: Spread

    @classmethod
    def of(cls, starts: Sequence[Start]) -> SideStarts:
        return cls(
            Spread(tuple(start.seconds for start in starts)),
            Spread(tuple(start.loading_s for start in starts)),
            Spread(tuple(start.peak_bytes for start in starts)),
        )


@dataclass(frozen=True)
class Starts:
    """Both sides on one tree."""

    release: str
    ours: SideStarts
    comfyui: SideStarts


def measure_start(trees: Sequence[Tree], folder: Path, pairs: int) -> list[Starts]:
    """Start both sides on each tree: once unmeasured, so that all files are in memory, then in turns."""
    took: dict[tuple[Tree, str], list[Start]] = {(tree, side): [] for tree in trees for side in SIDES}
    for n in range(pairs + 1):
        progress(f"start, round {n} of {pairs}")
        for (tree, side), starts in took.items():
            starts.append(start_once(side, tree, folder))
    return [Starts(tree.release, *(SideStarts.of(took[tree, side][1:]) for side in SIDES)) for tree in trees]


def start_once(side: str, tree: Tree, folder: Path) -> Start:
    """Start one side on a tree and end it again.

    Raises:
        TreeFailed: the process ended before the nodes could be called.
    """
    command = [sys.executable, str(PROJECT / "benchmarks" / "encode_start_process.py"), side, str(tree.path)]
    start = time.perf_counter()
    with subprocess.Popen(  # noqa: S603  # nothing here comes from outside
        command,
        cwd=folder,
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith(READY):
                seconds = time.perf_counter() - start
                return Start(seconds, float(line.removeprefix(READY)), peak_bytes(process.pid))
    raise TreeFailed(tree, side, (lines or ["it ended without any output"])[-1].strip())


def start_text(starts: Sequence[Starts]) -> str:
    """Return all trees as a Markdown table."""
    rows = []
    for tree in starts:
        rows.append((tree.release, OURS, *_figures(tree.ours)))
        rows.append((tree.release, "ComfyUI's own modules, plainly imported", *_figures(tree.comfyui)))
    return markdown(HEADER, rows)


def _figures(side: SideStarts) -> tuple[str, str, str]:
    return side.seconds.text(), side.loading_s.text(), gigabytes(side.peak_bytes.median)
