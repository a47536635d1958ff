"""The encode benchmark's arithmetic, its counting of work, and its processes; its measurements are not tested."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

from benchmarks.encode_bench import SECTIONS, main, wanted_sections
from benchmarks.encode_difference import BFLOAT16, FLOAT32, Difference, Differences, distance
from benchmarks.encode_diffusers import diffusers_key, scaled
from benchmarks.encode_files import FileWork, TimedRuntime
from benchmarks.encode_flops import Flops, attention_flops, convolution_flops, count_flops
from benchmarks.encode_goals import NOT_MEASURED, OTHER_VAE, Results, goal_rows
from benchmarks.encode_others import OtherVae
from benchmarks.encode_peers import Peer
from benchmarks.encode_processes import Bench, Job, outcome, planned, run_process
from benchmarks.encode_releases import ReleaseTimes, SizeReleases, measure_releases, releases_text
from benchmarks.encode_report import Spread, gigabytes, markdown
from benchmarks.encode_sides import COMFYUI, COMPILED, DIFFUSERS, HALF, OURS, Side
from benchmarks.encode_start import (
    Commands,
    SideStarts,
    Start,
    Starts,
    commands_text,
    measure_commands,
    measure_start,
    start_text,
)
from benchmarks.encode_time import Run, SideTimes, SizeTimes, compile_s, side_times
from benchmarks.encode_trees import Tree, TreeFailed, comfyui_version, trees_of
from latent_encoder.process_memory import peak_bytes
from service import LatentEncoder
from tests.helpers import COMFYUI as TREE
from tests.helpers import PATIENCE_S, PROJECT, TINY_VAE, clean_environment

FLOPS = Flops(convolutions=400, linear=0, attention=0)
WAN_DIMS = [(96, 96), (96, 192), (192, 384), (384, 384)]  # in and out, of the four levels of the full-size encoder


def test_spread_is_median_and_range() -> None:
    """A spread is shown as its median and range, one run without a range, and a factor changes the unit."""
    assert Spread((3.0, 1.0, 2.0)).text() == "2.00 [1.00-3.00]"
    assert Spread((0.0123,)).text(1, 1e3) == "12.3"


def test_table_is_markdown() -> None:
    """A table has a header, a rule and a line for each row."""
    assert markdown(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_convolution_counts_the_last_slice_in_time_only() -> None:
    """A kernel with three slices costs one frame as much as its 2-D counterpart."""
    plane, video = nn.Conv2d(4, 6, 3, padding=1), nn.Conv3d(4, 6, 3, padding=1)
    out = (1, 6, 10, 12)
    assert convolution_flops(plane.weight.shape, out) == 2 * (6 * 10 * 12) * 4 * 9
    assert convolution_flops(video.weight.shape, (1, 6, 1, 10, 12)) == convolution_flops(plane.weight.shape, out)


def not_computed(*_: Tensor) -> Tensor:
    raise AssertionError("the attention was computed")


class ToyVae(nn.Module):
    """A convolution that halves, one of a single pixel, an attention, and one layer that only decoding uses."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.mix = nn.Conv2d(8, 8, 1)
        self.optimized_attention = not_computed
        self.decoder = nn.Conv2d(8, 3, 3)

    def encode(self, frame: Tensor) -> Tensor:
        mixed = self.mix(self.down(frame))
        return self.optimized_attention(mixed, mixed, mixed)


def test_work_is_counted_by_kind() -> None:
    """Work is counted by shape and by kind, without layers that do not run, and the model stays as it was."""
    model = ToyVae()
    expected = Flops(
        convolutions=2 * (8 * 16 * 16) * 3 * 9, linear=2 * (8 * 16 * 16) * 8, attention=attention_flops(16 * 16, 8)
    )
    assert count_flops(model, (1, 3, 32, 32)) == expected
    assert model.optimized_attention is not_computed
    assert model.down.weight.device.type == "cpu"


