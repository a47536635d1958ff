"""The families against the VAEs that ComfyUI itself builds, on the tested tree and on an older release."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from latent_encoder.releases import is_older
from latent_encoder.vae.checks import TAEF2_DEFAULTS, no_images
from latent_encoder.vae.diffusers_names import has_wan_names, native_names
from latent_encoder.vae.encoders import DECODER_PARTS
from latent_encoder.vae.families import DECODER, FAMILIES, Family, family_of
from scripts.write_families import PAGE, document
from service import LatentEncoder
from tests.helpers import COMFYUI, PROJECT
from tests.vae_zoo import CASES, Case

pytestmark = pytest.mark.core

TREES = (COMFYUI, PROJECT / "tests" / ".comfyui-0.3.52")

Built = Mapping[str, Mapping[str, Any]]

# Class, arguments and latent space of VAEs that diffusers 0.42 builds, with the sizes of the published models.
SD = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
SD_CHANNELS = {**SD, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
WAN_22 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
}
DIFFUSERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "SD": ("AutoencoderKL", SD_CHANNELS, "SD15"),
    "FLUX.1": (
        "AutoencoderKL",
        {**SD_CHANNELS, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
        "Flux",
    ),
    "FLUX.2": ("AutoencoderKLFlux2", {}, "Flux2"),
    "HunyuanVideo": ("AutoencoderKLHunyuanVideo", {}, "HunyuanVideo"),
    "CogVideoX": ("AutoencoderKLCogVideoX", {}, "CogVideoX"),
    "Wan 2.1": ("AutoencoderKLWan", {}, "Wan21"),
    "Qwen-Image": ("AutoencoderKLQwenImage", {}, "Wan21"),
    "Wan 2.2": ("AutoencoderKLWan", WAN_22, "Wan22"),
}


def family(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def release_of(tree: Path) -> str:
    found = re.search(r"__version__ = \"(\S+)\"", (tree / "comfyui_version.py").read_text())
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def in_diffusers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the shapes of VAEs that diffusers builds to a JSON file; an empty object if diffusers is not installed.

    Wan's have the names that the service gives them.
    """
    path = tmp_path_factory.mktemp("diffusers") / "shapes.json"
    if importlib.util.find_spec("diffusers") is None:
        path.write_text("{}")
        return path
    diffusers = importlib.import_module("diffusers")
    shapes = {}
    for name, (model, arguments, _) in DIFFUSERS.items():
        with torch.device("meta"):
            state = getattr(diffusers, model)(**arguments).state_dict()
        names = native_names(state) if has_wan_names(state) else {}
        shapes[name] = {names.get(key, key): tuple(tensor.shape) for key, tensor in state.items()}
    path.write_text(json.dumps(shapes))
    return path


@pytest.fixture(scope="module", params=TREES, ids=lambda tree: tree.name)
def tree(request: pytest.FixtureRequest) -> Path:
    tree: Path = request.param
    return tree


