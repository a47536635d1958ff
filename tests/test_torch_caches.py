"""Tests of torch's caches of operations: bounded whatever the sizes of the images, in a process of its own each."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from latent_encoder.torch_caches import CACHES, CAPACITY, limit_torch_caches
from tests.helpers import PROJECT, VAE, clean_environment

GROWTH = 2_000_000  # bytes; without a limit it is 28 MB, with it less than 0.5 MB
CODE = 80_000_000  # bytes of address space; each of CAPACITY operations reserves 0.26 MB, each of torch's own 1024 too
SIZES = tuple((160 + 16 * number, 128) for number in range(14))
"""Sizes in pixels, of more operations together than CAPACITY."""


@pytest.fixture
def unlimited(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Return the environment of a user who has set no cache."""
    for variables in CACHES:
        for variable in variables:
            monkeypatch.delenv(variable, raising=False)
    return monkeypatch


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library has no mallinfo2")
@pytest.mark.usefixtures("unlimited")
def test_memory_stays_if_all_sizes_differ(tmp_path: Path) -> None:
    """Memory in use and compiled code are the same after 160 encodes of different sizes as after 80."""
    file = tmp_path / "samples.json"
    command = ["-m", "benchmarks.memory_growth", "--vaes", "1", "--encodes", "160", "--every", "80", "--json", str(file)]
    subprocess.run([sys.executable, *command], cwd=PROJECT, env=clean_environment(), check=True, capture_output=True)
    (_, _, first), *_, (_, _, last) = json.loads(file.read_text())
    assert last["in_use"] - first["in_use"] < GROWTH
    assert 0 < last["code_mapped"] < CODE


def operations_made(folder: Path, **environment: str) -> int:
    """Return how many operations oneDNN made in a run over images of all SIZES, and of the first size again."""
    images = [folder / f"{number}.png" for number in range(len(SIZES) + 1)]
    for image, size in zip(images, (*SIZES, SIZES[0]), strict=True):
        Image.new("RGB", size, "grey").save(image)
    variables = {"VAE_MODEL_NAME": VAE, "DEVICE": "cpu", "ONEDNN_VERBOSE": "profile_create", **environment}
    command: list[str | Path] = [
        PROJECT / "main.py",
        "--output_dir",
        folder / "output",
        "--force",
        "--megapixels",
        "0.02",
        *images,
    ]
    done = subprocess.run(
        [sys.executable, *command], env=clean_environment() | variables, check=True, capture_output=True, text=True
    )
    return done.stderr.count("create:cache_miss")


@pytest.mark.usefixtures("unlimited")
def test_old_sizes_are_forgotten_unless_the_user_wants_more(tmp_path: Path) -> None:
    """A run makes the operations of a size again that came long before, unless the environment allows more."""
    assert operations_made(tmp_path) > operations_made(tmp_path, ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024")


@pytest.mark.parametrize("given", [{}, {CACHES[0][1]: "7"}, {CACHES[1][0]: "7"}], ids=["none", "old name", "torch's"])
def test_limit_respects_the_environment(given: Mapping[str, str], unlimited: pytest.MonkeyPatch) -> None:
    """A cache gets CAPACITY if the environment sets it under none of its names."""
    environment = dict(given)
    unlimited.setattr("os.environ", environment)
    limit_torch_caches()
    expected = {variables[0]: str(CAPACITY) for variables in CACHES if not given.keys() & set(variables)}
    assert environment == dict(given) | expected
