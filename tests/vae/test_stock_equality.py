"""Our files against the four stock nodes of ComfyUI, which run by hand in a process without our code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from config import Settings
from errors import ErrorCode
from latent_encoder.images.scaling import COMFYUI_METHODS
from models import UpscaleMethod
from service import LatentEncoder
from tests.helpers import IMAGES, TINY_VAE, VAE, Encode, load_latent, request_for, stock
from tests.trees import FACTS, LACKING, needs_tiny_vae

pytestmark = pytest.mark.core

METHODS: tuple[UpscaleMethod, ...] = get_args(UpscaleMethod)
FAMILIES = (TINY_VAE, "random_wan.safetensors", "random_kl.safetensors", "taesd", "pixel_space")
ODD_FILES = (
    "5x4000.png",
    "cmyk.jpg",
    "exif_orientation_6.jpg",
    "grey.jpg",
    "grey.png",
    "grey_16_bit.png",
    "grey_with_alpha.png",
    "one_bit.png",
    "one_pixel.png",
    "palette.png",
    "palette_with_transparency.png",
    "progressive.jpeg",
    "rgba.png",
    "two_frames_mpo.jpg",
)

# Megapixels. On older trees the full-size VAE replaces the tiny one; with smaller images the tests take about as long.
SIZE = 0.07 if VAE == TINY_VAE else 0.02
SIZES = (0.01, 0.123, 0.25) if VAE == TINY_VAE else (0.01, 0.03, 0.05)

Case = tuple[str, str, str, float]
CASES: list[Case] = [
    *[("astronaut.png", VAE, method, SIZE) for method in METHODS],
    *[
        ("photo.jpg", family, method, 0.02)
        for family in FAMILIES
        if family not in LACKING
        for method in ("lanczos", "bicubic")
    ],
    *[("astronaut_masked.png", VAE, "lanczos", megapixels) for megapixels in SIZES],
    *[(name, VAE, "lanczos", 0.07 if name == "5x4000.png" else SIZE) for name in ODD_FILES],
]
CROPPED = [("astronaut.png", VAE, "lanczos", SIZE), *[case for case in CASES if case[::2] == ("photo.jpg", "lanczos")]]


EXACT: list[Case] = [("photo.jpg", family, "lanczos", 0.02) for family in (VAE, "random_kl.safetensors")]
STEPS = 8  # pixels along one side of a cell of those families


@pytest.fixture(scope="module")
def stock_results(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Scaled images and latents of the stock nodes for `CASES`, then `EXACT`: `{number}.scaled` and `{number}.latent`."""
    folder = tmp_path_factory.mktemp("stock")
    cases = [[str(IMAGES / name), vae, COMFYUI_METHODS.get(method, method), size] for name, vae, method, size in CASES]
    cases += [
        [str(IMAGES / name), vae, method, size, STEPS] for name, vae, method, size in EXACT if FACTS.has_resolution_steps
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    stock("encode", model_dir, folder / "cases.json", folder / "out.safetensors")
    return load_file(folder / "out.safetensors")


@pytest.fixture(scope="module")
def encoders(encoder: LatentEncoder, settings: Settings) -> dict[str, LatentEncoder]:
    """Make a `LatentEncoder` for each value of ENCODER."""
    stock_settings = settings.model_copy(update={"encoder": "stock"})
    return {"auto": encoder, "stock": LatentEncoder(stock_settings, encoder.runtime)}


@pytest.mark.parametrize("kind", ["auto", "stock"])
@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_files_hold_what_the_stock_nodes_give(
    number: int,
    kind: str,
    stock_results: dict[str, torch.Tensor],
    encoders: dict[str, LatentEncoder],
    settings: Settings,
    tmp_path: Path,
) -> None:
    """The latent is equal to the last bit, by the single-frame encoder within 2e-5; the PNG is the scaled image in 8 bits."""
    name, vae, method, megapixels = CASES[number]
    fields = {"vae_model_name": vae, "upscale_method": method, "megapixels": megapixels}
    response = encoders[kind].encode(request_for(settings, tmp_path, name, fields))
    stock_latent, stock_scaled = stock_results[f"{number}.latent"], stock_results[f"{number}.scaled"]
    single_frame = kind == "auto" and stock_latent.ndim == 5
    assert response.metadata.encoder == ("single-frame" if single_frame else "stock")

    latent = load_latent(response.latent_file_path)
    assert latent.dtype == torch.float32
    assert latent.is_contiguous()
    stock_latent = stock_latent.squeeze(2) if stock_latent.ndim == 5 else stock_latent
    torch.testing.assert_close(latent, stock_latent, atol=2e-5 if single_frame else 0, rtol=0)
    assert list(response.latent_shape) == list(latent.shape) == list(response.metadata.latent_shape)

    with Image.open(response.scaled_image_path) as png:
        assert (png.format, png.mode) == ("PNG", "RGB")
        pixels = torch.frombuffer(bytearray(png.tobytes()), dtype=torch.uint8).view(1, png.height, png.width, 3)
    assert torch.equal(pixels, (stock_scaled.clamp(0, 1) * 255).round().to(torch.uint8))
    assert list(response.metadata.scaled_image_shape) == list(stock_scaled.shape[1:])


@pytest.mark.parametrize("number", range(len(EXACT)), ids=[family for _, family, *_ in EXACT])
def test_exact_fit_is_the_nodes_own_where_they_can(
    number: int, stock_results: dict[str, torch.Tensor], respond: Encode, tmp_path: Path
) -> None:
    """`fit=exact` gives the numbers of `resolution_steps`, with nothing cropped. Without that input the request is refused."""
    name, vae, method, megapixels = EXACT[number]
    response = respond(name, vae_model_name=vae, upscale_method=method, megapixels=megapixels, fit="exact")
    if not FACTS.has_resolution_steps:
        assert response.error_code == ErrorCode.INVALID_REQUEST
        assert "resolution_steps" in response.error_message
        assert list(tmp_path.iterdir()) == []
        return
    latent, stock_latent = load_latent(response.latent_file_path), stock_results[f"{len(CASES) + number}.latent"]
    exactly = response.metadata.encoder == "stock"
    torch.testing.assert_close(latent, stock_latent.view(latent.shape), atol=0 if exactly else 2e-5, rtol=0)
    height, width, _ = response.metadata.scaled_image_shape
    assert (height % STEPS, width % STEPS) == (0, 0)
    assert response.metadata.crop == (0, 0, width, height)


@pytest.mark.parametrize("family", [TINY_VAE, "pixel_space"])
def test_family_that_the_tree_cannot_load_is_refused(family: str, respond: Encode) -> None:
    """If plain ComfyUI of this tree fails on a VAE or does not have it, the response is that error; else it is a success."""
    response = respond("photo.jpg", vae_model_name=family)
    if family not in LACKING:
        assert response.status == "success"
    elif family == "pixel_space":
        assert response.error_code == ErrorCode.VAE_MODEL_NOT_FOUND
    else:
        assert response.error_code == ErrorCode.VAE_MODEL_INVALID
        assert "size mismatch" in response.error_message


def test_metadata_name_the_release(encode: Encode) -> None:
    """`comfyui_version` is the version in the tree's own `comfyui_version.py`."""
    assert encode("photo.jpg").metadata.comfyui_version == FACTS.version


@pytest.mark.parametrize("number", [CASES.index(case) for case in CROPPED])
def test_crop_says_what_the_latent_covers(
    number: int, stock_results: dict[str, torch.Tensor], encoder: LatentEncoder, encode: Encode
) -> None:
    """Encoding only the box in `crop` of the scaled image, with nothing left to crop, gives the same latent."""
    name, vae, method, megapixels = CASES[number]
    response = encode(name, vae_model_name=vae, upscale_method=method, megapixels=megapixels)
    height, width, _ = response.metadata.scaled_image_shape
    left, upper, right, lower = response.metadata.crop
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height
    # Laid out in memory as the scaling node leaves it, channel by channel: the last bits of SD's latents depend on that.
    scaled = stock_results[f"{number}.scaled"].movedim(-1, 1).contiguous().movedim(1, -1)
    cropped = scaled[:, upper:lower, left:right]
    with torch.inference_mode():
        again = encoder.vaes.get(vae).encode(encoder.runtime, cropped, "fail").samples
    assert torch.equal(again.view(response.latent_shape), load_latent(response.latent_file_path))


def psnr(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of images in [0, 1]: -10 log10 of their mean squared difference."""
    return float(-10 * torch.log10(((first - second) ** 2).mean()))


@needs_tiny_vae
def test_latent_decodes_to_the_photo(encode: Encode, tmp_path: Path) -> None:
    """ComfyUI's VAEDecode gives the portrait back with the PSNR in the tiny VAE's README."""
    stated = {0.0625: 23.95, 0.25: 27.19}
    responses = [encode("astronaut.png", megapixels=megapixels, request_id=str(megapixels)) for megapixels in stated]
    stock("decode", tmp_path, tmp_path / "decoded.safetensors", *[response.latent_file_path for response in responses])
    decoded = load_file(tmp_path / "decoded.safetensors")
    for number, (response, value) in enumerate(zip(responses, stated.values(), strict=True)):
        with Image.open(response.scaled_image_path) as png:
            cropped = png.crop(response.metadata.crop)
            photo = torch.frombuffer(bytearray(cropped.tobytes()), dtype=torch.uint8) / 255
        assert psnr(decoded[str(number)].flatten(), photo) == pytest.approx(value, abs=0.05)
