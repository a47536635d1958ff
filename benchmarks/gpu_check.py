"""The check of a GPU: equality, time, memory, requests per second and choices: `python -m benchmarks.gpu_check`.

It needs no network and no packages of the tests. `scripts/pack_gpu_check.py` makes a folder that has all it needs.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image

from benchmarks.encode_diffusers import scaled
from benchmarks.encode_report import Spread, gigabytes, markdown, progress
from benchmarks.encode_trees import Tree, comfyui_version, trees_of
from benchmarks.gpu_check_peers import COMFYUI, DIFFUSERS, OURS, PROJECT, Peer, PeerFailed, environment
from benchmarks.photos import PORTRAIT, make_photos

BUDGET_S = 450.0  # seconds; the whole check ends in less than eight minutes
CLOSING_S = 15.0  # seconds that are kept for the end of a command that is cut off

FULL_SIZE_VAE, TINY_VAE = "random_wan.safetensors", "tiny_qwen_vae.safetensors"
REFERENCE = "reference"

TOO_SLOW_ON_CPU = "fp16"  # many CPUs have no arithmetic for it; an encode of 0.25 MP took more than five minutes on one

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]


@dataclass(frozen=True)
class Plan:
    """The sizes and counts of the measurements."""

    vae: str
    sizes: tuple[float, ...]
    """Megapixels, the most important first."""
    equality_at: float
    precisions: tuple[str, ...]
    rounds: int
    requests: int
    threads: tuple[int | None, ...]
    """Values of PREPARE_THREADS; None is the default."""
    shrink: int
    """Divisor of the photos' sides."""


FULL = Plan(FULL_SIZE_VAE, (1.0, 0.25, 4.0, 16.0), 0.25, ("fp16", "bf16", "fp32"), 5, 60, (None, 1), 1)
QUICK = Plan(TINY_VAE, (0.02,), 0.02, ("fp32", "bf16"), 1, 3, (1,), 8)

GUESSES_S = {"equality": 60.0, "worker": 90.0, "choices": 60.0, "time": 40.0, "time at 16 MP": 100.0}
"""Seconds that a group may take on an H100, guessed with room to spare: a group begins only if that much is left."""


@dataclass
class Check:
    """The sides, the files and the time of a check."""

    plan: Plan
    device: str
    folder: Path
    trees: list[Tree]
    ends: float
    """Time of `time.monotonic` at which the budget is used up."""
    stack: ExitStack
    peers: dict[str, Peer] = field(default_factory=dict)

    @property
    def left_s(self) -> float:
        return self.ends - time.monotonic()

    @property
    def model_dir(self) -> Path:
        return self.folder / "models"

    def start(self) -> None:
        """Start every side; they load while the VAE is made."""
        for tree in self.trees:
            self._start(f"ComfyUI {tree.release}", COMFYUI, tree, self.device)
        if self.device == "cpu":
            self.peers[REFERENCE] = self.peers[f"ComfyUI {self.trees[0].release}"]
        else:
            self._start(REFERENCE, COMFYUI, self.trees[0], "cpu")
        self._start(OURS, OURS, self.trees[0], self.device)
        if self.plan.vae == FULL_SIZE_VAE and find_spec("diffusers") is not None:
            self._start(DIFFUSERS, DIFFUSERS, self.trees[0], self.device)

    def _start(self, name: str, side: str, tree: Tree, device: str) -> None:
        arguments = [str(tree.path), str(self.model_dir), self.plan.vae, device]
        peer = Peer(side, tree.release, arguments, self.folder)
        self.stack.callback(peer.close)
        self.peers[name] = peer

    @property
    def measured(self) -> list[str]:
        """The names of the sides on the device."""
        return [name for name in self.peers if name != REFERENCE]

    def run(self, name: str, command: str, **options: Any) -> Any:
        """Run a command on a side, as long as there is time.

        Raises:
            PeerFailed: it failed, or the time is over.
        """
        return self.peers[name].run(command, max(1.0, self.left_s + CLOSING_S), **options)

    def encode(self, name: str, precision: str, megapixels: float, rounds: int) -> Row:
        """Encode on a side; the latent is in `latent_file` then.

        Raises:
            PeerFailed: it failed, or the time is over.
        """
        result: Row = self.run(
            name,
            "encode",
            precision=precision,
            pixels=str(self.pixels(megapixels)),
            latent=str(self.latent_file(name)),
            rounds=rounds,
        )
        return result

    def pixels(self, megapixels: float) -> Path:
        """Return a file of the portrait's pixels at that size."""
        file = self.folder / f"pixels-{megapixels:g}.pt"
        if not file.exists():
            with Image.open(PORTRAIT) as portrait:
                torch.save(torch.from_numpy(scaled(portrait, megapixels))[None], file)
        return file

    def latent_file(self, name: str) -> Path:
        return self.folder / f"latent-{list(self.peers).index(name)}.pt"

    def latent(self, name: str) -> torch.Tensor:
        loaded: torch.Tensor = torch.load(self.latent_file(name), weights_only=True)
        return loaded


