"""The single-frame encoder against the `encode` of the models that it is made from, ComfyUI's own."""

from __future__ import annotations

import copy
import importlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_encoder.vae import row_strips
from latent_encoder.vae.encoders import difference
from latent_encoder.vae.single_frame import SingleFrameEncoder, UnknownArchitecture
from service import LatentEncoder
from tests.helpers import VAE

pytestmark = pytest.mark.core

ATOL = 2e-5

SHAPE = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True]}

Pair = tuple[Any, SingleFrameEncoder, int]


def random_model(module: str, **shape: Any) -> Any:
    """A WanVAE of ComfyUI's with random weights of a fixed seed, under which activations neither vanish nor explode."""
    model = importlib.import_module(module).WanVAE(**shape, **SHAPE).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        random = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma"):
            parameter.data = 1 + 0.1 * random
        else:
            parameter.data = 0.1 * random if parameter.ndim < 2 else random * parameter.shape[1:].numel() ** -0.5
    return model


@pytest.fixture(scope="module")
def models(encoder: LatentEncoder) -> dict[str, Pair]:
    """Small models of both generations, and one wide enough for the convolutions in half the multiplications."""
    assert encoder.runtime.version  # ComfyUI can be imported once it is loaded
    made = {
        "2.1": (random_model("comfy.ldm.wan.vae", dim=8, z_dim=16), 8),
        "2.1 wide": (random_model("comfy.ldm.wan.vae", dim=64, z_dim=16), 8),
        "2.2": (random_model("comfy.ldm.wan.vae2_2", dim=16, z_dim=48), 16),
    }
    made["2.1 RGBA"] = (with_alpha(random_model("comfy.ldm.wan.vae", dim=8, z_dim=16)), 8)
    return {name: (model, SingleFrameEncoder(model), factor) for name, (model, factor) in made.items()}


def with_alpha(model: Any) -> Any:
    """The model with a first convolution of four channels, as Qwen-Image-Layered's VAE has it."""
    first = model.encoder.conv1
    model.encoder.conv1 = type(first)(4, first.out_channels, 3, padding=1).requires_grad_(False)
    weights = torch.cat((first.weight, first.weight[:, :1].flip(-1)), dim=1)
    model.encoder.conv1.load_state_dict({"weight": weights, "bias": first.bias})
    return model


