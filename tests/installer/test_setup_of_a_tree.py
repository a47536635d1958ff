"""Tests of the way from a ComfyUI tree to latents: setup from that tree, then the command line, both as processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import COMFYUI, IMAGES, PROJECT, VAE, clean_environment, load_latent, stock
from tests.trees import FACTS

pytestmark = pytest.mark.core

PHOTOS = ("astronaut.png", "photo.jpg", "exif_orientation_6.jpg")
MEGAPIXELS = 0.02
NO_PACKAGES = {"VENV": sys.prefix, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "COMFYUI_PATH": ""}
"""The environment of the tests, in which setup finds nothing to install."""


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Return the settings of processes without the tree, which they must find in `comfyui/`."""
    return {name: value for name, value in clean_environment().items() if name != "COMFYUI_PATH"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the project without its tests and documents."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    copy = tmp_path_factory.mktemp("project")
    for name in listed.rstrip("\0").split("\0"):
        if not name.startswith(("tests/", "docs/", "benchmarks/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def setup(project: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `./setup_comfyui.sh --from` with the tree of the tests."""
    command = [str(project / "setup_comfyui.sh"), "--from", str(COMFYUI)]
    return subprocess.run(command, env={**environment, **NO_PACKAGES}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def expected(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """Return the photos' latents by the tree's own nodes."""
    folder = tmp_path_factory.mktemp("stock")
    (folder / "cases.json").write_text(json.dumps([[str(IMAGES / name), VAE, "lanczos", MEGAPIXELS] for name in PHOTOS]))
    stock("encode", model_dir, folder / "cases.json", folder / "out.safetensors")
    latents = load_file(folder / "out.safetensors")
    return [latents[f"{number}.latent"].squeeze(2) for number in range(len(PHOTOS))]


def test_setup_tries_the_tree_and_is_ready(setup: subprocess.CompletedProcess[str]) -> None:
    """Setup names the release and the nodes that ran before it prints "Ready."."""
    assert setup.returncode == 0, setup.stdout + setup.stderr
    *_, tried, ready = setup.stdout.splitlines()
    assert tried.startswith(f"ComfyUI: {FACTS.version} ran ")
    assert ready.startswith("Ready. ")


@pytest.mark.parametrize("encoder", ["auto", "stock"])
@pytest.mark.usefixtures("setup")
def test_photos_get_the_latents_of_that_tree(
    encoder: str, project: Path, environment: Mapping[str, str], expected: list[torch.Tensor], tmp_path: Path
) -> None:
    """The command line gives the tree's latents within 2e-5, and to the last bit with ENCODER=stock."""
    photos = [str(IMAGES / name) for name in PHOTOS]
    arguments = ["--image_path", *photos, "--vae_model_name", VAE, "--megapixels", str(MEGAPIXELS)]
    command = [sys.executable, str(project / "main.py"), *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env={**environment, "ENCODER": encoder}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    responses: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    for response, latent in zip(responses, expected, strict=True):
        assert response["metadata"]["comfyui_version"] == FACTS.version
        assert response["metadata"]["encoder"] == ("single-frame" if encoder == "auto" else "stock")
        atol = 2e-5 if encoder == "auto" else 0
        torch.testing.assert_close(load_latent(response["latent_file_path"]), latent, atol=atol, rtol=0)
