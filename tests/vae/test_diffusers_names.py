"""VAEs in the names of diffusers: the latents are those of the same weights in ComfyUI's names, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.encode_diffusers import diffusers_key
from config import Settings
from latent_encoder.doctor.check import Check, State
from latent_encoder.doctor.models import check_file
from latent_encoder.vae.diffusers_names import has_wan_names, native_names
from latent_encoder.vae.loading import load_vae
from service import LatentEncoder
from tests.helpers import VAE, Encode, load_latent
from tests.vae.test_files import whole
from tests.vae.test_single_frame import random_model

pytestmark = pytest.mark.core

WAN_22: dict[str, Any] = {"z_dim": 4, "in_channels": 12, "out_channels": 12, "patch_size": 2, "is_residual": True}


def in_diffusers_names(source: Path, target: Path) -> Path:
    save_file({diffusers_key(name): tensor for name, tensor in load_file(source).items()}, target)
    return target


@pytest.mark.parametrize("source", [VAE, "random_wan.safetensors"])
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_latent_is_that_of_the_native_names(source: str, ending: str, model_dir: Path, encode: Encode) -> None:
    """Both encoders give the same latent for both namings, and the metadata name the file and its latent space."""
    native = whole(model_dir / "vae" / VAE) if source == VAE else model_dir / "vae" / source
    path = in_diffusers_names(native, model_dir / "vae" / "diffusion_pytorch_model.safetensors")
    if ending == "pt":
        torch.save(load_file(path), path := path.with_suffix(".pt"))
    response = encode("photo.jpg", vae_model_name=path.name)
    expected = encode("photo.jpg", vae_model_name=source, request_id="native")
    assert torch.equal(load_latent(response.latent_file_path), load_latent(expected.latent_file_path))
    assert response.metadata.latent_space == expected.metadata.latent_space == "Wan21"
    assert response.metadata.encoder == expected.metadata.encoder


@pytest.mark.parametrize("frames", [1, 5])
def test_stock_encoder_and_decoder_have_the_same_weights(
    frames: int, model_dir: Path, encoder: LatentEncoder, settings: Settings
) -> None:
    """With ENCODER=stock and ROUNDTRIP, every weight of the model is that of the file in native names, also after a reload."""
    stock = settings.model_copy(update={"encoder": "stock", "roundtrip": True})
    native = whole(model_dir / "vae" / VAE)
    path = in_diffusers_names(native, model_dir / "vae" / "all_weights.safetensors")
    ours = load_vae(encoder.runtime, path.name, [path], stock)
    theirs = load_vae(encoder.runtime, VAE, [native], stock)
    for vae in (ours.vae, ours.load()):
        expected = theirs.vae.first_stage_model.state_dict()
        found = vae.first_stage_model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    pixels = torch.rand(frames, 48, 64, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(
            ours.encode(encoder.runtime, pixels, "fail").samples, theirs.encode(encoder.runtime, pixels, "fail").samples
        )


def test_doctor_takes_it_for_a_vae(model_dir: Path, encoder: LatentEncoder, settings: Settings) -> None:
    """The family is that of the native names, and the file can be loaded."""
    path = in_diffusers_names(whole(model_dir / "vae" / VAE), model_dir / "vae" / "for_doctor.safetensors")
    check = check_file(encoder.runtime, path.name, path, settings)
    assert isinstance(check, Check)
    assert (check.state, check.found.partition(", ")[0]) == (State.TICK, f"{path}: Wan 2.1 / Qwen-Image")


@pytest.mark.usefixtures("encoder")
def test_wan_22_computes_what_diffusers_computes() -> None:
    """ComfyUI's model and diffusers' give the same latent and image with the weights by these names: no layers are swapped."""
    diffusers = pytest.importorskip("diffusers")
    ours = random_model("comfy.ldm.wan.vae2_2", dim=8, dec_dim=8, z_dim=4)
    theirs = diffusers.AutoencoderKLWan(base_dim=8, decoder_base_dim=8, **WAN_22).eval()
    names, weights = native_names(theirs.state_dict()), ours.state_dict()
    assert has_wan_names(names)
    assert set(names.values()) == weights.keys()
    theirs.load_state_dict({name: weights[native] for name, native in names.items()})
    pixels = torch.rand(1, 3, 1, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.inference_mode():
        expected, found = theirs.encode(pixels).latent_dist.mean, ours.encode(pixels)
        assert torch.allclose(found, expected, atol=1e-5)
        assert torch.allclose(ours.decode(found), theirs.decode(expected).sample, atol=1e-4)
    assert float(expected.std()) > 0.01
