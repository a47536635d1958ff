"""Preview and roundtrip image as requests get them: the files, the numbers, and the refusals."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage.metrics import structural_similarity

from config import Settings
from errors import EncodingFailed, SetupError, VaeModelInvalid
from latent_encoder.geometry import Size
from latent_encoder.outputs.files import space_needed
from latent_encoder.outputs.roundtrip import decode, mean_ssim, psnr
from latent_encoder.vae.cache import VaeCache
from models import Metadata, SuccessResponse
from service import LatentEncoder
from tests.helpers import IMAGES, PROJECT, TINY_VAE, Encode, RunMain, load_latent, request_for

TINY = PROJECT / "tiny_vae" / TINY_VAE

Look = Callable[..., SuccessResponse]


@pytest.fixture(scope="module")
def seeing_settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"preview": True, "roundtrip": True})


@pytest.fixture(scope="module")
def seeing(encoder: LatentEncoder, seeing_settings: Settings) -> LatentEncoder:
    """Return an encoder with PREVIEW and ROUNDTRIP."""
    return LatentEncoder(seeing_settings, encoder.runtime)


@pytest.fixture
def look(seeing: LatentEncoder, settings: Settings, tmp_path: Path) -> Look:
    """Encode like the fixture `encode`, with PREVIEW and ROUNDTRIP."""
    return lambda image, **fields: seeing.encode(request_for(settings, tmp_path, image, {"megapixels": 0.01, **fields}))


def pixels(path: str | Path | None) -> Any:
    assert path is not None
    with Image.open(path) as image:
        return np.asarray(image)


def covered(response: SuccessResponse) -> Any:
    """Return the pixels of the scaled image's file that the latent covers."""
    left, upper, right, lower = response.metadata.crop
    return pixels(response.scaled_image_path)[upper:lower, left:right]


def checksum_of(path: str | None) -> str:
    assert path is not None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_the_trained_vae_gives_back_what_it_got(look: Look) -> None:
    response = look("astronaut.png", megapixels=0.1)
    measured = response.metadata.roundtrip
    assert measured is not None
    assert measured.psnr_db is not None
    assert measured.ssim is not None
    decoded, original = pixels(response.roundtrip_path) / 255.0, covered(response) / 255.0
    assert measured.psnr_db == pytest.approx(-10 * math.log10(((decoded - original) ** 2).mean()), abs=0.02)
    assert measured.ssim == pytest.approx(structural_similarity(original, decoded, data_range=1.0, channel_axis=-1), abs=2e-4)
    assert measured.psnr_db > 20
    assert measured.ssim > 0.6


@pytest.mark.parametrize("vae", [TINY_VAE, "random_kl.safetensors", "taesd", "pixel_space"])
def test_a_request_gets_two_images_more(look: Look, tmp_path: Path, vae: str) -> None:
    response = look("photo.jpg", vae_model_name=vae)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "latent_photo_test.pt",
        "latent_photo_test.pt.json",
        "scaled_image_photo_test.png",
        "preview_photo_test.png",
        "roundtrip_photo_test.png",
    }
    metadata = Metadata.model_validate_json((tmp_path / "latent_photo_test.pt.json").read_text())
    assert metadata == response.metadata
    assert metadata.preview_sha256 == checksum_of(response.preview_path)
    assert metadata.roundtrip is not None
    assert metadata.roundtrip.image_sha256 == checksum_of(response.roundtrip_path)
    assert metadata.timings_ms.roundtrip > 0

    expected = covered(response)
    assert pixels(response.roundtrip_path).shape == expected.shape
    preview = pixels(response.preview_path)
    height, width, _ = expected.shape
    assert preview.shape == (height, 2 * width, 3)
    assert np.array_equal(preview[:, :width], expected)


def test_odd_sizes_are_cropped(look: Look) -> None:
    """Neither side of the scaled image is a multiple of eight, and the comparison is with the part that the latent covers."""
    response = look("astronaut.png", megapixels=0.05)
    left, upper, right, lower = response.metadata.crop
    height, width, _ = response.metadata.scaled_image_shape
    assert left > 0
    assert upper > 0
    assert right < width
    assert lower < height
    assert pixels(response.roundtrip_path).shape == (lower - upper, right - left, 3)