def tried(row: Row, measure: Callable[[], Row]) -> Row:
    """Return the row with its measurement, or with the error if that failed."""
    try:
        return {**row, **measure()}
    except PeerFailed as exc:
        return {**row, "error": str(exc)}


# The groups. Each returns its rows.


def equality(check: Check) -> list[Row]:
    """Compare the latents of our encode and of ComfyUI's on the same device, and both with ComfyUI's in float32 on the CPU."""
    size = check.plan.equality_at
    check.encode(REFERENCE, "fp32", size, 0)
    exact = check.latent(REFERENCE).clone()
    return [
        tried({"precision": precision, "side": name}, partial(_apart, check, name, precision, exact))
        for precision in check.plan.precisions
        for name in check.measured
        if name.startswith(COMFYUI)
    ]


def _apart(check: Check, name: str, precision: str, exact: torch.Tensor) -> Row:
    check.encode(name, precision, check.plan.equality_at, 0)
    theirs = check.latent(name).clone()  # the reference may be the same process
    encoder = check.encode(OURS, precision, check.plan.equality_at, 0)["encoder"]
    ours = check.latent(OURS)
    return {
        "encoder": encoder,
        "max_abs": float((ours - theirs).abs().max()),
        "ours_mean": float((ours - exact).abs().mean()),
        "theirs_mean": float((theirs - exact).abs().mean()),
        "deviation": float(exact.std()),
    }


EQUALITY: list[Column] = [
    ("precision", lambda row: row["precision"]),
    ("compared with", lambda row: row["side"]),
    ("our encoder", lambda row: row["encoder"]),
    ("max difference on this device", lambda row: f"{row['max_abs']:.1e}"),
    ("mean distance from float32 on the CPU: ours", lambda row: f"{row['ours_mean']:.1e}"),
    ("theirs", lambda row: f"{row['theirs_mean']:.1e}"),
    ("standard deviation", lambda row: f"{row['deviation']:.3f}"),
]


def times(check: Check, megapixels: float) -> list[Row]:
    """Measure time and peak memory of one encode, of every side in every precision."""
    rows = [
        tried(
            {"megapixels": megapixels, "precision": precision, "side": name},
            partial(check.encode, name, precision, megapixels, check.plan.rounds),
        )
        for precision in check.plan.precisions
        for name in check.measured
    ]
    ours = {
        row["precision"]: Spread(tuple(row["seconds"])).median for row in rows if row["side"] == OURS and "error" not in row
    }
    for row in rows:
        if "error" not in row and row["precision"] in ours:
            row["ratio"] = Spread(tuple(row["seconds"])).median / ours[row["precision"]]
    return rows


TIMES: list[Column] = [
    ("size", lambda row: f"{row['megapixels']:g} MP"),
    ("precision", lambda row: row["precision"]),
    ("side", lambda row: row["side"]),
    ("encoder", lambda row: row["encoder"]),
    ("ms", lambda row: Spread(tuple(row["seconds"])).text(1, 1e3)),
    ("this / ours", lambda row: f"{row['ratio']:.2f}" if "ratio" in row else ""),
    ("peak of tensors", lambda row: gigabytes(row["allocated"]) if row["allocated"] else "no GPU"),
    ("peak of torch", lambda row: gigabytes(row["reserved"]) if row["reserved"] else "no GPU"),
]


