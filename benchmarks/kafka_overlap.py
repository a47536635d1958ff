"""Requests per second through Kafka, one worker, against the bare loop: `python -m benchmarks.kafka_overlap`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import click
import psutil

from benchmarks.kafka_bench import (
    BareLoop,
    TimedResponse,
    machine,
    per_second,
    requests_for,
    responses_to,
    running_workers,
    table,
)
from benchmarks.photos import JPEG_QUALITY, KINDS, photo
from models import Timings
from tests.broker import Broker, choose
from tests.helpers import IMAGES
from tests.kafka_tools import Bench, Topic

PORTRAIT = IMAGES / "astronaut.png"
JPEG = "12 MP JPEG"
WARM_UP = 5  # requests
STEPS = tuple(Timings.model_fields)
HEADER = ("case", "prefetch", "bare loop req/s", "Kafka req/s", "ratio median [min-max]", "goal")

Result = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """The broker, the device and the rounds of a measurement."""

    broker: Broker
    folder: Path
    device: str
    prefetch: tuple[int, ...]
    pairs: int
    count: int
    """Requests in a round."""


@dataclass(frozen=True)
class Case:
    """An image, a size and the ratio that is the goal."""

    name: str
    image: Path
    megapixels: float
    threads: int
    goal: str


@dataclass(frozen=True)
class Kafka:
    """A worker and its topics."""

    prefetch: int
    bench: Bench
    responses: Topic
    worker: psutil.Process
    cpu_s: list[tuple[float, float]] = field(default_factory=list)
    """CPU seconds a request of the worker with its children, and of everything else but this process, in each round."""

    def run(self, case: Case, count: int) -> list[TimedResponse]:
        """Let the worker encode the case's image `count` times."""
        folder = self.bench.folder / "kafka"
        before = self._cpu_seconds()
        received = responses_to(
            self.bench,
            self.responses,
            requests_for(case.image, count, megapixels=case.megapixels, output_dir=str(folder)),
        )
        assert [timed.response["status"] for timed in received] == ["success"] * count
        worker, others = (after - start for start, after in zip(before, self._cpu_seconds(), strict=True))
        self.cpu_s.append((worker / count, others / count))
        shutil.rmtree(folder)
        return received

    def _cpu_seconds(self) -> tuple[float, float]:
        """Return the CPU seconds so far of the worker with its children, and of all else on this machine but this process."""
        worker = sum(sum(process.cpu_times()[:2]) for process in (self.worker, *self.worker.children(recursive=True)))
        machine_s = psutil.cpu_times()
        return worker, machine_s.user + machine_s.system - worker - sum(psutil.Process().cpu_times()[:2])


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--case", "cases", type=click.Choice(["a", "b"]), multiple=True, default=["a", "b"], help="Default: both.")
@click.option("--pairs", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds of each side, in turns.")
@click.option("--count", type=click.IntRange(min=2), default=20, show_default=True, help="Requests in a round.")
@click.option(
    "--prefetch",
    type=click.IntRange(min=1),
    multiple=True,
    default=[2],
    help="KAFKA_PREFETCH, 2 if absent; several are measured side by side.",
)
@click.option(
    "--megapixels-b", type=float, help="Size of case b; if absent, one at which the encode takes as long as the rest."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="On both sides.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures there.")
def main(cases: Sequence[str], megapixels_b: float | None, json_file: Path | None, **options: Any) -> None:
    """Measure one worker behind Kafka against ComfyUI's four nodes in a plain loop.

    \b
    a  the portrait at 0.25 megapixels, all threads: the cost of Kafka and of the service's own work
    b  a photo of 12 megapixels, one thread, the encode as long as the rest: the gain of doing them side by side
    """  # noqa: D301  # click needs the character that \b stands for
    with tempfile.TemporaryDirectory(prefix="kafka-overlap-") as name, choose()() as broker:
        plan = Plan(broker, Path(name), **options)
        result: Result = {"machine": machine(broker), "pairs": plan.pairs, "count": plan.count, "cases": []}
        click.echo("  ".join(f"{key}={value}" for key, value in result["machine"].items()))
        for letter in cases:
            case = case_a() if letter == "a" else case_b(plan, megapixels_b)
            result["cases"].append(measure(case, plan))
            click.echo(f"\n{explain(result['cases'][-1])}")
    click.echo("\n" + table(HEADER, [row for case in result["cases"] for row in rows(case)]))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def case_a() -> Case:
    return Case("a: portrait, 0.25 MP", PORTRAIT, 0.25, os.cpu_count() or 1, ">= 0.95")


def case_b(plan: Plan, megapixels: float | None) -> Case:
    """Return the large photo's case; without a size, one at which the bare loop's encode takes as long as the rest."""
    image = plan.folder / "large.jpg"
    photo(*KINDS[JPEG]).save(image, quality=JPEG_QUALITY)
    size = megapixels or 0.1
    if megapixels is None:
        with BareLoop(plan.folder, plan.device, threads=1) as loop:
            for _ in range(3):
                took = loop.run(image, size, count=4)
                size = round(min(max(size * took["rest_s"] / took["encode_s"], 0.01), 16.0), 3)
    return Case(f"b: 12 MP photo, {size:g} MP", image, size, 1, "> 1.3")


def measure(case: Case, plan: Plan) -> Result:
    """Run rounds of the bare loop and of Kafka in turns; each process exists all the time and is idle in the other's round."""
    with ExitStack() as stack:
        loop = stack.enter_context(BareLoop(plan.folder, plan.device, case.threads))
        sides = [start(case, plan, prefetch, stack) for prefetch in plan.prefetch]
        loop.run(case.image, case.megapixels, WARM_UP)
        for side in sides:
            side.run(case, WARM_UP)
        bare: list[Result] = []
        kafka: dict[int, list[list[TimedResponse]]] = {side.prefetch: [] for side in sides}
        for _ in range(plan.pairs):
            bare.append(loop.run(case.image, case.megapixels, plan.count))
            for side in sides:
                kafka[side.prefetch].append(side.run(case, plan.count))
        cpu = {side.prefetch: side.cpu_s[1:] for side in sides}  # without the warm-up
    return {
        "case": case.name,
        "goal": case.goal,
        "threads": case.threads,
        "megapixels": case.megapixels,
        "bare": bare,
        "kafka": [side_result(prefetch, rounds, bare) | cpu_result(cpu[prefetch]) for prefetch, rounds in kafka.items()],
    }


def start(case: Case, plan: Plan, prefetch: int, stack: ExitStack) -> Kafka:
    bench = Bench(plan.broker.bootstrap_servers, plan.folder)
    stack.callback(bench.close)
    bench.create()
    environment = {"OMP_NUM_THREADS": str(case.threads), "KAFKA_PREFETCH": str(prefetch), "DEVICE": plan.device}
    (worker,) = stack.enter_context(running_workers(bench, 1, **environment))
    return Kafka(prefetch, bench, bench.responses, psutil.Process(worker.popen.pid))


def side_result(prefetch: int, rounds: Sequence[Sequence[TimedResponse]], bare: Sequence[Result]) -> Result:
    """Return rates, ratios and step times of one worker; its latents must be those of the bare loop."""
    metadata = [timed.response["metadata"] for received in rounds for timed in received]
    latents = {entry["latent_sha256"] for entry in metadata} | {entry["latent_sha256"] for entry in bare}
    assert len(latents) == 1, "the latents differ"
    rates = [per_second(received) for received in rounds]
    return {
        "prefetch": prefetch,
        "comfyui": metadata[0]["comfyui_version"],
        "device": metadata[0]["device"],
        "per_second": rates,
        "ratios": [rate / entry["per_second"] for rate, entry in zip(rates, bare, strict=True)],
        "timings_ms": {step: median(entry["timings_ms"][step] for entry in metadata) for step in STEPS},
    }


def cpu_result(rounds: Sequence[tuple[float, float]]) -> Result:
    worker, others = zip(*rounds, strict=True)
    return {"cpu_s": median(worker), "cpu_s_of_others": median(others)}


def explain(result: Result) -> str:
    """Return the time of a request by its parts, on both sides, as text."""
    encode, rest = (median(entry[name] for entry in result["bare"]) * 1000 for name in ("encode_s", "rest_s"))
    bare_cpu = median(entry["cpu_s"] for entry in result["bare"]) * 1000
    lines = [
        f"{result['case']}: {result['threads']} torch threads, ComfyUI {result['kafka'][0]['comfyui']}, "
        f"device {result['kafka'][0]['device']}, latents equal on both sides",
        f"  bare loop: encode {encode:.0f} ms, rest {rest:.0f} ms; CPU {bare_cpu:.0f} ms",
    ]
    for side in result["kafka"]:
        steps = ", ".join(f"{step} {took:.0f} ms" for step, took in side["timings_ms"].items())
        cpu = f"CPU {side['cpu_s'] * 1000:.0f} ms, and {side['cpu_s_of_others'] * 1000:.0f} ms of the broker and others"
        lines.append(f"  Kafka, prefetch {side['prefetch']}: {steps}; {cpu}")
    return "\n".join(lines)


def rows(result: Result) -> list[tuple[str, ...]]:
    bare = median(entry["per_second"] for entry in result["bare"])
    return [
        (
            result["case"],
            str(side["prefetch"]),
            f"{bare:.2f}",
            f"{median(side['per_second']):.2f}",
            f"{median(side['ratios']):.3f} [{min(side['ratios']):.3f}-{max(side['ratios']):.3f}]",
            result["goal"],
        )
        for side in result["kafka"]
    ]


if __name__ == "__main__":
    main()