@pytest.mark.parametrize("vae", [TINY_VAE, "taesd"])
def test_the_decoded_image_is_that_of_a_whole_vae(look: Look, encoder: LatentEncoder, vae: str) -> None:
    """The weights that the fast encoder drops do not change the decoded image."""
    response = look("photo.jpg", vae_model_name=vae)
    latent = load_latent(response.latent_file_path)
    samples = latent.unsqueeze(2) if vae == TINY_VAE else latent
    with torch.inference_mode():
        whole = importlib.import_module("nodes").VAELoader().load_vae(vae)[0]
        (expected,) = importlib.import_module("nodes").VAEDecode().decode(whole, {"samples": samples})
    assert np.array_equal(pixels(response.roundtrip_path), (expected[0] * 255).round().to(torch.uint8).numpy())
    assert encoder.runtime.version == response.metadata.comfyui_version


def test_the_latent_is_the_same_as_without_more_images(look: Look, encode: Encode) -> None:
    with_images = load_latent(look("photo.jpg", megapixels=0.02).latent_file_path)
    assert torch.equal(with_images, load_latent(encode("photo.jpg").latent_file_path))


def test_equal_images_have_no_noise(look: Look) -> None:
    metadata = look("photo.jpg", vae_model_name="pixel_space").metadata
    assert metadata.latent_space == "ChromaRadiance"
    assert metadata.roundtrip is not None
    assert (metadata.roundtrip.psnr_db, metadata.roundtrip.ssim) == (None, 1.0)


def test_an_image_smaller_than_the_window_has_no_similarity(look: Look) -> None:
    """Four pixels wide; SSIM looks at seven."""
    measured = look("5x4000.png", megapixels=0.01, vae_model_name="pixel_space").metadata.roundtrip
    assert measured is not None
    assert measured.ssim is None


def test_numbers_of_images_that_are_known() -> None:
    grey, lighter = torch.full((1, 8, 8, 3), 100 / 255), torch.full((1, 8, 8, 3), 110 / 255)
    assert psnr(lighter, grey) == pytest.approx(20 * math.log10(25.5), abs=0.005)
    assert psnr(grey, grey) is None
    assert psnr(grey + 1e-4, grey) is None, "a difference that no file shows"
    noise = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    assert mean_ssim(noise, noise) == 1.0
    assert (mean_ssim(1 - noise, noise) or 0) < -0.5
    assert mean_ssim(grey[:, :6], grey[:, :6]) is None
    assert mean_ssim(grey[:, :7], grey[:, :7]) == 1.0


def test_without_the_settings_nothing_is_drawn(encode: Encode, tmp_path: Path) -> None:
    response = encode("photo.jpg")
    assert len(list(tmp_path.iterdir())) == 3
    assert (response.preview_path, response.roundtrip_path) == (None, None)
    assert (response.metadata.preview_sha256, response.metadata.roundtrip) == (None, None)
    assert response.metadata.latent_space == "Wan21"
    assert response.metadata.timings_ms.roundtrip == 0


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda weights: weights.pop("decoder.middle.0.residual.2.weight"),
            "lacks tensors that a round trip needs: decoder.mid",
        ),
        (lambda weights: weights["conv2.bias"].fill_(math.nan), "not finite in: conv2.bias"),
    ],
)
def test_a_vae_that_cannot_decode_is_refused(
    model_dir: Path, look: Look, encode: Encode, tmp_path: Path, damage: Callable[[Any], Any], words: str
) -> None:
    """It still encodes; ComfyUI would decode with uninitialised memory."""
    weights = load_file(TINY)
    damage(weights)
    save_file(weights, model_dir / "vae" / "cannot_decode.safetensors")
    with pytest.raises(VaeModelInvalid, match=words):
        look("photo.jpg", vae_model_name="cannot_decode.safetensors")
    assert list(tmp_path.iterdir()) == []
    assert encode("photo.jpg", vae_model_name="cannot_decode.safetensors").metadata.roundtrip is None


def test_a_decoder_that_does_not_belong_shows(model_dir: Path, look: Look) -> None:
    weights = load_file(TINY)
    weights["decoder.head.2.weight"] = weights["decoder.head.2.weight"].flip(0).neg()
    save_file(weights, model_dir / "vae" / "wrong_decoder.safetensors")
    measured = look("photo.jpg", vae_model_name="wrong_decoder.safetensors").metadata.roundtrip
    assert measured is not None
    assert measured.psnr_db is not None
    assert measured.psnr_db < 15