@pytest.fixture
def strip_pixels(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many pixels a strip has."""
    return lambda pixels: monkeypatch.setitem(row_strips.STRIP_PIXELS, "cpu", pixels)


def picture(height: int, width: int, colours: int = 3) -> torch.Tensor:
    return torch.rand(1, colours, 1, height, width, generator=torch.Generator().manual_seed(height * 1000 + width)) * 2 - 1


def assert_same(pair: Pair, pixels: torch.Tensor) -> None:
    model, encoder, _ = pair
    with torch.inference_mode():
        expected, given = model.encode(pixels), encoder(pixels)
    assert given.shape == expected.shape
    torch.testing.assert_close(given, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["2.1", "2.1 wide", "2.2"])
@settings(max_examples=15)
@given(rows=st.integers(1, 12), columns=st.integers(1, 6), pixels=st.integers(200, 3000))
def test_latent_of_any_size_in_any_strips(name: str, models: dict[str, Pair], rows: int, columns: int, pixels: int) -> None:
    """Down to one latent cell, and in strips down to one row."""
    factor = models[name][2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(row_strips.STRIP_PIXELS, "cpu", pixels)
        assert_same(models[name], picture(rows * factor, columns * factor))


def test_alpha_is_a_fourth_channel(models: dict[str, Pair], strip_pixels: Callable[[int], None]) -> None:
    """It is not lost on the way into the strips, and the check of a new encoder tries it."""
    strip_pixels(300)
    model, encoder, _ = models["2.1 RGBA"]
    pixels = picture(40, 24, colours=4)
    assert_same(models["2.1 RGBA"], pixels)
    with torch.inference_mode():
        assert difference(model, encoder) is None
        assert not torch.equal(encoder(pixels), encoder(pixels * torch.tensor([1, 1, 1, -1]).view(1, 4, 1, 1, 1)))


def test_options_of_a_models_encode_are_taken(models: dict[str, Pair]) -> None:
    """Newer releases give some models a device."""
    _, encoder, _ = models["2.1"]
    with torch.inference_mode():
        assert torch.equal(encoder(picture(16, 16), device=torch.device("cpu")), encoder(picture(16, 16)))


def test_strip_borders_at_every_offset(models: dict[str, Pair], strip_pixels: Callable[[int], None]) -> None:
    """Strips of 1 to 25 rows of a picture of 48."""
    for rows in range(1, 26):
        strip_pixels(rows * 16)
        assert_same(models["2.1"], picture(48, 16))


@pytest.mark.parametrize(("height", "width"), [(2048, 8), (8, 2048), (8, 8)])
def test_very_long_pictures(models: dict[str, Pair], height: int, width: int) -> None:
    """Wider than a strip has pixels is one row at a time."""
    assert_same(models["2.1"], picture(height, width))


def test_picture_wider_than_a_strip(models: dict[str, Pair], strip_pixels: Callable[[int], None]) -> None:
    """A strip has at least one row of latent patches, however wide they are."""
    strip_pixels(1)
    for name in ("2.1", "2.2"):
        assert_same(models[name], picture(32, 64))


def test_bfloat16_is_no_further_from_float32_than_the_models_own(models: dict[str, Pair]) -> None:
    """The distance to the model's own float32 latent, on average over the latent."""
    model, _, _ = models["2.1 wide"]
    half = copy.deepcopy(model).bfloat16()
    pixels = picture(96, 96)
    with torch.inference_mode():
        exact = model.encode(pixels)
        own = half.encode(pixels.bfloat16()).float()
        given = SingleFrameEncoder(half)(pixels.bfloat16()).float()
    assert (given - exact).abs().mean() <= (own - exact).abs().mean()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_gpu(models: dict[str, Pair], dtype: torch.dtype) -> None:
    """As far from the float32 latent as the model's own encode on that device; it moves with the model."""
    model, _, _ = models["2.1 wide"]
    half = copy.deepcopy(model).to(dtype)
    half.single_frame = SingleFrameEncoder(half)
    half.cuda()
    pixels = picture(96, 96)
    with torch.inference_mode():
        exact = model.encode(pixels)
        own = half.encode(pixels.to("cuda", dtype)).float().cpu()
        given = half.single_frame(pixels.to("cuda", dtype)).float().cpu()
    assert (given - exact).abs().mean() <= 1.1 * (own - exact).abs().mean()


@pytest.mark.usefixtures("encoder")
def test_other_models_are_not_taken_over() -> None:
    """An image VAE, and a Wan VAE with a layer or a number of channels that is not known."""
    with pytest.raises(UnknownArchitecture, match="is not built like a Wan VAE"):
        SingleFrameEncoder(importlib.import_module("comfy.taesd.taesd").TAESD(latent_channels=4))
    model = random_model("comfy.ldm.wan.vae", dim=8, z_dim=16)
    model.encoder.middle[1] = torch.nn.Identity()
    with pytest.raises(UnknownArchitecture, match="it has a Identity"):
        SingleFrameEncoder(model)
    model = random_model("comfy.ldm.wan.vae", dim=8, z_dim=16)
    model.encoder.conv1.weight = torch.nn.Parameter(model.encoder.conv1.weight[:, :2])
    with pytest.raises(UnknownArchitecture, match="takes 2 channels"):
        SingleFrameEncoder(model)


@pytest.mark.usefixtures("encoder")
def test_model_that_computes_otherwise_is_found_out() -> None:
    """A tree may have a class of the same parts that does something else with them."""
    model = random_model("comfy.ldm.wan.vae", dim=8, z_dim=16)
    encoder = SingleFrameEncoder(model)
    with torch.inference_mode():
        assert difference(model, encoder) is None
        model.encoder.middle[0].residual[1] = torch.nn.ReLU()
        assert "of the largest value" in str(difference(model, encoder))
        model.encode = lambda pixels: pixels
        assert "a latent of shape" in str(difference(model, encoder))
        model.encode = lambda pixels: pixels.no_such_method()
        assert "no_such_method" in str(difference(model, encoder))


def test_only_the_weights_that_are_needed_stay_in_memory(encoder: LatentEncoder) -> None:
    """Those of the single-frame encoder; of another VAE, those of its encoder."""
    with torch.inference_mode():
        wan, kl = (encoder.vaes.get(name) for name in (VAE, "random_kl.safetensors"))
    assert wan.single_frame is not None
    kept = {name for name, parameter in wan.vae.first_stage_model.named_parameters() if parameter.numel()}
    assert kept == {f"single_frame.{name}" for name, _ in wan.single_frame.named_parameters()}
    kept = {name.split(".")[0] for name, parameter in kl.vae.first_stage_model.named_parameters() if parameter.numel()}
    assert kept == {"encoder", "quant_conv"}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_compiled_encoder_gives_the_same(models: dict[str, Pair], strip_pixels: Callable[[int], None]) -> None:
    """In strips of several heights too, without compiling anew for each."""
    model, _, factor = models["2.1"]
    strip_pixels(300)
    for rows, columns in ((6, 3), (9, 2)):
        assert_same((model, SingleFrameEncoder(model, compiled=True), factor), picture(rows * factor, columns * factor))


def test_several_frames_are_left_to_the_models_own_encode(encoder: LatentEncoder) -> None:
    """They give the latent of a video, as ComfyUI's own nodes do; a single image after them is encoded as before."""
    frames = torch.rand(5, 24, 16, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        vae = encoder.vaes.get(VAE)
        expected = encoder.runtime.encode(encoder.runtime.load_vae(VAE), frames)
        before = vae.encode(encoder.runtime, frames[:1], "fail")
        video = vae.encode(encoder.runtime, frames, "fail")
        after = vae.encode(encoder.runtime, frames[:1], "fail")
    assert expected.shape == (1, 16, 2, 3, 2)
    assert torch.equal(video.samples, expected)
    assert (before.encoder, video.encoder, after.encoder) == ("single-frame", "stock", "single-frame")
    assert torch.equal(before.samples, after.samples)
