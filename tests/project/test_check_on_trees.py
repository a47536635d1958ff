"""The core of the tests on other ComfyUI trees: its tests, and how `scripts/check.sh` runs them on trees."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers import PROJECT
from tests.trees import CORE, PINNED_FACTS, PINNED_TREE, VARIABLE, observe

# Stands for every program of a virtual environment: logs its call, and fails on trees whose folder is named `bad`.
PROGRAM = """#!/bin/sh
printf '%s|%s|%s\\n' "$(basename "$0")" "${TEST_COMFYUI_TREE-}" "$*" >>"$LOG"
case ${TEST_COMFYUI_TREE-} in */bad) exit 1 ;; esac
"""
PROGRAMS = ("python", "ruff", "mypy", "shellcheck", "hadolint")


def test_core_is_whole() -> None:
    """Each file of the core has at least the stated number of tests, and no other file has a test of the core."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=PROJECT, env=os.environ | {VARIABLE: str(PINNED_TREE)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = Counter(line.split("::")[0].removeprefix("tests/") for line in done.stdout.splitlines() if "::" in line)
    assert counts.keys() == CORE.keys()
    assert {name: count for name, count in counts.items() if count < CORE[name]} == {}


def test_facts_of_the_pinned_release_are_those_that_are_observed() -> None:
    """The facts of the pinned release are the observed ones, so that those of another tree mean the same."""
    assert observe(PINNED_TREE) == PINNED_FACTS


def check(folder: Path, *arguments: str | Path) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Run the script with programs that only log; return its result, and each call as name, tree and arguments."""
    (folder / "venv" / "bin").mkdir(parents=True)
    for name in PROGRAMS:
        (folder / "venv" / "bin" / name).write_text(PROGRAM)
        (folder / "venv" / "bin" / name).chmod(0o755)
    log = folder / "calls"
    log.touch()
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment |= {"VENV": str(folder / "venv"), "LOG": str(log)}
    command = [str(PROJECT / "scripts" / "check.sh"), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done, [line.split("|") for line in log.read_text().splitlines()]


def test_quick_check_runs_a_subset_of_the_tests(tmp_path: Path) -> None:
    """Only pytest runs, on files that exist; other arguments go to it."""
    done, calls = check(tmp_path, "--quick", "-x")
    assert (done.returncode, done.stderr, [name for name, *_ in calls]) == (0, "", ["python"])
    files = [argument for argument in calls[0][-1].split() if argument.startswith("tests/")]
    assert len(files) > 10
    assert [file for file in files if not (PROJECT / file).exists()] == []
    assert calls[0][-1].endswith(" -x")


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return tree(tmp_path / "good")


def tree(folder: Path) -> Path:
    folder.mkdir()
    (folder / "nodes.py").touch()
    return folder


def test_without_a_tree_everything_is_checked(tmp_path: Path) -> None:
    """Without a tree, the script runs linters, types and all tests on the pinned release, and passes arguments to pytest."""
    done, calls = check(tmp_path, "-k", "images")
    assert (done.returncode, done.stderr) == (0, "")
    assert [name for name, *_ in calls] == ["ruff", "ruff", "mypy", "shellcheck", "hadolint", "python"]
    assert {used for _, used, _ in calls} == {""}
    assert calls[-1][-1].endswith(" -k images")


def test_each_tree_has_its_run_of_the_tests(tmp_path: Path, good: Path) -> None:
    """The tests run on each tree in order, even after one that fails; relative paths start at the folder of the call."""
    bad = tree(tmp_path / "bad")
    done, calls = check(tmp_path, "--comfyui-tree", "bad", "-x", f"--comfyui-tree={good}", "-k", "images")
    assert [(name, used) for name, used, _ in calls] == [("python", str(bad)), ("python", str(good))]
    assert all(arguments.startswith("-m pytest ") and arguments.endswith(" -x -k images") for *_, arguments in calls)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"Failed on: {bad}\n")


def test_trees_that_all_pass_are_a_success(tmp_path: Path, good: Path) -> None:
    """If the tests pass on all trees, the script reports nothing and exits with status 0."""
    done, calls = check(tmp_path, "--comfyui-tree", good)
    assert (done.returncode, done.stderr, len(calls)) == (0, "", 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--comfyui-tree"], "--comfyui-tree needs a folder"),
        (["--comfyui-tree", "nowhere"], "--comfyui-tree: no ComfyUI in 'nowhere'"),
        (["--comfyui-tree="], "--comfyui-tree: no ComfyUI in ''"),
    ],
)
def test_wrong_usage_runs_nothing(arguments: list[str], words: str, tmp_path: Path) -> None:
    """A folder that is missing or has no ComfyUI gives status 2, before any test runs."""
    done, calls = check(tmp_path, *arguments)
    assert (done.returncode, done.stderr, calls) == (2, f"Error: {words}.\n", [])