def test_lack_of_memory_for_the_decode_fails_the_request(
    seeing: LatentEncoder, look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = seeing.vaes.get(TINY_VAE).vae.first_stage_model
    monkeypatch.setattr(model, "decode", lambda _: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(EncodingFailed, match=r"failed to decode the latent of a .* image: memory ran out"):
        look("photo.jpg")
    assert list(tmp_path.iterdir()) == []


def test_an_image_of_another_size_is_no_comparison(seeing: LatentEncoder) -> None:
    with torch.inference_mode(), pytest.raises(EncodingFailed, match=r"40 x 40 px image to a tensor of \[1, 32, 40, 3\]"):
        decode(seeing.runtime, seeing.vaes.get(TINY_VAE), torch.zeros(1, 16, 4, 5), Size(40, 40))


def test_values_that_are_not_finite_are_no_image(seeing: LatentEncoder) -> None:
    with torch.inference_mode(), pytest.raises(EncodingFailed, match="decodes to values that are not finite"):
        decode(seeing.runtime, seeing.vaes.get(TINY_VAE), torch.full((1, 16, 4, 5), math.nan), Size(40, 32))


def test_a_tree_without_the_node_fails_only_when_it_is_asked(encoder: LatentEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = type(encoder.runtime)(encoder.runtime.path, ())
    monkeypatch.delitem(importlib.import_module("nodes").NODE_CLASS_MAPPINGS, "VAEDecode")
    with pytest.raises(SetupError, match="has no node VAEDecode"):
        runtime.decode(encoder.vaes.get("pixel_space").vae, torch.zeros(1, 3, 8, 8))


def weights_of(vaes: VaeCache, part: str) -> int:
    model = vaes.get(TINY_VAE).vae.first_stage_model
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith(part))


def test_the_memory_of_weights_that_nobody_uses_is_given_back(encoder: LatentEncoder, seeing: LatentEncoder) -> None:
    assert weights_of(encoder.vaes, "decoder.") == weights_of(seeing.vaes, "encoder.") == 0
    assert weights_of(seeing.vaes, "decoder.") == sum(
        tensor.numel() for name, tensor in load_file(TINY).items() if name.startswith("decoder.")
    )


def test_images_of_another_run_do_not_stay_beside_its_latent(look: Look, encode: Encode, tmp_path: Path) -> None:
    assert look("photo.jpg").preview_path == str(tmp_path / "preview_photo_test.png")
    encode("photo.jpg", megapixels=0.03)
    assert len(list(tmp_path.iterdir())) == 3


def test_metadata_of_the_version_before_can_still_be_read(encode: Encode, tmp_path: Path) -> None:
    encode("photo.jpg")
    fields = json.loads((tmp_path / "latent_photo_test.pt.json").read_text())
    for name in ("alpha", "colour_error", "latent_format", "latent_space", "latent_statistics", "preview_sha256", "roundtrip"):
        del fields[name]
    del fields["timings_ms"]["roundtrip"]
    assert Metadata.model_validate(fields).roundtrip is None


def test_images_need_space_too(look: Look, tmp_path: Path) -> None:
    """Noise does not compress, and pixel space keeps all of it."""
    noise = torch.randint(256, (128, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(tmp_path / "noise.png")
    response = look(tmp_path / "noise.png", vae_model_name="pixel_space", output_dir=str(tmp_path / "out"))
    height, width, _ = response.metadata.scaled_image_shape
    taken = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert space_needed(Size(width, height), 1, 3) < taken < space_needed(Size(width, height), 1, 3, images=4)


def test_the_command_line_names_the_images(run_main: RunMain, tmp_path: Path) -> None:
    arguments = ("--image_path", IMAGES / "photo.jpg", "--vae_model_name", TINY_VAE, "--megapixels", "0.02", "--device", "cpu")
    done = run_main(*arguments, "--preview", "--roundtrip", "--request_id", "1")
    assert done.returncode == 0, done.stderr
    response = json.loads(done.stdout)
    assert response["preview_path"] == str(tmp_path / "output" / "preview_photo_1.png")
    assert response["roundtrip_path"] == str(tmp_path / "output" / "roundtrip_photo_1.png")
    assert response["metadata"]["roundtrip"]["psnr_db"] > 15
