"""Peak memory and time of processes that do the whole job, from their start to the written latent."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.encode_diffusers import HOW_TO_INSTALL, diffusers_version
from benchmarks.encode_report import gigabytes, markdown, megapixels_text, progress
from benchmarks.encode_sides import COMFYUI, DIFFUSERS, FULL_SIZE_VAE, OURS, PHOTO
from tests.helpers import PROJECT, clean_environment

OK = "ok"
FLOOR_MEGAPIXELS = 0.01  # the smallest size that a request may have: memory at this size is needed at every size
OUT_OF_MEMORY = ("out of memory", "memory ran out", "not enough memory", "can't allocate memory", "MemoryError")
HEADER = ("side", "encoder", "megapixels", "peak memory", "whole process, s")


@dataclass(frozen=True)
class Process:
    """The time and memory of a process, and how it ended."""

    seconds: float
    peak_bytes: int
    outcome: str
    """`ok`, or the reason why there is no result."""
    stdout: str


@dataclass(frozen=True)
class Job:
    """One whole job: one side, one VAE, one size."""

    side: str
    encoder: str
    vae: str
    megapixels: float
    seconds: float
    peak_bytes: int
    outcome: str


@dataclass(frozen=True)
class Bench:
    """The tree, the folders and the time limit of jobs."""

    comfyui_path: Path
    model_dir: Path
    folder: Path
    timeout_s: float

    def run(self, side: str, megapixels: float, vae: str = FULL_SIZE_VAE) -> Job:
        """Run the whole job of one side for the photo, in a process of its own."""
        progress(f"process: {side}, {vae}, {megapixels_text(megapixels)}")
        commands = {OURS: self._ours, COMFYUI: self._comfyui, DIFFUSERS: self._diffusers}
        done = run_process(commands[side](megapixels, vae), self.folder, self.timeout_s)
        encoder = encoder_of(done) if side == OURS else {COMFYUI: "stock", DIFFUSERS: "diffusers"}[side]
        return Job(side, encoder, vae, megapixels, done.seconds, done.peak_bytes, done.outcome)

    def _ours(self, megapixels: float, vae: str) -> list[str]:
        return [
            sys.executable,
            str(PROJECT / "main.py"),
            *("--mode", "standalone", "--device", "cpu"),
            *("--image-path", str(PHOTO), "--megapixels", str(megapixels)),
            *("--vae-model-name", vae, "--model-dir", str(self.model_dir)),
            *("--comfyui-path", str(self.comfyui_path), "--output-dir", str(self.folder / "output")),
        ]

    def _comfyui(self, megapixels: float, vae: str) -> list[str]:
        cases, script = self.folder / "cases.json", PROJECT / "tests" / "stock_comfyui.py"
        cases.write_text(json.dumps([[str(PHOTO), vae, "lanczos", megapixels]]), encoding="utf-8")
        arguments = [self.comfyui_path, "encode", self.model_dir, cases, self.folder / "out.safetensors"]
        return [sys.executable, str(script), *map(str, arguments)]

    def _diffusers(self, megapixels: float, vae: str) -> list[str]:
        arguments = [self.model_dir / "vae" / vae, PHOTO, megapixels, self.folder / "diffusers.pt"]
        return [sys.executable, str(PROJECT / "benchmarks" / "encode_diffusers.py"), *map(str, arguments)]


def run_process(command: Sequence[str], folder: Path, timeout_s: float) -> Process:
    """Run a command in `folder`, in an environment without the service's settings."""
    files = [folder / "stdout.txt", folder / "stderr.txt"]
    runner = [sys.executable, "-S", str(PROJECT / "benchmarks" / "encode_peak.py"), str(timeout_s)]
    done = subprocess.run(  # noqa: S603  # nothing here comes from outside
        [*runner, *map(str, files), *command],
        env=clean_environment(),
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    took = json.loads(done.stdout)
    stdout, stderr = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    how = outcome(took["status"], stdout + stderr, timed_out=took["timed_out"])
    return Process(took["seconds"], took["peak_bytes"], how, stdout)


def outcome(status: int, output: str, *, timed_out: bool) -> str:
    """Return how a process ended; `status` is its exit status or minus the signal's number, `output` all that it wrote."""
    if timed_out:
        return "not done in time"
    if status == -signal.SIGKILL:  # only the system sends it, if memory runs out
        return "killed by the system, out of memory"
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    if status > 0 and any(sign in output for sign in OUT_OF_MEMORY):
        return "out of memory"
    last = (output.strip().splitlines() or [""])[-1]
    return OK if status == 0 else f"exit status {status}: {last[:200]}"


def encoder_of(done: Process) -> str:
    """Return the encoder that our process ran, according to its response."""
    return str(json.loads(done.stdout)["metadata"]["encoder"]) if done.outcome == OK else "unknown"


def measure_memory(bench: Bench, sizes: Sequence[float], stock_sizes: Sequence[float]) -> list[Job]:
    """Run jobs with the full-size VAE: ours at the floor and at `sizes`, the others at `stock_sizes`."""
    return [bench.run(side, megapixels) for side, megapixels in planned(sizes, stock_sizes)]


def planned(sizes: Sequence[float], stock_sizes: Sequence[float]) -> Iterator[tuple[str, float]]:
    yield OURS, FLOOR_MEGAPIXELS
    for megapixels in sizes:
        yield OURS, megapixels
        if megapixels in stock_sizes:
            yield COMFYUI, megapixels
            if diffusers_version() != "not installed":
                yield DIFFUSERS, megapixels


def memory_text(jobs: Sequence[Job]) -> str:
    lines = [
        markdown(HEADER, [_row(job) for job in jobs]),
        f"\nAt {megapixels_text(FLOOR_MEGAPIXELS)} nearly all is the interpreter, torch, ComfyUI's modules and the weights.",
    ]
    if not any(job.side == DIFFUSERS for job in jobs):
        lines.append(f"\ndiffusers: not measured, not installed; {HOW_TO_INSTALL}")
    return "\n".join(lines)


def _row(job: Job) -> tuple[str, ...]:
    if job.outcome != OK:
        return (job.side, job.encoder, f"{job.megapixels:g}", job.outcome, f"{job.seconds:.1f}, then ended")
    return (job.side, job.encoder, f"{job.megapixels:g}", gigabytes(job.peak_bytes), f"{job.seconds:.1f}")
