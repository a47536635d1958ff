"""A simulation of a worker beside a GPU: `python -m benchmarks.gpu_simulation`. It uses no GPU.

The files are real, and so is all that the stages do with them, except the encode: it sleeps as long as a GPU would take.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.encode_report import markdown, progress
from benchmarks.photos import KINDS, make_photos
from benchmarks.stage_runs import Observed, StageRun, run_stages
from config import VARIABLES, Settings
from latent_encoder.cpus import MOST_PREPARE_THREADS, usable_cpus
from latent_encoder.geometry import latent_crop, size_of
from latent_encoder.outputs.encoded import Encoded, Prepared
from latent_encoder.telemetry.logs import configure_logging
from latent_encoder.vae.encoding import EncodedImage

VAE = "tiny_qwen_vae.safetensors"
ENCODE_MS = 50.0
"""The encode that is simulated: one megapixel on a GPU takes some tens of milliseconds."""
GOAL = 0.9  # share of the time in which the encoder should be busy
LARGE = 16  # CPUs of the machine for which the figures are computed

HEADER = (
    "file",
    "PREPARE_THREADS",
    "requests/s",
    "encoder busy, measured",
    "CPU ms of a request: prepare",
    "encode",
    "write",
    "other",
    f"encoder busy on {LARGE} CPUs, computed",
    f"CPUs for {GOAL:.0%}, computed",
    "threads for that",
    "goal",
)


class Sleeping(Observed):
    """The product's encoder, whose encode sleeps. Its latent is zeros."""

    encode_s = ENCODE_MS / 1000

    def encode_prepared(self, prepared: Prepared) -> Encoded:
        with self._observed("encode"):
            crop = latent_crop(size_of(prepared.scaled), prepared.vae.cells.factor)
            cells = (side // prepared.vae.cells.factor for side in (crop.size.height, crop.size.width))
            time.sleep(self.encode_s)
            return Encoded(
                prepared, EncodedImage(torch.zeros(1, prepared.vae.cells.channels, *cells), crop, False, "single-frame"), None
            )


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--threads", type=click.IntRange(min=1), multiple=True, default=[1, 2], help="PREPARE_THREADS; 1 and 2 if absent."
)
@click.option(
    "--kind", "kinds", type=click.Choice(list(KINDS)), multiple=True, default=list(KINDS), help="Files; all if absent."
)
@click.option("--count", type=click.IntRange(min=1), default=40, show_default=True, help="Requests in a run.")
@click.option("--encode-ms", type=float, default=ENCODE_MS, show_default=True, help="Milliseconds that an encode sleeps.")
@click.option("--quick", is_flag=True, help="Small files and few requests: a trial of the program, not of the machine.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures there.")
def main(threads: Sequence[int], kinds: Sequence[str], quick: bool, json_file: Path | None, **options: Any) -> None:
    """Measure how busy an encoder would be that takes as long as a GPU, behind real files.

    Each request is prepared and written as always, at one megapixel. Only the encode is replaced, by a sleep. The share on
    this machine is measured; that on 16 CPUs, and the CPUs for 90 %, are computed from the CPU time of a request.
    """
    for name in VARIABLES:
        os.environ.pop(name.upper(), None)
    configure_logging("ERROR", "text")
    with tempfile.TemporaryDirectory(prefix="gpu-simulation-") as name:
        files = make_photos(Path(name), shrink=8 if quick else 1)
        count = min(options["count"], 4) if quick else options["count"]
        runs = [simulate(files[kind], kind, number, count, options["encode_ms"]) for kind in kinds for number in threads]
    click.echo(f"Simulated: an encode that sleeps {options['encode_ms']:g} ms. Measured on {usable_cpus()} CPUs.\n")
    click.echo(markdown(HEADER, [row(run, options["encode_ms"] / 1000) for run in runs]))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(run) for run in runs], indent=2) + "\n", encoding="utf-8")


def simulate(file: Path, kind: str, threads: int, count: int, encode_ms: float) -> StageRun:
    """Run one kind of file with a number of threads that prepare."""
    progress(f"{kind}, PREPARE_THREADS={threads}")
    settings = Settings(_env_file=None, device="cpu", prepare_threads=threads, vae_model_name=VAE)
    encoder = Sleeping.set_up(settings)
    assert isinstance(encoder, Sleeping)
    encoder.encode_s = encode_ms / 1000
    return run_stages(encoder, kind, file, count, file.parent / "output")


def row(run: StageRun, encode_s: float) -> tuple[str, ...]:
    """Return a row of the table."""
    return (
        run.kind,
        str(run.threads),
        f"{run.per_second:.1f}",
        f"{run.busy('encode'):.0%}",
        *(f"{run.cpu_ms(stage):.0f}" for stage in ("prepare", "encode", "write", "other")),
        f"{busy_with(run, LARGE, encode_s):.0%}",
        f"{cpus_for(run, GOAL, encode_s):.1f}",
        str(threads_for(run, GOAL, encode_s)),
        f">= {GOAL:.0%}",
    )


def cpu_s(run: StageRun) -> float:
    """Return the CPU seconds of a request in all stages."""
    return sum(run.cpu_s.values()) / run.requests


def busy_with(run: StageRun, cpus: int, encode_s: float) -> float:
    """Return the share of the time in which an encoder would be busy on that many CPUs, with the default PREPARE_THREADS.

    Requests per second are bounded by the encoder, by the CPUs, by the threads that prepare, and by the one that writes.
    """
    threads = max(1, min(cpus - 1, MOST_PREPARE_THREADS))
    prepare_s, write_s = (run.cpu_s[stage] / run.requests for stage in ("prepare", "write"))
    rates = (1 / encode_s, cpus / cpu_s(run), threads / prepare_s, 1 / write_s)
    return min(rates) * encode_s


def cpus_for(run: StageRun, share: float, encode_s: float) -> float:
    """Return the count of CPUs that keep an encoder busy for a share of the time."""
    return share / encode_s * cpu_s(run)


def threads_for(run: StageRun, share: float, encode_s: float) -> int:
    """Return the count of threads that must prepare for that."""
    return max(1, -int(-share / encode_s * run.cpu_s["prepare"] / run.requests // 1))


if __name__ == "__main__":
    main()
