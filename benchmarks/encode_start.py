"""How long it takes from the start of a process until ComfyUI's nodes can be called, ours against ComfyUI's own."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.encode_report import Spread, markdown, progress
from benchmarks.encode_sides import COMFYUI, OURS
from tests.helpers import PROJECT, clean_environment

DONE = "the nodes can be called\n"


@dataclass(frozen=True)
class Starts:
    """Seconds, of both in turns."""

    ours: Spread
    comfyui: Spread


def measure_start(comfyui_path: Path, folder: Path, pairs: int) -> Starts:
    """Each once for nothing, so that all files are in memory, then in turns."""
    took: dict[str, list[float]] = {OURS: [], COMFYUI: []}
    for n in range(pairs + 1):
        progress(f"start, round {n} of {pairs}")
        for side, seconds in took.items():
            seconds.append(start_once(side, comfyui_path, folder))
    return Starts(*(Spread(tuple(took[side][1:])) for side in (OURS, COMFYUI)))


def start_once(side: str, comfyui_path: Path, folder: Path) -> float:
    command = [sys.executable, str(PROJECT / "benchmarks" / "encode_start_process.py"), side, str(comfyui_path)]
    start = time.perf_counter()
    with subprocess.Popen(  # noqa: S603  # nothing here comes from outside
        command, cwd=folder, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line == DONE:
                break
        seconds = time.perf_counter() - start
        process.stdout.read()
    assert lines[-1:] == [DONE], "".join(lines)
    return seconds


def start_text(starts: Starts) -> str:
    rows = [(OURS, starts.ours.text()), ("ComfyUI's own modules, plainly imported", starts.comfyui.text())]
    return markdown(("from the start of the process until the nodes can be called", "seconds"), rows)
