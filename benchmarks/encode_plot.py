"""The plot of a run: time and peak memory of the whole job over the size of the image, ours and ComfyUI's."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.encode_processes import FLOOR_MEGAPIXELS, OK, Job
from benchmarks.encode_sides import COMFYUI, OURS

COLOURS = {COMFYUI: "#b0413e", OURS: "#1f5f8b"}
SIDES = (COMFYUI, OURS)
SIZE_INCHES = (11, 4.8)
DPI = 120


def draw(jobs: Sequence[Job], machine: Mapping[str, Any], file: Path) -> None:
    """Write the plot as a PNG."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    pyplot.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = pyplot.subplots(1, 2, figsize=SIZE_INCHES, layout="constrained")
    labels = {COMFYUI: f"ComfyUI {machine['ComfyUI']}", OURS: "Latent Encoder"}
    shown = {side: done for side in SIDES if (done := measured(jobs, side))}
    for axes, (field, factor) in zip(panels, (("seconds", 1.0), ("peak_bytes", 1e-9)), strict=True):
        for side, done in shown.items():
            _line(axes, [(job.megapixels, getattr(job, field) * factor) for job in done], side, labels[side])
        sizes = sorted({job.megapixels for done in shown.values() for job in done})
        axes.set(xscale="log", xlabel="megapixels (1 = 1024 x 1024)")
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.grid(alpha=0.3)
        axes.margins(0.15, 0.2)
    panels[0].set(yscale="log", ylabel="seconds for one image")
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[1].set(ylabel="peak memory, GB", ylim=(0, None))
    for axes in panels:
        axes.minorticks_off()
    panels[0].legend(frameon=False, loc="upper left")
    figure.suptitle(
        "From an image file to a written latent, in a process of its own\n"
        f"Qwen-Image VAE, float32, {machine['cpu']}, {machine['threads']} threads",
        fontsize=13,
    )
    figure.savefig(file, dpi=DPI, metadata={"Software": None})
    pyplot.close(figure)


def measured(jobs: Sequence[Job], side: str) -> list[Job]:
    """Return the jobs of a side that gave a result, smallest image first, without the one that shows the floor."""
    done = (job for job in jobs if job.side == side and job.outcome == OK and job.megapixels > FLOOR_MEGAPIXELS)
    return sorted(done, key=lambda job: job.megapixels)


def _line(axes: Any, points: Sequence[tuple[float, float]], side: str, label: str) -> None:
    axes.plot(*zip(*points, strict=True), marker="o", linewidth=2.5, color=COLOURS[side], label=label)
    offset, align = ((4, -18), "left") if side == OURS else ((-4, 8), "right")  # our line is the lower one: figures below it
    for x, y in points:
        text = f"{y:.0f}" if y >= 10 else f"{y:.1f}"
        axes.annotate(text, (x, y), offset, textcoords="offset points", ha=align, color=COLOURS[side])