def worker(check: Check) -> list[Row]:
    """Measure the requests per second of one worker's stages, and the stage that limits them."""
    photos = make_photos(check.folder, check.plan.shrink)
    alone = check.encode(OURS, "auto", check.plan.sizes[0], max(3, check.plan.rounds))["seconds"]
    alone_s = Spread(tuple(alone)).median

    def stages(kind: str, threads: int | None) -> Row:
        output, file = str(check.folder / "output"), str(photos[kind])
        run: Row = check.run(
            OURS,
            "stages",
            kind=kind,
            file=file,
            requests=check.plan.requests,
            folder=output,
            prepare_threads=threads,
            megapixels=check.plan.sizes[0],
        )
        return {**run, "alone_s": alone_s, "gpu_busy": run["per_second"] * alone_s}

    return [
        tried({"kind": kind, "threads": threads or "default"}, partial(stages, kind, threads))
        for threads in check.plan.threads
        for kind in photos
    ]


def _cpu_ms(row: Row) -> str:
    return ", ".join(f"{seconds / row['requests'] * 1000:.0f}" for seconds in row["cpu_s"].values())


WORKER: list[Column] = [
    ("file", lambda row: row["kind"]),
    ("PREPARE_THREADS", lambda row: str(row["threads"])),
    ("requests/s", lambda row: f"{row['per_second']:.1f}"),
    ("an encode alone, ms", lambda row: f"{row['alone_s'] * 1000:.1f}"),
    ("device busy: requests/s times that", lambda row: f"{row['gpu_busy']:.0%}"),
    ("stages busy: prepare, encode, write", lambda row: ", ".join(f"{share:.0%}" for share in row["busy"].values())),
    ("limited by", lambda row: row["limit"]),
    ("CPU ms of a request: prepare, encode, write, other", _cpu_ms),
]


def choices(check: Check) -> list[Row]:
    """Measure the choices of the path on a GPU, each against today's."""
    rows: list[Row] = check.run(OURS, "choices", pixels=str(check.pixels(check.plan.sizes[0])), rounds=check.plan.rounds)
    return rows


def _milliseconds(row: Row) -> str:
    return f"not possible here: {row['not possible']}" if "not possible" in row else Spread(tuple(row["milliseconds"])).text(2)


CHOICES: list[Column] = [
    ("choice", lambda row: row["choice"]),
    ("ms", _milliseconds),
    ("peak of tensors", lambda row: gigabytes(row["allocated"]) if row.get("allocated") else "no GPU"),
]


@dataclass(frozen=True)
class Group:
    """A group of measurements, with its table."""

    name: str
    guess_s: float
    measure: Callable[[Check], list[Row]]
    columns: list[Column]


def groups_of(plan: Plan) -> list[Group]:
    """Return the groups, the most important first: the last are left out if time runs out."""

    def time_at(size: float) -> Group:
        name = f"time at {size:g} MP"
        return Group(name, GUESSES_S.get(name, GUESSES_S["time"]), lambda check: times(check, size), TIMES)

    first, *others = (time_at(size) for size in plan.sizes)
    return [
        Group("equality", GUESSES_S["equality"], equality, EQUALITY),
        first,
        Group("worker", GUESSES_S["worker"], worker, WORKER),
        *others[:2],
        Group("choices", GUESSES_S["choices"], choices, CHOICES),
        *others[2:],
    ]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True, help="cpu is a rehearsal.")