def test_work_of_the_full_size_vae(encoder: LatentEncoder) -> None:
    """The count for ComfyUI's own class equals a count by its architecture, to the last operation."""
    assert encoder.runtime.version  # ComfyUI is imported
    with torch.device("meta"):
        model = importlib.import_module("comfy.ldm.wan.vae").WanVAE(
            dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], temperal_downsample=[False, True, True]
        )
    side = 64
    convolutions = 2 * side**2 * 3 * 96 * 9
    linear = 0
    for level, (first, last) in enumerate(WAN_DIMS):
        pixels = (side >> level) ** 2
        convolutions += 2 * pixels * 9 * (first * last + 3 * last * last)  # two blocks of two convolutions
        linear += 2 * pixels * first * last if first != last else 0  # the shortcut
        convolutions += 2 * (pixels // 4) * 9 * last * last if level < 3 else 0  # half the size
    tokens = (side // 8) ** 2
    convolutions += 2 * tokens * 9 * (4 * 384 * 384 + 384 * 32)  # the middle and the head
    linear += 2 * tokens * (384 * 3 * 384 + 384 * 384 + 32 * 32)
    assert count_flops(model, (1, 3, 1, side, side)) == Flops(convolutions, linear, 4 * tokens**2 * 384)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("conv1.weight", "quant_conv.weight"),
        ("encoder.conv1.bias", "encoder.conv_in.bias"),
        ("encoder.downsamples.3.shortcut.weight", "encoder.down_blocks.3.conv_shortcut.weight"),
        ("encoder.downsamples.5.time_conv.weight", "encoder.down_blocks.5.time_conv.weight"),
        ("encoder.middle.1.to_qkv.bias", "encoder.mid_block.attentions.0.to_qkv.bias"),
        ("encoder.middle.2.residual.6.weight", "encoder.mid_block.resnets.1.conv2.weight"),
        ("encoder.head.0.gamma", "encoder.norm_out.gamma"),
        ("decoder.upsamples.2.residual.3.gamma", "decoder.up_blocks.0.resnets.2.norm2.gamma"),
        ("decoder.upsamples.7.resample.1.bias", "decoder.up_blocks.1.upsamplers.0.resample.1.bias"),
        ("decoder.upsamples.12.residual.2.bias", "decoder.up_blocks.3.resnets.0.conv1.bias"),
    ],
)
def test_key_has_diffusers_name(key: str, expected: str) -> None:
    """Each kind of layer gets its name in diffusers, also in the decoder, whose layers the file numbers through."""
    assert diffusers_key(key) == expected


def test_pixels_for_diffusers_have_sides_of_whole_cells() -> None:
    """The sides are multiples of 8 pixels with about the requested area, and the values are in [0, 1]."""
    pixels = scaled(Image.new("RGB", (1000, 700), "white"), 0.1)
    assert pixels.shape == (264, 384, 3)  # of 271 x 387
    assert float(pixels.max()) == 1.0


def test_ratios_are_of_the_same_round() -> None:
    """A ratio is of the same round and not of medians, so that a slow round of both sides does not change it."""
    side = Side(OURS, "single-frame", 1.0, nn.Identity(), torch.neg)
    runs, stock = [Run(1.0, 500.0), Run(10.0, 50.0)], [Run(4.0, 500.0), Run(40.0, 50.0)]
    times = side_times(side, first_s=7.5, runs=runs, stock=stock, flops=FLOPS)
    assert times.speedup.runs == (4.0, 4.0)
    assert times.to_floor.runs == (1.25, 1.25)
    assert times.cold_s == 2.0


def test_compiling_costs_what_loading_and_the_first_encode_take_more() -> None:
    """Compiling costs the additional time of loading and of the first encode; there is no figure unless both were measured."""
    assert compile_s(size_times(0.25, [side_of(OURS, 1.0), side_of(COMPILED, 1.0, load_s=9.0, first_s=3.0)])) == 10.0
    assert compile_s(size_times(0.25, [side_of(OURS, 1.0)])) is None


def side_of(name: str, seconds: float, load_s: float = 1.0, first_s: float = 1.0) -> SideTimes:
    return SideTimes(name, "single-frame", load_s, first_s, Spread((seconds,)), Spread((4 / seconds,)), Spread((seconds,)))


def size_times(megapixels: float, sides: list[SideTimes]) -> SizeTimes:
    return SizeTimes(megapixels, 512, 512, FLOPS, Spread((400.0,)), 0.0, sides, {})


def test_distance_is_in_float32() -> None:
    """The distance is the largest and the mean difference in float32, with the standard deviation of the expected latent."""
    expected = torch.tensor([1.0, 2.0, 3.0])
    given = torch.tensor([1.0, 2.5, 3.0], dtype=torch.bfloat16)
    assert distance(given, expected) == pytest.approx((0.5, 0.5 / 3, 1.0))


@pytest.mark.parametrize(
    ("status", "output", "timed_out", "expected"),
    [
        (0, "", False, "ok"),
        (-9, "", True, "not done in time"),
        (-9, "", False, "killed by the system, out of memory"),
        (-11, "", False, "ended by SIGSEGV"),
        (1, "RuntimeError: DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes", False, "out of memory"),
        (1, "one\nImportError: no such thing\n", False, "exit status 1: ImportError: no such thing"),
        (3, "", False, "exit status 3: "),
    ],
)
def test_process_that_fails_says_why(status: int, output: str, timed_out: bool, expected: str) -> None:
    """The outcome of a failed process names the lack of memory, of time, or another reason."""
    assert outcome(status, output, timed_out=timed_out) == expected


