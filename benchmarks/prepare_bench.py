"""The benchmark of the file work: `python -m benchmarks.prepare_bench`."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from benchmarks.encode_report import Spread, markdown, progress
from benchmarks.photos import make_photos
from benchmarks.stage_runs import Observed, run_stages
from config import Settings
from latent_encoder.images.judging import JUDGES
from latent_encoder.telemetry.logs import configure_logging
from models import EncodeRequest, UpscaleMethod
from service import LatentEncoder
from tests.helpers import TINY_VAE, clean_environment

TO_NODES = 1.15
WRITING_MS = 40
TWO_THREADS = 1.7
OF_CPUS = 0.9
FIRST = "12 MP JPEG"

MEGAPIXELS = 1.0
METHOD: UpscaleMethod = "lanczos"


@dataclass(frozen=True)
class Preparation:
    """Seconds of one kind of file: the two nodes alone, and this service's preparation, in turns."""

    file: str
    bytes: int
    nodes: Spread
    ours: Spread
    ratio: Spread
    """Ours to the nodes', of the same round."""
    nodes_cpu: Spread
    """CPU seconds. Other load on the machine changes them less than the seconds."""
    ours_cpu: Spread
    """CPU seconds of this process, and of the process that judges."""
    cpu_ratio: Spread
    first_s: float
    """Ours, as the first image of this process; only of the first kind."""


@dataclass(frozen=True)
class Throughput:
    """Images through the stages, with an encode that costs next to nothing."""

    threads: int
    per_second: float
    cpu_s: float
    """CPU seconds of this process and its children, per image."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Rounds of each kind of file.")
@click.option("--count", type=click.IntRange(min=2), default=32, show_default=True, help="Images of a throughput.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures there.")
def main(rounds: int, count: int, json_file: Path | None) -> None:
    """Measure reading, checking, scaling and writing against ComfyUI's own two nodes, and several images at a time."""
    for name in os.environ.keys() - clean_environment().keys():
        del os.environ[name]
    configure_logging("WARNING", "text")
    with tempfile.TemporaryDirectory(prefix="prepare-bench-") as name, torch.inference_mode():
        folder = Path(name)
        progress("making photos")
        files = make_photos(folder)
        encoder = LatentEncoder.set_up(Settings(_env_file=None, device="cpu"))
        torch.set_num_threads(1)  # as in the stage that prepares
        preparations = [measure_preparation(encoder, kind, file, rounds) for kind, file in files.items()]
        writing = measure_writing(encoder, files["1 MP PNG"], rounds)
        throughputs = [measure_throughput(files[FIRST], folder, threads, count) for threads in (1, 2)]
    click.echo(preparations_text(preparations))
    click.echo(f"\n{throughputs_text(throughputs)}")
    click.echo(f"\n{markdown(('measure', 'goal', 'measured'), goals(preparations, writing, throughputs))}")
    if json_file is not None:
        results = {
            "preparation": [asdict(row) for row in preparations],
            "writing": asdict(writing),
            "throughput": [asdict(row) for row in throughputs],
        }
        json_file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def request_for(file: Path, folder: Path, number: int, vae: str) -> EncodeRequest:
    return EncodeRequest(
        image_path=str(file),
        vae_model_name=vae,
        upscale_method=METHOD,
        megapixels=MEGAPIXELS,
        output_dir=str(folder),
        request_id=str(number),
    )


def measure_preparation(encoder: LatentEncoder, kind: str, file: Path, rounds: int) -> Preparation:
    progress(f"preparing a {kind}")
    request = request_for(file, file.parent, 0, TINY_VAE)
    encoder.vaes.get(TINY_VAE)
    first_s = seconds_of(lambda: encoder.prepare(request))
    nodes_alone(encoder, file)
    nodes, ours = [], []
    for _ in range(rounds):
        nodes.append(times_of(lambda: nodes_alone(encoder, file)))
        ours.append(times_of(lambda: encoder.prepare(request)))
    (nodes_s, nodes_cpu), (ours_s, ours_cpu) = zip(*nodes, strict=True), zip(*ours, strict=True)
    return Preparation(
        kind,
        file.stat().st_size,
        Spread(nodes_s),
        Spread(ours_s),
        ratios(ours_s, nodes_s),
        Spread(nodes_cpu),
        Spread(ours_cpu),
        ratios(ours_cpu, nodes_cpu),
        first_s,
    )


def ratios(ours: Sequence[float], nodes: Sequence[float]) -> Spread:
    return Spread(tuple(mine / theirs for mine, theirs in zip(ours, nodes, strict=True)))


