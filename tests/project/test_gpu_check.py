"""The GPU check and the simulation beside it, rehearsed on the CPU: packing, groups, failures, arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check import FULL, QUICK, Check, Group, failed, groups_of, measured, text_of, tried
from benchmarks.gpu_check_packed import fits, is_missing
from benchmarks.gpu_check_peers import COMFYUI, OURS, Peer, PeerFailed
from benchmarks.gpu_simulation import busy_with, cpus_for, threads_for
from benchmarks.stage_runs import StageRun
from scripts import pack_gpu_check
from tests.helpers import COMFYUI as TREE
from tests.helpers import PATIENCE_S, PROJECT, TINY_VAE, clean_environment

COLUMNS = [("name", lambda row: row["name"]), ("value", lambda row: f"{row['value']:.1f}"), ("more", lambda row: row["more"])]

RUN = StageRun(
    kind="12 MP JPEG",
    threads=2,
    requests=10,
    seconds=5.0,
    wall_s={"prepare": 8.0, "encode": 1.0, "write": 0.5},
    cpu_s={"prepare": 4.0, "encode": 0.1, "write": 0.3, "other": 0.1},
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a packed folder without wheels."""
    folder = tmp_path_factory.mktemp("packed") / "folder"
    assert pack_gpu_check.main([str(folder), "--no-wheels"]) == 0
    return folder


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Return a check without sides that has a minute left."""
    return Check(QUICK, "cpu", tmp_path, [], time.monotonic() + 60, ExitStack())


def test_rehearsal_from_the_packed_folder(packed: Path, tmp_path: Path) -> None:
    """The packed folder alone is enough for every group, in a process that has neither the project nor its settings."""
    file = tmp_path / "results.json"
    command = [sys.executable, str(packed / "run.py"), "--device", "cpu", "--quick", "--json", str(file)]
    done = subprocess.run(
        command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(file.read_text())
    assert results["machine"]["device"].startswith("stand-in for a GPU")
    assert [group["name"] for group in results["groups"]] == [group.name for group in groups_of(QUICK)]
    equal, times, worker, choices = (group["rows"] for group in results["groups"])
    assert [row["max_abs"] < limit for row, limit in zip(equal, (1e-4, 0.2), strict=True)] == [True, True]
    assert {row["encoder"] for row in times} == {"stock", "single-frame"}
    assert [row["requests"] for row in worker] == [QUICK.requests] * 3
    assert "milliseconds" in choices[0]


def test_packed_folder_is_small(packed: Path) -> None:
    """The folder leaves room for the wheels, and has no file of the trees' web pages and text encoders."""
    assert pack_gpu_check.size_of(packed) < 12 * 1024**2
    ours = packed / "latent_encoder"
    others = (file for file in packed.rglob("*") if not file.is_relative_to(ours))
    assert not [file for file in others if file.suffix in {".js", ".pyc"}]
    assert not list(ours.rglob("*.pyc"))