def test_peak_is_that_of_the_process_itself(tmp_path: Path) -> None:
    """The peak is that of the process itself and not of the one that starts it, which has torch loaded."""
    small = run_process([sys.executable, "-c", "print('there')"], tmp_path, timeout_s=60)
    large = run_process([sys.executable, "-c", "held = b'x' * 200_000_000"], tmp_path, timeout_s=60)
    assert (small.outcome, small.stdout) == ("ok", "there\n")
    assert small.peak_bytes < 60e6
    assert 200e6 < large.peak_bytes < 260e6


def test_process_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    """A process that takes too long is killed and gives a result instead of an error of the benchmark."""
    late = run_process([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, timeout_s=0.5)
    assert late.outcome == "not done in time"
    assert late.seconds < 30


def test_others_run_at_their_sizes_only() -> None:
    """Our side runs at the floor and at every size, the others only at their own sizes."""
    sides = [side for side in planned((1.0, 16.0), (1.0,)) if side[0] != DIFFUSERS]
    assert sides == [(OURS, 0.01), (OURS, 1.0), (COMFYUI, 1.0), (OURS, 16.0)]


def test_time_inside_the_nodes_is_counted(encoder: LatentEncoder) -> None:
    """Only the time inside the four nodes counts, and everything else of the runtime stays available."""
    runtime = TimedRuntime(encoder.runtime)
    assert runtime.version == encoder.runtime.version
    assert runtime.seconds == 0.0
    runtime.scale(torch.zeros(1, 64, 64, 3), "bilinear", 0.01)
    assert runtime.seconds > 0.0


def test_goal_without_a_measurement_says_so() -> None:
    """Without measurements of its size, each goal has a row without a figure."""
    rows = goal_rows(Results(machine={}, pairs=1, time=[size_times(4.0, [side_of(COMFYUI, 4.0), side_of(OURS, 1.0)])]))
    assert len(rows) == 15
    assert {measured for _, _, measured in rows} == {NOT_MEASURED}


def test_goals_are_held_against_what_was_measured() -> None:
    """Each goal is compared with the default encoder's figure at the goal's own size."""
    mb = 1_000_000
    results = Results(
        machine={},
        pairs=1,
        time=[size_times(size, [side_of(COMFYUI, 4.0), side_of(OURS, 1.0), side_of(HALF, 0.5)]) for size in (0.25, 1.0)],
        releases=[releases_of(size) for size in (0.25, 1.0)],
        difference=Differences(
            [
                Difference(1.0, FLOAT32, OURS, "single-frame", 3e-6, 1e-6, 0.5),
                Difference(1.0, FLOAT32, COMPILED, "single-frame", 1.0, 1.0, 0.5),
                Difference(1.0, BFLOAT16, COMFYUI, "stock", 0.04, 0.02, 0.5),
                Difference(1.0, BFLOAT16, OURS, "single-frame", 0.03, 0.01, 0.5),
            ],
            {},
        ),
        memory=[
            Job(OURS, "single-frame", "full", 0.01, 1.0, 900 * mb, "ok"),
            Job(OURS, "single-frame", "full", 1.0, 1.0, 1300 * mb, "ok"),
            Job(COMFYUI, "stock", "full", 1.0, 1.0, 6900 * mb, "ok"),
            Job(OURS, "single-frame", "full", 16.0, 1.0, 4000 * mb, "not done in time"),
        ],
        others=[
            OtherVae(
                OTHER_VAE,
                "stock",
                1.0,
                *(Spread((3.0,)), Spread((2.0,)), Spread((1.5,)), 1e-6),
                *(Job(side, "stock", "kl", 1.0, 1.0, size * mb, "ok") for side, size in ((COMFYUI, 2000), (OURS, 1100))),
            )
        ],
        commands=Commands(Spread((2.0, 2.5, 3.0)), Spread((3.0, 4.0, 5.0)), Spread((0.3,)), Spread((0.2,))),
        files=FileWork(1.0, "single-frame", Spread((0.9,)), Spread((0.18,)), Spread((0.08,)), Spread((0.08, 0.09, 0.1))),
    )
    assert [measured for _, _, measured in goal_rows(results)] == [
        "3.00 (6.0 s to 2.0 s)",
        "3.00 (6.0 s to 2.0 s)",
        "2.00",
        "1.30 GB (ComfyUI's: 6.90 GB)",
        NOT_MEASURED,
        "not done in time",
        "3.0e-06",
        "0.75 (1 MP)",
        "0.50 (1 MP)",
        "1.50 (1 MP)",
        "0.55 (1 MP)",
        "1.50 [1.00-2.00] s (4.00 [3.00-5.00] s)",
        "0.30 s",
        "0.20 s",
        "90 [80-100] ms",
    ]


def releases_of(megapixels: float) -> SizeReleases:
    """Return figures of two releases, of which the second sets the goal."""
    ours, stock = Spread((2.0,)), {"0.3.75": Spread((9.0,)), "0.33.0": Spread((6.0,))}
    rows = [
        ReleaseTimes(name, "single-frame", own, ours, Spread((own.median / ours.median,)), 3e-6, 4_000_000_000, 1_200_000_000)
        for name, own in stock.items()
    ]
    return SizeReleases(megapixels, 512, 512, 0.0, rows)


def test_whole_commands_are_timed(tmp_path: Path) -> None:
    """The command line takes longer than `import torch`, which takes longer than `--help`."""
    commands = measure_commands(TREE, tmp_path, pairs=1)
    assert commands.help.median < commands.import_torch.median < commands.encode.median
    assert commands.beyond_torch.median == commands.encode.median - commands.import_torch.median
    assert "`main.py --mode health`" in commands_text(commands)


def starts_of(release: str, ours: tuple[float, ...], comfyui: tuple[float, ...]) -> Starts:
    sides = (SideStarts.of([Start(seconds, seconds / 2, 600_000_000) for seconds in side]) for side in (ours, comfyui))
    return Starts(release, *sides)


def test_start_table_has_both_sides_of_each_tree() -> None:
    """The table of starts has the seconds, the part that loads ComfyUI, and the peak memory of both sides of each tree."""
    lines = start_text([starts_of("0.3.75", (2.0, 3.0, 4.0), (7.0,)), starts_of("0.33.0", (5.0,), (8.0,))]).splitlines()
    assert lines[2] == "| 0.3.75 | ours | 3.00 [2.00-4.00] | 1.50 [1.00-2.00] | 0.60 GB |"
    assert lines[5] == "| 0.33.0 | ComfyUI's own modules, plainly imported | 8.00 | 4.00 | 0.60 GB |"


def test_start_is_measured_on_each_tree(tmp_path: Path) -> None:
    """On each tree, loading ComfyUI takes a part of the start, and the memory is that of a process with torch."""
    (starts,) = measure_start(trees_of([TREE]), tmp_path, pairs=1)
    for side in (starts.ours, starts.comfyui):
        assert 0 < side.loading_s.median < side.seconds.median
        assert side.peak_bytes.median > 100e6


def test_releases_are_measured_side_by_side(model_dir: Path, tmp_path: Path) -> None:
    """Each tree's own encode and ours on it run in processes of their own, on the same pixels, and give like latents."""
    trees = [Tree(TREE, "first"), Tree(TREE, "second")]
    bench = Bench(TREE, model_dir, tmp_path, timeout_s=PATIENCE_S)
    (size,) = measure_releases(bench, trees, (0.01,), pairs=2, vae=TINY_VAE)
    assert (size.width, size.height) == (96, 96)  # of 102 x 102
    assert [release.release for release in size.releases] == ["first", "second"]
    for release in size.releases:
        assert release.encoder == "single-frame"
        assert 0 < release.max_abs < 2e-5
        assert len(release.comfyui_s.runs) == len(release.ours_s.runs) == 2
        assert min(release.comfyui_peak_bytes, release.our_peak_bytes) > 100e6


def test_table_of_releases_has_a_row_for_each() -> None:
    """Each release has a row with medians, ranges, the difference and both peaks."""
    own, ours = Spread((4.0, 6.0, 8.0)), Spread((2.0, 2.0, 2.0))
    release = ReleaseTimes("0.33.0", "single-frame", own, ours, Spread((2.0, 3.0, 4.0)), 3e-6, 3_700_000_000, 1_400_000_000)
    lines = releases_text([SizeReleases(0.25, 512, 512, 0.012, [release])]).splitlines()
    assert lines[0] == "512 x 512. Other processes had 1.2% of the CPUs meanwhile."
    assert lines[-1] == (
        "| 0.33.0 | 6.00 [4.00-8.00] | 2.00 [2.00-2.00] | 3.00 [2.00-4.00] | single-frame | 3.0e-06 | 3.70 GB | 1.40 GB |"
    )


def test_table_of_releases_on_a_busy_machine_says_that_it_does_not_hold() -> None:
    """Memory and differences do; a few percent for others are no matter."""
    calm, busy = (releases_text([SizeReleases(0.25, 512, 512, share, [])]) for share in (0.05, 0.76))
    assert "too busy" not in calm
    assert "had 76.0% of the CPUs meanwhile. The machine was too busy: run it again" in busy


def test_release_that_fails_in_the_middle_says_why(model_dir: Path, tmp_path: Path) -> None:
    """The message for a tree that fails has its release, its side and the last line of its process."""
    bench = Bench(TREE, model_dir, tmp_path, timeout_s=PATIENCE_S)
    with Peer(bench, Tree(TREE, "0.3.75"), COMFYUI, TINY_VAE) as peer, pytest.raises(TreeFailed) as failed:
        peer.encode(tmp_path / "absent.pt", tmp_path / "latent.pt")
    assert "ComfyUI 0.3.75" in failed.value.message
    assert "absent.pt" in failed.value.message


def test_release_that_takes_too_long_is_ended(model_dir: Path, tmp_path: Path) -> None:
    """The time limit also holds for loading, and the message names it."""
    with pytest.raises(TreeFailed, match="not done in time"):
        Peer(Bench(TREE, model_dir, tmp_path, timeout_s=0.1), Tree(TREE, "0.3.75"), OURS, TINY_VAE)


def test_peak_of_a_running_process_is_its_own() -> None:
    """The peak of a running process includes memory that was freed, and nothing of the process that started it."""
    code = "held = b'x' * 200_000_000; del held; print('there', flush=True); input()"
    command = [sys.executable, "-S", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 200e6 < peak_bytes(process.pid) < 260e6


def test_trees_have_distinct_names(tmp_path: Path) -> None:
    """A tree is named by its release, with its path if two trees have the same release, and each tree is listed once."""
    for name, release in (("a", "0.33.0"), ("b", "0.33.0"), ("c", "0.3.64")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "comfyui_version.py").write_text(f'__version__ = "{release}"\n')
    trees = trees_of([tmp_path / "a", tmp_path / "b", tmp_path / "c", tmp_path / "b" / ".." / "a"])
    assert [tree.release for tree in trees] == [f"0.33.0 ({tmp_path / 'a'})", f"0.33.0 ({tmp_path / 'b'})", "0.3.64"]


def test_releases_are_a_section_where_there_are_several() -> None:
    """The section of the releases runs with several trees or if it is named; the other sections run in any case."""
    assert wanted_sections((), several_trees=True) == list(SECTIONS)
    assert wanted_sections((), several_trees=False) == [name for name in SECTIONS if name != "releases"]
    assert wanted_sections(("start", "releases"), several_trees=False) == ["releases", "start"]


def test_tree_that_cannot_run_is_named_before_anything_is_measured(tmp_path: Path) -> None:
    """A tree that lacks something is reported with the reason and the remedy."""
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "cli_args.py").write_text("import a_package_that_is_not_here\n")
    arguments = ("--comfyui", tmp_path, "--only", "releases", "--sizes", "0.01")
    command = [sys.executable, "-m", "benchmarks.encode_bench", *map(str, arguments)]
    done = subprocess.run(command, cwd=PROJECT, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"ComfyUI unknown in {tmp_path}" in done.stderr
    assert "a_package_that_is_not_here" in done.stderr
    assert "has the packages that every tree named needs" in done.stderr
    assert "making VAEs" not in done.stderr


def test_version_of_a_tree_is_read_without_running_it(tmp_path: Path) -> None:
    """The version of a tree is read from its file, and is unknown without one."""
    assert comfyui_version(TREE) != "unknown"
    assert comfyui_version(tmp_path) == "unknown"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--sizes", "1,x"], "not a list of numbers"),
        (["--sizes", "0.25,17"], "0.01 to 16 megapixels"),
        (["--sizes", "4", "--only", "time"], "--stock-up-to"),
        (["--plot", "plot.png", "--only", "time"], "section memory"),
        (["--comfyui", str(TREE), "--only", "time"], "sections releases and start"),
    ],
)
def test_options_that_do_not_fit_are_refused_at_once(arguments: list[str], reason: str) -> None:
    """Options that do not fit each other are refused before anything is measured."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert reason in result.output


def test_gigabytes_are_powers_of_ten() -> None:
    """A GB is 10^9 bytes, so that a limit in GB is stricter than the same number of GiB."""
    assert gigabytes(1_500_000_000) == "1.50 GB"