def nodes_alone(encoder: LatentEncoder, file: Path) -> None:
    """Run LoadImage on the file where it lies, then ImageScaleToTotalPixels."""
    runtime = encoder.runtime
    with runtime._input_setting.entered(file.parent):
        pixels = runtime._load_image(image=str(file))
    runtime.scale(pixels, METHOD, MEGAPIXELS)


def measure_writing(encoder: LatentEncoder, file: Path, rounds: int) -> Spread:
    """Measure PNG, latent, metadata, their checksums and flushing them to disk."""
    progress("writing")
    took = []
    for number in range(rounds):
        encoded = encoder.encode_prepared(encoder.prepare(request_for(file, file.parent / "written", number, TINY_VAE)))
        took.append(seconds_of(lambda encoded=encoded: encoder.write(encoded)))  # type: ignore[misc]
    return Spread(tuple(took))


def measure_throughput(file: Path, folder: Path, threads: int, count: int) -> Throughput:
    """Run images through the stages of a fresh encoder with the VAE `pixel_space`, whose encode is a copy."""
    progress(f"{count} images with PREPARE_THREADS={threads}")
    settings = Settings(
        _env_file=None,
        device="cpu",
        prepare_threads=threads,
        vae_model_name="pixel_space",
        upscale_method=METHOD,
        megapixels=MEGAPIXELS,
    )
    encoder = Observed.set_up(settings)
    assert isinstance(encoder, Observed), "`set_up` makes an encoder of its class"
    run = run_stages(encoder, FIRST, file, count, folder / f"threads-{threads}")
    return Throughput(threads, run.per_second, sum(run.cpu_s.values()) / count)


def seconds_of(call: Callable[[], object]) -> float:
    return times_of(call)[0]


def times_of(call: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of a call, and the CPU seconds of this process and the processes that judge images."""
    start, cpu = time.perf_counter(), _cpu_s()
    call()
    return time.perf_counter() - start, _cpu_s() - cpu


def _cpu_s() -> float:
    """Return CPU seconds so far, to a microsecond: those of `psutil` are rounded to 10 milliseconds."""
    return time.process_time() + sum(time.clock_gettime(_cpu_clock(judge.pid)) for judge in tuple(JUDGES._all))


def _cpu_clock(pid: int) -> int:
    """Return the number of a process's CPU clock, as clock_getcpuclockid(3) of Linux does."""
    return ~pid << 3 | 2


def preparations_text(rows: Sequence[Preparation]) -> str:
    header = (
        "file",
        "MB",
        "the two nodes, ms",
        "ours with all checks, ms",
        "ours / the nodes'",
        "CPU ms",
        "ours / the nodes'",
    )
    cells = [
        (
            row.file,
            f"{row.bytes / 1e6:.1f}",
            row.nodes.text(0, 1e3),
            row.ours.text(0, 1e3),
            row.ratio.text(),
            f"{row.ours_cpu.text(0, 1e3)} to {row.nodes_cpu.text(0, 1e3)}",
            row.cpu_ratio.text(),
        )
        for row in rows
    ]
    return markdown(header, cells)


def throughputs_text(rows: Sequence[Throughput]) -> str:
    return markdown(
        ("PREPARE_THREADS", "12 MP JPEGs a second", "CPU s an image"),
        [(str(row.threads), f"{row.per_second:.2f}", f"{row.cpu_s:.2f}") for row in rows],
    )


def goals(
    preparations: Sequence[Preparation], writing: Spread, throughputs: Sequence[Throughput]
) -> list[tuple[str, str, str]]:
    """Return measure, goal and result of each goal."""
    one, two = throughputs
    cpus = len(os.sched_getaffinity(0))
    return [
        *(
            (f"{what} of a {row.file}, to the two nodes alone", f"<= {TO_NODES}", ratio.text())
            for row in preparations
            for what, ratio in (("preparation", row.ratio), ("CPU time of the preparation", row.cpu_ratio))
        ),
        ("the first 12 MP JPEG of a process", "-", f"{preparations[0].first_s * 1e3:.0f} ms"),
        ("PNG, checksums, latent and metadata of 1 MP", f"<= {WRITING_MS} ms", f"{writing.text(0, 1e3)} ms"),
        ("12 MP JPEGs a second, two threads to one", f">= {TWO_THREADS}", f"{two.per_second / one.per_second:.2f}"),
        (f"... to {cpus} CPUs / CPU seconds an image", f">= {OF_CPUS}", f"{two.per_second * two.cpu_s / cpus:.2f}"),
    ]


if __name__ == "__main__":
    main()
