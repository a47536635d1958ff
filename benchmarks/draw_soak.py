"""The plot of a soak, from its worker's `/metrics`: `python -m benchmarks.draw_soak soak.json docs/soak.png`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from benchmarks.soak_samples import Sample, total
from models import Timings

SIZE_INCHES = (11, 7.4)
DPI = 110
POINTS = 60  # most points of a line, so that it stays readable; each is the mean of the time since the point before
STAGES = tuple(Timings.model_fields)
BLUE, GREEN, RED, GREY, ORANGE, PURPLE = "#1f5f8b", "#3a7d44", "#b0413e", "#8a8a8a", "#d08c2e", "#6d4c8f"
STAGE_COLOURS = dict(zip(STAGES, (PURPLE, GREEN, ORANGE, BLUE, GREY, RED), strict=True))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("json_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("plot_file", type=click.Path(dir_okay=False, path_type=Path))
def main(json_file: Path, plot_file: Path) -> None:
    """Draw the result of `python -m benchmarks.kafka_soak --json JSON_FILE` as a PNG."""
    draw(json.loads(json_file.read_text(encoding="utf-8")), plot_file)


def draw(result: dict[str, Any], file: Path) -> None:
    """Draw four panels over the time: responses, stages, waiting requests, and the resources of the process."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    pyplot.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 13})
    end = result["warm_after_s"] + result["measured_s"]
    samples = [sample for each in result["samples"] if (sample := Sample(**each)).at <= end]
    figure, panels = pyplot.subplots(2, 2, figsize=SIZE_INCHES, layout="constrained", sharex=True)
    for axes, panel in zip(panels.flat, (_responses, _stages, _waiting, _process), strict=True):
        panel(axes, samples)
        axes.axvspan(0, result["warm_after_s"] / 60, color=GREY, alpha=0.12, linewidth=0)
        axes.set_ylim(0, axes.get_ylim()[1] * 1.25)  # room for the legend
        axes.legend(frameon=False, loc="upper right", fontsize=10.5, ncols=3, columnspacing=1.2, handlelength=1.4)
        axes.grid(alpha=0.3)
        axes.margins(x=0)
    for axes in panels[1]:
        axes.set_xlabel("minutes (grey: warming up)")
    figure.suptitle(
        f"One worker under {result['requests']} good and bad requests, as /metrics has it: "
        f"{result['lost']} lost, {result['wrong']} wrong, {result['duplicates']} twice",
        fontsize=13.5,
    )
    figure.savefig(file, dpi=DPI, metadata={"Software": None})
    pyplot.close(figure)


def _responses(axes: Any, samples: Sequence[Sample]) -> None:
    axes.set(title="Responses", ylabel="per second")
    outcomes = {
        "success": (GREEN, {"outcome": "success"}),
        "error": (RED, {"outcome": "error"}),
    }
    lines = {name: rates(samples, "latent_encoder_requests_total", **labels) for name, (_, labels) in outcomes.items()}
    times = [time for time, _ in next(iter(lines.values()))]
    axes.stackplot(
        times,
        [[value for _, value in line] for line in lines.values()],
        labels=list(lines),
        colors=[colour for colour, _ in outcomes.values()],
        alpha=0.75,
    )


def _stages(axes: Any, samples: Sequence[Sample]) -> None:
    axes.set(title="Time of the stages, mean", ylabel="seconds")
    for stage in STAGES:
        if points := means(samples, stage):  # a stage may not run; for example, there is no round trip by default
            axes.plot(*zip(*points, strict=True), color=STAGE_COLOURS[stage], label=stage, linewidth=2)


def _waiting(axes: Any, samples: Sequence[Sample]) -> None:
    axes.set(title="Consumer lag and requests in flight", ylabel="requests")
    for label, name, colour in (
        ("lag", "latent_encoder_consumer_lag", ORANGE),
        ("in flight", "latent_encoder_in_flight", BLUE),
    ):
        points = [(sample.at / 60, total(sample.metrics, name)) for sample in samples]
        axes.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=2, drawstyle="steps-post")


def _process(axes: Any, samples: Sequence[Sample]) -> None:
    axes.set(title="Memory, open files, threads", ylabel="resident memory, MB")
    times = [sample.at / 60 for sample in samples]
    axes.plot(times, [sample.resident_bytes / 1e6 for sample in samples], color=BLUE, linewidth=2, label="memory, MB")
    counts = axes.twinx()
    counts.spines["right"].set_visible(True)
    counts.set_ylabel("open files, threads")
    for label, field, colour in (("open files", "open_files", ORANGE), ("threads", "threads", GREEN)):
        counts.plot(times, [getattr(sample, field) for sample in samples], color=colour, linewidth=1.5)
        axes.plot([], [], color=colour, label=label)  # one legend for both scales
    counts.set_ylim(0, max(sample.open_files for sample in samples) * 1.8)


def steps(samples: Sequence[Sample]) -> Iterator[tuple[Sample, Sample]]:
    """Yield pairs of successive samples, at most POINTS or a few more."""
    stride = max(len(samples) // POINTS, 1)
    return pairwise(samples[::stride])


def rates(samples: Sequence[Sample], name: str, **labels: str) -> list[tuple[float, float]]:
    """Return minutes, and the growth of the counter per second since the sample before."""
    return [
        (
            after.at / 60,
            (total(after.metrics, name, **labels) - total(before.metrics, name, **labels)) / (after.at - before.at),
        )
        for before, after in steps(samples)
    ]


def means(samples: Sequence[Sample], stage: str) -> list[tuple[float, float]]:
    """Return minutes, and the mean seconds of the stage since the sample before, if it ran."""
    name = "latent_encoder_stage_seconds"
    points = []
    for before, after in steps(samples):
        ran, took = (
            total(after.metrics, name + suffix, stage=stage) - total(before.metrics, name + suffix, stage=stage)
            for suffix in ("_count", "_sum")
        )
        if ran:
            points.append((after.at / 60, took / ran))
    return points


if __name__ == "__main__":
    main()
