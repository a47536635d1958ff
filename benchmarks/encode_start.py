"""The time from the start of a process until ComfyUI's nodes can be called, ours against ComfyUI's own; whole commands."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.encode_report import Spread, gigabytes, markdown, progress
from benchmarks.encode_sides import COMFYUI, OURS, PHOTO
from benchmarks.encode_trees import Tree, TreeFailed
from latent_encoder.process_memory import peak_bytes
from tests.helpers import PROJECT, TINY_VAE, clean_environment

READY = "ready "
SIDES = (OURS, COMFYUI)
HEADER = (
    "ComfyUI",
    "from the start of the process until the nodes can be called",
    "seconds",
    "of them loading ComfyUI",
    "peak memory",
)

SMALL_PICTURE = 0.0625
"""Megapixels of the picture that the command line encodes: 256 x 256, so that the start is nearly all of the time."""

UNUSED_PORT = "1"
"""A port on which no worker responds, so that `--mode health` ends at once whatever runs on this machine."""


@dataclass(frozen=True)
class Commands:
    """Seconds of whole processes, measured in turns."""

    import_torch: Spread
    encode: Spread
    """`main.py` that encodes one small picture with the tiny VAE."""
    help: Spread
    health: Spread

    @property
    def beyond_torch(self) -> Spread:
        """Seconds of `encode` beyond those of `import torch` in the same round."""
        return Spread(tuple(ours - torch for ours, torch in zip(self.encode.runs, self.import_torch.runs, strict=True)))


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


def measure_commands(comfyui_path: Path, folder: Path, pairs: int) -> Commands:
    """Run each command once unmeasured, so that all files are in memory, then in turns."""
    main = [sys.executable, str(PROJECT / "main.py")]
    picture = ["--image-path", str(PHOTO), "--megapixels", str(SMALL_PICTURE), "--vae-model-name", TINY_VAE, "--device", "cpu"]
    places = ["--comfyui-path", str(comfyui_path), "--output-dir", str(folder / "commands")]
    commands = [
        ([sys.executable, "-c", "import torch"], 0),
        ([*main, "--mode", "standalone", *picture, *places], 0),
        ([*main, "--help"], 0),
        ([*main, "--mode", "health"], 1),
    ]
    rounds = []
    for n in range(pairs + 1):
        progress(f"commands, round {n} of {pairs}")
        rounds.append([_seconds_of(command, folder, status) for command, status in commands])
    return Commands(*(Spread(took) for took in zip(*rounds[1:], strict=True)))


def _seconds_of(command: Sequence[str], folder: Path, status: int) -> float:
    """Run a command that ends with this exit status, and return its seconds.

    Raises:
        RuntimeError: it ended with another one.
    """
    start = time.perf_counter()
    done = subprocess.run(  # noqa: S603  # nothing here comes from outside
        command, cwd=folder, env={**clean_environment(), "HTTP_PORT": UNUSED_PORT}, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode != status:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr[-500:]}")
    return seconds


def commands_text(commands: Commands) -> str:
    """Return the whole commands as a Markdown table."""
    named = {
        "`python -c 'import torch'`": commands.import_torch,
        "`main.py`: one picture of 256 x 256, tiny VAE": commands.encode,
        "... beyond `import torch`": commands.beyond_torch,
        "`main.py --help`": commands.help,
        "`main.py --mode health`, without a worker": commands.health,
    }
    return markdown(("command", "seconds"), [(name, spread.text()) for name, spread in named.items()])


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