def test_folder_that_exists_is_left_alone(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Packing into a folder that exists fails and names it."""
    assert pack_gpu_check.main([str(packed), "--no-wheels"]) == 1
    assert str(packed) in capsys.readouterr().err


def test_too_large_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder beyond the limit is an error that has both sizes."""
    monkeypatch.setattr(pack_gpu_check, "MOST_BYTES", 1024**2)
    with pytest.raises(pack_gpu_check.TooLarge, match=r"\d\.\d MiB, more than 1"):
        pack_gpu_check.pack(tmp_path / "folder", [TREE], wheels=False)


def test_wheels_are_those_of_the_lock() -> None:
    """Each wheel that the lock has is downloaded in its version and with its checksums."""
    names = [*pack_gpu_check.WHEELS, *pack_gpu_check.WHEELS_OF_DIFFUSERS]
    entries = list(pack_gpu_check.locked_entries(names))
    assert [entry.split("==")[0] for entry in entries] == names
    assert all("--hash=sha256:" in entry for entry in entries)


def test_wheels_of_a_newer_tree(tmp_path: Path) -> None:
    """A tree's requirements decide which packages of newer trees are carried, and in which version."""
    (tmp_path / "requirements.txt").write_text("torch\ncomfy-kitchen==0.2.31\nkornia>=0.7.1\nspandrel\n")
    assert list(pack_gpu_check.of_trees([tmp_path, tmp_path / "none"])) == [
        "comfy-kitchen==0.2.31",
        "kornia>=0.7.1",
        "kornia-rs",
    ]


@pytest.mark.parametrize(
    ("wheel", "fitting"),
    [
        ("a-1-py3-none-any.whl", True),
        ("a-1-cp39-abi3-manylinux2014_x86_64.whl", True),
        ("a-1-cp399-abi3-manylinux2014_x86_64.whl", False),
        (f"a-1-cp3{sys.version_info.minor}-cp3{sys.version_info.minor}-manylinux2014_x86_64.whl", True),
        ("a-1-cp399-cp399-manylinux2014_x86_64.whl", False),
    ],
)
def test_wheel_fits_this_python(wheel: str, fitting: bool) -> None:
    """A wheel is unpacked only on a Python that it is for."""
    assert fits(Path(wheel)) == fitting


def test_wheel_that_is_installed_is_not_unpacked() -> None:
    """A package that the machine has in that version is the machine's own; another version is unpacked."""
    assert is_missing(Path("pytest-0.0.1-py3-none-any.whl"))
    assert is_missing(Path("no_such_package-1.0-py3-none-any.whl"))
    assert not is_missing(Path(f"pytest-{pytest.__version__}-py3-none-any.whl"))


def test_group_that_fails_does_not_end_the_check(check: Check) -> None:
    """The error of a group is its result, and the check has failed."""

    def measure(_: Check) -> list[dict[str, Any]]:
        raise RuntimeError("no kernel image")

    group = Group("broken", 1.0, measure, COLUMNS)
    result = measured(group, check)
    assert failed(result)
    assert text_of(group, result) == "Failed: RuntimeError: no kernel image"


def test_row_that_fails_has_its_error_in_the_table(check: Check) -> None:
    """A side that fails takes a row with its error, and the other rows have their values."""

    def failing() -> dict[str, Any]:
        raise PeerFailed("out of memory")

    rows = [tried({"name": "a"}, lambda: {"value": 1.0, "more": "x"}), tried({"name": "b"}, failing)]
    group = Group("mixed", 1.0, lambda _: rows, COLUMNS)
    result = measured(group, check)
    assert failed(result)
    assert text_of(group, result).splitlines()[2:4] == ["| a | 1.0 | x |", "| b | failed: out of memory |  |"]


def test_group_without_time_is_skipped(check: Check) -> None:
    """A group that may take longer than the rest of the budget is skipped, which is no failure."""
    group = Group("long", 100.0, lambda _: [], COLUMNS)
    result = measured(group, check)
    assert not failed(result)
    assert "of the budget were left, and it may take 100 s" in text_of(group, result)


def test_groups_fit_the_budget_in_their_order() -> None:
    """Equality, the time of a megapixel and the worker come first; the largest image is last."""
    names = [group.name for group in groups_of(FULL)]
    assert names[:3] == ["equality", "time at 1 MP", "worker"]
    assert names[-1] == "time at 16 MP"


def test_side_that_cannot_start(tmp_path: Path) -> None:
    """The failure of a side has the last line that its process wrote."""
    peer = Peer(COMFYUI, "0", [str(tmp_path), str(tmp_path), TINY_VAE, "cpu"], tmp_path)
    with pytest.raises(PeerFailed, match=r"status 1: ModuleNotFoundError: No module named 'comfy'"):
        peer.run("encode", PATIENCE_S)
    peer.close()


def test_command_that_fails_leaves_the_side_running(tmp_path: Path) -> None:
    """A failed command has the reason, and the next one is carried out; a command without time ends the side."""
    peer = Peer(OURS, "0", [str(TREE), str(tmp_path), "no_such_vae.safetensors", "cpu"], tmp_path)
    options = {"precision": "fp32", "pixels": "none.pt", "latent": "none.pt", "rounds": 1}
    for _ in range(2):
        with pytest.raises(PeerFailed, match="VaeModelNotFound: VAE model not found"):
            peer.run("encode", PATIENCE_S, **options)
    with pytest.raises(PeerFailed, match="not done after 0 s"):
        peer._result(0.01)
    peer.close()


def test_shares_of_the_stages() -> None:
    """The share of the preparation is that of its threads, and the busiest stage is the limit."""
    assert (RUN.per_second, RUN.busy("prepare"), RUN.busy("encode"), RUN.limit) == (2.0, 0.8, 0.2, "prepare")
    assert RUN.cpu_ms("prepare") == 400


def test_computed_share_of_an_encoder() -> None:
    """On few CPUs they are the limit, on many the threads that prepare; 20 encodes a second keep the encoder busy."""
    assert busy_with(RUN, 2, 0.05) == pytest.approx(2.5 * 0.05)  # one thread prepares, 0.4 s of its CPU each
    assert busy_with(RUN, 16, 0.05) == 1.0  # eight threads prepare 20 a second
    assert cpus_for(RUN, 0.9, 0.05) == pytest.approx(18 * 0.45)
    assert threads_for(RUN, 0.9, 0.05) == 8


def test_simulation_runs() -> None:
    """The simulation prints a row for each kind of file and count of threads."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_simulation",
        "--quick",
        "--kind",
        "1 MP PNG",
        "--threads",
        "1",
        "--count",
        "2",
    ]
    done = subprocess.run(command, cwd=PROJECT, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| 1 MP PNG | 1 |" in done.stdout
