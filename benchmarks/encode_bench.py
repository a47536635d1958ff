"""The benchmark of the encode, ours against ComfyUI's own and diffusers': `python -m benchmarks.encode_bench`."""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.encode_difference import difference_text, measure_differences
from benchmarks.encode_diffusers import HOW_TO_INSTALL, diffusers_version
from benchmarks.encode_files import files_text, measure_files
from benchmarks.encode_goals import HEADER, Results, goal_rows
from benchmarks.encode_others import measure_others, others_text
from benchmarks.encode_plot import draw
from benchmarks.encode_processes import Bench, measure_memory, memory_text
from benchmarks.encode_releases import measure_releases, releases_text
from benchmarks.encode_report import markdown, progress
from benchmarks.encode_sides import COMFYUI as COMFYUI_SIDE
from benchmarks.encode_sides import OURS, Workbench
from benchmarks.encode_start import commands_text, measure_commands, measure_start, start_once, start_text
from benchmarks.encode_time import measure_time, time_text
from benchmarks.encode_trees import Tree, comfyui_version, trees_of
from latent_encoder.telemetry.logs import configure_logging
from latent_encoder.torch_threads import encode_threads
from models import MAX_MEGAPIXELS, MIN_MEGAPIXELS
from tests.helpers import COMFYUI, clean_environment, stock

SECTIONS = ("time", "difference", "releases", "memory", "start", "files", "others")
BY_RELEASE = ("releases", "start")  # the sections that measure the trees of --comfyui too
FAMILIES = ("wan", "kl", "taesd")
PAIRS, QUICK_PAIRS = 5, 1
MEGAPIXELS, QUICK_MEGAPIXELS = (0.25, 1.0, 4.0, 16.0), (0.25,)


@dataclass(frozen=True)
class Plan:
    """The measurements to make, with their trees, sizes and limits."""

    comfyui_path: Path
    further_paths: tuple[Path, ...]
    """The trees of --comfyui."""
    sizes: tuple[float, ...]
    """Sizes in megapixels, ascending."""
    stock_up_to: float
    pairs: int
    timeout_s: float

    @property
    def stock_sizes(self) -> list[float]:
        """The sizes at which ComfyUI's own encode and diffusers' run too."""
        return [size for size in self.sizes if size <= self.stock_up_to]

    @cached_property
    def trees(self) -> list[Tree]:
        """The tree of --comfyui-path, then the trees of --comfyui."""
        return trees_of([self.comfyui_path, *self.further_paths])

    @cached_property
    def temporary_folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="encode-bench-")

    @property
    def folder(self) -> Path:
        return Path(self.temporary_folder.name)

    @cached_property
    def model_dir(self) -> Path:
        progress("making VAEs of the real architectures with random weights")
        folder = self.folder / "models"
        stock("make-vaes", folder, *FAMILIES)  # always by the pinned release, so that all trees have the same weights
        return folder

    @cached_property
    def bench(self) -> Workbench:
        bench = Workbench(self.comfyui_path, self.model_dir)
        # Set after ComfyUI is loaded, which sets it too. The folder is empty, so that the time of compiling is measured.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.folder / "compiled")
        return bench

    @cached_property
    def processes(self) -> Bench:
        return Bench(self.comfyui_path, self.model_dir, self.folder, self.timeout_s)