@pytest.fixture(scope="module")
def built(tree: Path, in_diffusers: Path) -> Built:
    """Return the VAEs that ComfyUI builds for each case and for the VAEs of diffusers: see `tests/vae_zoo.py`."""
    command = [sys.executable, str(PROJECT / "tests" / "vae_zoo.py"), str(tree), str(in_diffusers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built: Built = json.loads(done.stdout)
    return built


def names_of(cases: list[Case]) -> set[str]:
    return {case.file for case in cases}


def test_the_table_in_the_documentation_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == document(), "run: .venv/bin/python scripts/write_families.py"


def test_every_family_has_a_case() -> None:
    without = {family.name for family in FAMILIES} - {case.family for case in CASES}
    assert without == set(), "add a Case to CASES in tests/vae_zoo.py"


def test_a_release_builds_what_its_families_say(tree: Path, built: Built) -> None:
    """A family is built by the first release in its case and by later ones; by earlier ones only if the case allows it."""
    release = Version(release_of(tree))
    runnable = [case for case in CASES if "needs" not in built[case.file]]
    assert all(case.needs != "torch" for case in CASES if "needs" in built[case.file])
    right = {
        case.file
        for case in runnable
        if (built[case.file].get("model"), built[case.file].get("channels")) == (case.model, case.channels)
    }
    expected = names_of([case for case in runnable if Version(case.since) <= release])
    tolerated = names_of([case for case in runnable if case.older_untried])
    assert expected <= right, {name: built[name] for name in expected - right}
    assert right - expected - tolerated == set()


def test_a_family_says_what_its_cases_say() -> None:
    for case in CASES:
        assert (family(case.family).no_images is None) == case.images
        assert family(case.family).since == (case.since if case.images else None)
        assert family(case.family).single_frame == (case.model == "WanVAE")


def test_vaes_that_comfyui_builds_are_recognised(tree: Path, built: Built) -> None:
    """Each VAE is recognised by all the tensors of its file, on every release that encodes with it."""
    buildable = [case for case in CASES if "shapes" in built[case.file] and not is_older(release_of(tree), case.since)]
    assert len(buildable) > len(CASES) / 3
    found = {case.file: getattr(family_of(built[case.file]["shapes"], case.file), "name", None) for case in buildable}
    assert found == {case.file: case.family for case in buildable}


def test_tensors_that_comfyui_misses_in_whole_files_are_not_needed(built: Built) -> None:
    """ComfyUI reports tensors as missing in encoders that are published alone."""
    whole = [case.file for case in CASES if case.images and "missing" in built[case.file]]
    needed = {file: lacking(built[file]["missing"]) for file in whole}
    assert {file: names for file, names in needed.items() if names} == {}


def test_comfyui_uses_every_tensor_of_whole_encoders(tree: Path, built: Built) -> None:
    """Left-over tensors of an encoder mean another file, because ComfyUI uses all those of the files that it knows."""
    cases = [case for case in CASES if case.images and not is_older(release_of(tree), case.since)]
    whole = [case.file for case in cases if "left_over" in built[case.file]]
    assert len(whole) > len(CASES) / 3
    left_over = {file: built[file]["left_over"].removeprefix("Leftover VAE keys ").strip("[]") for file in whole}
    used = {
        file: [name for name in names.split(", ") if not name.strip("'").startswith(DECODER_PARTS)]
        for file, names in left_over.items()
        if names
    }
    assert {file: names for file, names in used.items() if names} == {}


def lacking(missing: str) -> list[str]:
    """Return the tensors in ComfyUI's log line about missing ones that our service counts as needed."""
    keys = missing.removeprefix("Missing VAE keys ").strip("[]").split(", ")
    return [key for key in keys if key and not key.strip("'").startswith((*DECODER_PARTS, *TAEF2_DEFAULTS))]


@pytest.mark.parametrize("case", [case for case in CASES if not case.images], ids=lambda case: case.file)
def test_vaes_for_other_things_are_recognised_by_the_tensors_that_comfyui_goes_by(case: Case) -> None:
    """A VAE that encodes no images is recognised by its case's few tensors, also on releases that do not build it."""
    found = family_of(case.marks, case.file)
    assert found is not None
    assert found.name == case.family


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)
def test_comfyuis_own_attributes_show_which_vaes_encode_no_images(case: Case, encoder: LatentEncoder) -> None:
    """They reveal VAEs of unknown families too. Missing tensors reveal a decoder without an encoder."""
    decoder = family(case.family).no_images == DECODER
    if is_older(encoder.runtime.version, case.since) or importlib.util.find_spec(case.needs) is None or decoder:
        return
    device = "cpu" if case.on_cpu else "meta"
    with torch.device(device):
        marks = {name: torch.empty(tuple(shape), device=device) for name, shape in case.marks.items()}
        metadata = {"metadata": dict(case.metadata)} if case.metadata else {}
        vae = importlib.import_module("comfy.sd").VAE(sd=marks, **metadata)
    assert (no_images(vae) is None) == case.images


@pytest.mark.parametrize("name", DIFFUSERS)
def test_the_naming_of_diffusers_is_recognised_and_read_by_comfyui(
    name: str, tree: Path, built: Built, in_diffusers: Path
) -> None:
    """Releases with the family find every tensor that encoding needs in such a file, and leave none of them unused."""
    shapes = json.loads(in_diffusers.read_text()).get(name)
    if shapes is None:
        pytest.skip("diffusers is not installed")
    found = family_of(shapes, "diffusion_pytorch_model.safetensors")
    assert found is not None
    assert found.latent_space == DIFFUSERS[name][2]
    if not is_older(release_of(tree), str(found.since)):
        assert lacking(built[name]["missing"]) == []
        assert built[name]["left_over"] == ""
