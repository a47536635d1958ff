"""Families by the names and shapes of tensors: of files, of models that ComfyUI and diffusers make, and of other content."""

from __future__ import annotations

import importlib
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from latent_encoder.vae.families import FAMILIES, family_of
from latent_encoder.vae.weights_files import read_shapes
from service import LatentEncoder
from tests.helpers import PROJECT, TINY_VAE

TINY_VAE_FILE = PROJECT / "tiny_vae" / TINY_VAE


def latent_space(shapes: Any, file_name: str) -> str | None:
    family = family_of(shapes, file_name)
    return family.latent_space if family else None


def shapes_of(make: Callable[[], torch.nn.Module]) -> dict[str, tuple[int, ...]]:
    """Return the shapes in a model's state, without the memory and the time that its weights would take."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}


@pytest.fixture(scope="module")
def kl_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    return read_shapes(model_dir / "vae" / "random_kl.safetensors")


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("vae/random_wan.safetensors", "Wan21"),
        ("vae/random_kl.safetensors", "SD15"),
        ("vae_approx/taesd_encoder.safetensors", "SD15"),
        ("vae_approx/taesd_decoder.safetensors", "SD15"),
    ],
)
def test_files_that_comfyui_loads_are_recognised(model_dir: Path, file: str, expected: str) -> None:
    assert latent_space(read_shapes(model_dir / file), file) == expected


def test_the_tiny_vae_is_of_the_family_that_it_was_made_for() -> None:
    assert latent_space(read_shapes(TINY_VAE_FILE), TINY_VAE) == "Wan21"


def test_pixel_space_has_no_file() -> None:
    assert latent_space({}, "pixel_space") == "ChromaRadiance"
    assert family_of({}, "empty.safetensors") is None


@pytest.mark.parametrize(
    ("name", "expected"), [("sdxl_vae.safetensors", "SDXL"), ("SD_XL_vae.pt", "SDXL"), ("vae-ft-mse-840000.ckpt", "SD15")]
)
def test_sdxl_is_told_by_its_name(kl_shapes: dict[str, tuple[int, ...]], name: str, expected: str) -> None:
    assert latent_space(kl_shapes, name) == expected
    assert latent_space(kl_shapes, f"some/folder/{name}") == expected


@pytest.mark.parametrize(("name", "expected"), [("sd3_vae.safetensors", "SD3"), ("ae.safetensors", "Flux")])
def test_sd3_is_told_by_its_name(kl_shapes: dict[str, tuple[int, ...]], name: str, expected: str) -> None:
    assert latent_space({**kl_shapes, "decoder.conv_in.weight": (512, 16, 3, 3)}, name) == expected


@pytest.mark.parametrize(("name", "expected"), [("taesdxl", "SDXL"), ("taesd3", "SD3"), ("taef1", "Flux"), ("taesd", "SD15")])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.usefixtures("encoder")
def test_tiny_autoencoders(part: str, name: str, expected: str) -> None:
    channels = 16 if expected in ("SD3", "Flux") else 4
    model = importlib.import_module("comfy.taesd.taesd").TAESD
    both = shapes_of(lambda: model(latent_channels=channels))
    prefix = f"taesd_{part}."
    shapes = {key.removeprefix(prefix): shape for key, shape in both.items() if key.startswith(prefix)}
    assert latent_space(shapes, f"{name}_{part}.pth") == expected
    assert latent_space(both, name) == expected


@pytest.mark.usefixtures("encoder")
def test_wan_2_2() -> None:
    shape = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True]}
    model = importlib.import_module("comfy.ldm.wan.vae2_2").WanVAE
    assert latent_space(shapes_of(lambda: model(dim=160, z_dim=48, **shape)), "wan2.2_vae.safetensors") == "Wan22"


@pytest.mark.parametrize(
    ("model", "arguments", "expected"),
    [
        ("AutoencoderKLQwenImage", {}, "Wan21"),
        ("AutoencoderKLWan", {}, "Wan21"),
        ("AutoencoderKLWan", {"z_dim": 48, "in_channels": 12, "out_channels": 12, "patch_size": 2}, "Wan22"),
        (
            "AutoencoderKL",
            {
                "down_block_types": ("DownEncoderBlock2D",) * 4,
                "up_block_types": ("UpDecoderBlock2D",) * 4,
                "block_out_channels": (32, 32, 32, 32),
            },
            "SD15",
        ),
    ],
)
def test_the_naming_of_diffusers(model: str, arguments: dict[str, Any], expected: str) -> None:
    make = getattr(pytest.importorskip("diffusers"), model)
    assert latent_space(shapes_of(lambda: make(**arguments)), "diffusion_pytorch_model.safetensors") == expected


def test_the_vae_in_a_checkpoint_is_of_no_family(kl_shapes: dict[str, tuple[int, ...]]) -> None:
    """A checkpoint has a prefix in front of its VAE's names. VAELoader does not load it either: another node does."""
    assert family_of({f"first_stage_model.{name}": shape for name, shape in kl_shapes.items()}, "sd15.safetensors") is None


def test_every_latent_space_is_one_of_comfyui(encoder: LatentEncoder) -> None:
    """The latent space of each family that this release encodes with is a class of this release."""
    known = [family for family in FAMILIES if family.latent_space and family.fault(encoder.runtime.version) is None]
    assert len(known) > 20
    assert [family.name for family in known if encoder.runtime.latent_space(str(family.latent_space)) is None] == []


def test_a_family_that_a_release_lacks_is_reported_with_the_first_that_has_it() -> None:
    seedvr2 = next(family for family in FAMILIES if family.name == "SeedVR2")
    assert seedvr2.fault("0.3.75") == "it is SeedVR2, which needs a newer ComfyUI than 0.3.75; 0.33.0 is tested with it"
    assert seedvr2.fault("0.33.0") is None
    assert seedvr2.fault("unknown") is None


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_pickles_have_shapes_too(tmp_path: Path, zipped: bool, wrapped: bool) -> None:
    weights = {"decoder.middle.0.residual.0.gamma": torch.ones(2, 1, 1, 1), "decoder.conv1.weight": torch.ones(2, 16, 3, 3, 3)}
    content = {"state_dict": weights, "epoch": 3} if wrapped else weights
    torch.save(content, tmp_path / "vae.ckpt", _use_new_zipfile_serialization=zipped)
    assert read_shapes(tmp_path / "vae.ckpt") == {name: tuple(tensor.shape) for name, tensor in weights.items()}


def test_reading_shapes_runs_no_pickle(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"weight": Trap()}, tmp_path / "vae.pt")
    with pytest.raises(pickle.UnpicklingError):
        read_shapes(tmp_path / "vae.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["vae.safetensors", "vae.pt"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04no archive", b"neither of them"])
def test_file_without_weights_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile)):
        read_shapes(tmp_path / name)


def test_a_tensor_alone_is_no_vae(tmp_path: Path) -> None:
    torch.save(torch.zeros(2), tmp_path / "latent.pt")
    with pytest.raises(pickle.UnpicklingError, match="it holds a Tensor, not tensors by name"):
        read_shapes(tmp_path / "latent.pt")
    save_file({"latent": torch.zeros(2)}, tmp_path / "latent.safetensors")
    assert family_of(read_shapes(tmp_path / "latent.safetensors"), "latent.safetensors") is None