class Sizes(click.ParamType[tuple[float, ...]]):
    """A list of megapixels, separated by commas."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            sizes = tuple(sorted({float(part) for part in value.split(",")}))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers", param, ctx)
        if not all(MIN_MEGAPIXELS <= size <= MAX_MEGAPIXELS for size in sizes):
            self.fail(f"{value!r}: sizes go from {MIN_MEGAPIXELS} to {MAX_MEGAPIXELS:g} megapixels", param, ctx)
        return sizes


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--only", type=click.Choice(SECTIONS), multiple=True, help="Only this section; may be given several times.")
@click.option("--pairs", type=click.IntRange(min=1), help=f"Rounds, each with every side once; {PAIRS} if absent.")
@click.option("--sizes", type=Sizes(), metavar="N,N,…", help="Megapixels, 1 being 1024 x 1024; 0.25,1,4,16 if absent.")
@click.option(
    "--stock-up-to",
    type=float,
    default=1.0,
    show_default=True,
    metavar="N",
    help="Megapixels up to which the other sides run too; ComfyUI's own takes 7 GB for one.",
)
@click.option("--quick", is_flag=True, help="One round and 0.25 megapixels, unless --pairs or --sizes is given.")
@click.option(
    "--timeout", "timeout_s", type=float, default=3600, show_default=True, metavar="S", help="Seconds for a process."
)
@click.option(
    "--comfyui-path",
    type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
    default=COMFYUI,
    envvar="COMFYUI_PATH",
    help="ComfyUI tree to measure instead of ./comfyui; the variable COMFYUI_PATH names one, too.",
)
@click.option(
    "--comfyui",
    "further_paths",
    type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
    multiple=True,
    metavar="DIR",
    help="Another ComfyUI tree, side by side with the first: its own encode, and ours on it; may be given several times.",
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures there.")
@click.option("--plot", "plot_file", type=click.Path(dir_okay=False, path_type=Path), help="Draw the section memory there.")
def main(
    only: Sequence[str],
    pairs: int | None,
    sizes: tuple[float, ...] | None,
    json_file: Path | None,
    plot_file: Path | None,
    **options: Any,
) -> None:
    """Measure the encode of one image, ours against ComfyUI's own and diffusers', on the CPU.

    \b
    time        one VAEEncode with the full-size Qwen/Wan VAE, in turns, and against the convolutions' floor
    difference  between the latents, in float32 and in bfloat16
    releases    the trees of --comfyui-path and --comfyui, each one's own VAEEncode against ours on it, in turns
    memory      peak of a process that does the whole job
    start       until the nodes can be called, on each tree; the whole command line, --help and health
    files       the time of a request beside the nodes
    others      SD-style VAE and TAESD

    Results go to standard output as Markdown, section by section, and progress to standard error.
    OMP_NUM_THREADS sets the threads of all sides.
    """  # noqa: D301  # click needs the character that \b stands for
    wanted = wanted_sections(only, several_trees=bool(options["further_paths"]))
    quick = options.pop("quick")
    plan = Plan(
        sizes=sizes or (QUICK_MEGAPIXELS if quick else MEGAPIXELS),
        pairs=pairs or (QUICK_PAIRS if quick else PAIRS),
        **options,
    )
    refuse(wanted, plan, plot_file)
    for name in os.environ.keys() - clean_environment().keys():
        del os.environ[name]  # the service's settings: each side gets its own
    configure_logging("WARNING", "text")
    os.environ["OMP_NUM_THREADS"] = str(encode_threads())  # in every process, ours or not
    results = Results(machine(plan), plan.pairs)
    with plan.temporary_folder, torch.inference_mode():
        if plan.further_paths:
            try_trees(plan)
        click.echo("\n".join(f"- {name}: {value}" for name, value in {**results.machine, "rounds": plan.pairs}.items()))
        for name, text in run(plan, results, wanted):
            click.echo(f"\n### {name}\n\n{text}")
            if json_file is not None:  # after each section, so that a failure loses only its own
                json_file.write_text(json.dumps(asdict(results), indent=2) + "\n", encoding="utf-8")
    click.echo(f"\n### results\n\n{markdown(HEADER, goal_rows(results))}")
    if plot_file is not None:
        draw(results.memory, results.machine, plot_file)


def wanted_sections(only: Sequence[str], *, several_trees: bool) -> list[str]:
    """Return the sections to run; all if `only` is empty, except that of the releases, which needs several trees."""
    return [name for name in SECTIONS if name in only or (not only and (name != "releases" or several_trees))]


def try_trees(plan: Plan) -> None:
    """Start both sides on each tree of --comfyui once.

    Raises:
        TreeFailed: a tree lacks something here.
    """
    for tree in plan.trees[1:]:
        progress(f"trying ComfyUI {tree.release}")
        for side in (COMFYUI_SIDE, OURS):
            start_once(side, tree, plan.folder)


def refuse(wanted: Sequence[str], plan: Plan, plot_file: Path | None) -> None:
    """Refuse options that cannot work before an hour is lost.

    Raises:
        click.UsageError: the options do not fit each other, or something is not installed.
    """
    if plot_file is not None and "memory" not in wanted:
        raise click.UsageError("--plot draws what the section memory measures.")
    if plot_file is not None and find_spec("matplotlib") is None:
        raise click.UsageError(f"--plot needs matplotlib: {HOW_TO_INSTALL}")
    if plan.further_paths and not set(wanted) & set(BY_RELEASE):
        raise click.UsageError(f"--comfyui is for the sections {' and '.join(BY_RELEASE)}; --only leaves out both.")
    with_stock = [name for name in wanted if name not in ("memory", "start")]
    if with_stock and not plan.stock_sizes:
        raise click.UsageError(f"--sizes: {', '.join(with_stock)} need one of at most {plan.stock_up_to:g} (--stock-up-to).")


def run(plan: Plan, results: Results, wanted: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Measure section by section, and yield the name of each and its tables."""
    sections: dict[str, Callable[[Plan, Results], str]] = {
        "time": run_time,
        "difference": run_difference,
        "releases": run_releases,
        "memory": run_memory,
        "start": run_start,
        "files": run_files,
        "others": run_others,
    }
    for name in wanted:
        if name not in ("time", "difference") and "bench" in vars(plan):
            plan.bench.forget()
        yield name, sections[name](plan, results)


def run_time(plan: Plan, results: Results) -> str:
    results.time = measure_time(plan.bench, plan.stock_sizes, plan.pairs)
    return time_text(results.time)


def run_difference(plan: Plan, results: Results) -> str:
    results.difference = measure_differences(plan.bench, plan.stock_sizes)
    return difference_text(results.difference)


def run_releases(plan: Plan, results: Results) -> str:
    results.releases = measure_releases(plan.processes, plan.trees, plan.stock_sizes, plan.pairs)
    return releases_text(results.releases)


def run_memory(plan: Plan, results: Results) -> str:
    results.memory = measure_memory(plan.processes, plan.sizes, plan.stock_sizes)
    return memory_text(results.memory)


def run_start(plan: Plan, results: Results) -> str:
    results.start = measure_start(plan.trees, plan.folder, plan.pairs)
    results.commands = measure_commands(plan.comfyui_path, plan.folder, plan.pairs)
    return f"{start_text(results.start)}\n\n{commands_text(results.commands)}"


def run_files(plan: Plan, results: Results) -> str:
    results.files = measure_files(plan.bench, plan.folder, plan.stock_sizes[-1])
    return files_text(results.files)


def run_others(plan: Plan, results: Results) -> str:
    results.others = measure_others(plan.bench, plan.processes, plan.sizes[0], plan.pairs)
    return others_text(results.others)


def machine(plan: Plan) -> dict[str, Any]:
    """Return the facts beside the code that the figures depend on."""
    return {
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "threads": encode_threads(),
        "load average at start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ComfyUI": comfyui_version(plan.comfyui_path),
        "ComfyUI's tree": "the project's" if plan.comfyui_path.samefile(COMFYUI) else "another",
        "further trees": ", ".join(comfyui_version(path) for path in plan.further_paths) or "none",
        "diffusers": diffusers_version(),
    }


def cpu_model() -> str:
    """Return the model name of the processor."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