@click.option(
    "--comfyui",
    "trees",
    type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
    multiple=True,
    metavar="DIR",
    help="ComfyUI tree; may be given several times. Ours runs on the first. ./comfyui if absent.",
)
@click.option("--only", multiple=True, metavar="GROUP", help="Only this group, by its name; may be given several times.")
@click.option("--budget", type=float, default=BUDGET_S, show_default=True, metavar="S", help="Seconds for all groups.")
@click.option("--quick", is_flag=True, help="The tiny VAE, small images, few rounds: a trial of the program.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures there.")
def main(device: str, trees: Sequence[Path], only: Sequence[str], json_file: Path | None, **options: Any) -> None:
    """Check the encode on a GPU: equality, time, memory, requests per second, and the choices of its path.

    Results go to standard output as Markdown, group by group, and progress to standard error. The last groups are left out if
    the budget runs out. The exit status is 1 if something failed.
    """
    ends = time.monotonic() + options["budget"]
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError(
            f"torch {torch.__version__} finds no CUDA device. --device cpu rehearses the check without one."
        )
    plan = QUICK if options["quick"] else FULL
    if device == "cpu":
        plan = replace(plan, precisions=tuple(name for name in plan.precisions if name != TOO_SLOW_ON_CPU))
    groups = [group for group in groups_of(plan) if not only or group.name in only]
    if not groups:
        raise click.UsageError(f"--only: the groups are {', '.join(group.name for group in groups_of(plan))}.")
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name, ExitStack() as stack:
        check = Check(plan, device, Path(name), trees_of(trees or [PROJECT / "comfyui"]), ends, stack)
        check.start()
        make_vae(check)
        results: Row = {"machine": machine(check), "groups": []}
        click.echo("\n".join(f"- {key}: {value}" for key, value in results["machine"].items()))
        for group in groups:
            results["groups"].append(result := measured(group, check))
            click.echo(f"\n### {group.name}\n\n{text_of(group, result)}")
            if json_file is not None:  # after each group, so that an end by force loses only its own
                json_file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if any(failed(result) for result in results["groups"]):
        sys.exit(1)


def make_vae(check: Check) -> None:
    """Make the full-size VAE with random weights, or take the tiny one of the project."""
    (check.model_dir / "vae").mkdir(parents=True, exist_ok=True)
    if check.plan.vae == TINY_VAE:
        (check.model_dir / "vae" / TINY_VAE).symlink_to(PROJECT / "tiny_vae" / TINY_VAE)
        return
    progress("making a VAE of the real architecture with random weights")
    script, tree = PROJECT / "tests" / "stock_comfyui.py", check.trees[0].path
    command = [sys.executable, str(script), str(tree), "make-vaes", str(check.model_dir), "wan"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        raise click.ClickException(f"The VAE cannot be made: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")


def machine(check: Check) -> dict[str, Any]:
    """Return the facts beside the code that the figures depend on."""
    name = torch.cuda.get_device_name() if check.device == "cuda" else f"stand-in for a GPU: the CPU, {platform.machine()}"
    memory = torch.cuda.get_device_properties(0).total_memory if check.device == "cuda" else None
    return {
        "device": name,
        "memory of the device": gigabytes(memory) if memory else "no GPU",
        "CPUs": torch.multiprocessing.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "float32 convolutions in TF32": torch.backends.cudnn.allow_tf32,
        "trees": ", ".join(comfyui_version(tree.path) for tree in check.trees),
        "diffusers": "measured" if DIFFUSERS in check.peers else "not measured",
        "VAE": check.plan.vae,
        "rounds": check.plan.rounds,
    }


def measured(group: Group, check: Check) -> Row:
    """Measure a group, if there is time for it. A failure becomes its result."""
    result: Row = {"name": group.name, "rows": []}
    start, left = time.monotonic(), check.left_s
    if left < group.guess_s:
        return {**result, "skipped": f"{left:.0f} s of the budget were left, and it may take {group.guess_s:.0f} s"}
    try:
        result["rows"] = group.measure(check)
    except Exception as exc:  # the next groups are measured all the same
        result["error"] = f"{type(exc).__name__}: {exc}"
    return {**result, "seconds": time.monotonic() - start}


def failed(result: Row) -> bool:
    """Return whether a group or one of its rows failed."""
    return "error" in result or any("error" in row for row in result["rows"])


def text_of(group: Group, result: Row) -> str:
    """Return a group's result as Markdown."""
    if "skipped" in result:
        return f"Skipped: {result['skipped']}."
    if "error" in result:
        return f"Failed: {result['error']}"
    table = markdown([title for title, _ in group.columns], [_cells(group.columns, row) for row in result["rows"]])
    return f"{table}\n\nIt took {result['seconds']:.0f} s."


def _cells(columns: list[Column], row: Row) -> list[str]:
    """Return the cells of a row; those that an error leaves without a value have the error, once."""
    cells, error = [], row.get("error")
    for _, cell in columns:
        try:
            cells.append(cell(row))
        except (KeyError, TypeError):
            cells.append(f"failed: {error}" if error else "")
            error = None
    return cells


if __name__ == "__main__":
    main()
