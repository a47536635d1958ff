"""The small VAEs of several families, end to end: our service against the stock nodes, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from latent_encoder.vae.families import FAMILIES
from tests.helpers import COMFYUI, IMAGES, PROJECT, load_latent, stock
from tests.vae.test_zoo import release_of
from tests.vae_zoo import CASES

pytestmark = pytest.mark.core

NAMES = (
    "effnet_encoder.safetensors",
    "lighttaehy1_5.safetensors",
    "lighttaew2_1.safetensors",
    "lighttaew2_2.safetensors",
    "taef2",
    "taeh3.safetensors",
    "taehv.safetensors",
    "taeltx_2.safetensors",
)

FAMILY = {case.file: next(family for family in FAMILIES if family.name == case.family) for case in CASES}

PIXELS_PER_CELL = {"effnet_encoder.safetensors": 32, "taeltx_2.safetensors": 32, "taef2": 16}
"""Pixels along one side of a cell; for other VAEs, 8 with 16 channels and 16 with more."""

Responses = Mapping[str, Mapping[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with the VAEs in `models/`."""
    folder = tmp_path_factory.mktemp("tiny")
    stock("make-vaes", folder / "models", "tiny")
    return folder


@pytest.fixture(scope="module")
def responses(folder: Path) -> Responses:
    """Return the responses of our service for a square image, scaled to 256 x 256 pixels, by the VAE's name."""
    cases = [[str(IMAGES / "astronaut.png"), name, "lanczos", 0.0625] for name in NAMES]
    (folder / "ours.json").write_text(json.dumps(cases))
    script = PROJECT / "tests" / "encode_cases.py"
    command = [sys.executable, str(script), str(COMFYUI), str(folder / "models"), str(folder / "ours.json"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(NAMES, map(json.loads, done.stdout.splitlines()), strict=True))


def encodes(name: str) -> bool:
    """Return whether the tree encodes with that VAE."""
    return FAMILY[name].fault(release_of(COMFYUI)) is None


@pytest.fixture(scope="module")
def expected(folder: Path) -> Mapping[str, torch.Tensor]:
    """Return the latents of the stock nodes, by the VAE's name."""
    names = [name for name in NAMES if encodes(name)]
    cases = [[str(IMAGES / "astronaut.png"), name, "lanczos", 0.0625] for name in names]
    (folder / "cases.json").write_text(json.dumps(cases))
    stock("encode", folder / "models", folder / "cases.json", folder / "out.safetensors")
    tensors = load_file(folder / "out.safetensors")
    return {name: tensors[f"{number}.latent"] for number, name in enumerate(names)}


@pytest.mark.parametrize("name", [name for name in NAMES if encodes(name)])
def test_latent_is_that_of_the_stock_nodes(name: str, responses: Responses, expected: Mapping[str, torch.Tensor]) -> None:
    """The latent is equal to the last bit, and the metadata have the family's latent space."""
    response, latent = responses[name], expected[name]
    assert response["status"] == "success", response
    latent = latent.squeeze(2) if latent.ndim == 5 else latent
    assert latent.std() > 0.05
    assert torch.equal(load_latent(response["latent_file_path"]), latent)
    assert response["metadata"]["latent_space"] == FAMILY[name].latent_space
    assert response["metadata"]["encoder"] == "stock"
    assert response["metadata"]["crop"] == [0, 0, 256, 256]
    assert latent.shape[-1] == 256 // PIXELS_PER_CELL.get(name, 8 if latent.shape[1] == 16 else 16)


@pytest.mark.parametrize("name", [name for name in NAMES if not encodes(name)])
def test_a_release_without_the_family_refuses_it(name: str, responses: Responses) -> None:
    assert responses[name]["status"] == "error"
    assert responses[name]["error_code"] in ("VAE_MODEL_INVALID", "VAE_MODEL_NOT_FOUND")
