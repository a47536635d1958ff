"""The single-frame encoder against ComfyUI's own `encode` of the models that it is made from."""

from __future__ import annotations

import copy
import importlib
import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_encoder.vae import attention, row_strips
from latent_encoder.vae.encoders import difference
from latent_encoder.vae.single_frame import SingleFrameEncoder, UnknownArchitecture
from latent_encoder.vae.single_frame_layers import Attention
from service import LatentEncoder
from tests.helpers import VAE
from tests.tensor_memory import PeakOfTensors

pytestmark = pytest.mark.core

ATOL = 2e-5  # five times the largest difference that was measured at full size, 4e-6; a wrong layer is off by 1 or so

SHAPE = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True]}

Pair = tuple[Any, SingleFrameEncoder, int]
"""A model, its single-frame encoder, and the pixels along one side of its cells."""


def random_model(module: str, **shape: Any) -> Any:
    """Return a WanVAE of ComfyUI with random weights of a fixed seed, under which activations neither vanish nor explode."""
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
    """Small models of both generations, one with enough channels for Winograd's convolution, and one that takes RGBA."""
    assert encoder.runtime.version  # ComfyUI can be imported once it is loaded
    made = {
        "2.1": (random_model("comfy.ldm.wan.vae", dim=8, z_dim=16), 8),
        "2.1 wide": (random_model("comfy.ldm.wan.vae", dim=64, z_dim=16), 8),
        "2.2": (random_model("comfy.ldm.wan.vae2_2", dim=16, z_dim=48), 16),
    }
    made["2.1 RGBA"] = (with_alpha(random_model("comfy.ldm.wan.vae", dim=8, z_dim=16)), 8)
    return {name: (model, SingleFrameEncoder(model), factor) for name, (model, factor) in made.items()}


def with_alpha(model: Any) -> Any:
    """Give the model a first convolution of four channels, as Qwen-Image-Layered's VAE has it."""
    first = model.encoder.conv1
    model.encoder.conv1 = type(first)(4, first.out_channels, 3, padding=1).requires_grad_(False)
    weights = torch.cat((first.weight, first.weight[:, :1].flip(-1)), dim=1)
    model.encoder.conv1.load_state_dict({"weight": weights, "bias": first.bias})
    return model


@pytest.fixture
def strip_pixels(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that sets the count of pixels in a strip."""
    return lambda pixels: monkeypatch.setitem(row_strips.STRIP_PIXELS, "cpu", pixels)


def image_of(height: int, width: int, colours: int = 3) -> torch.Tensor:
    """Return noise in [-1, 1], `[1, colours, 1, height, width]`, the same for the same size."""
    return torch.rand(1, colours, 1, height, width, generator=torch.Generator().manual_seed(height * 1000 + width)) * 2 - 1


def assert_same(pair: Pair, pixels: torch.Tensor) -> None:
    """Assert that model and encoder give latents of the same shape that differ by `ATOL` at most."""
    model, encoder, _ = pair
    with torch.inference_mode():
        expected, given = model.encode(pixels), encoder(pixels)
    assert given.shape == expected.shape
    torch.testing.assert_close(given, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["2.1", "2.1 wide", "2.2"])
@settings(max_examples=15)
@given(rows=st.integers(1, 12), columns=st.integers(1, 6), pixels=st.integers(200, 3000))
def test_latent_of_any_size_in_any_strips(name: str, models: dict[str, Pair], rows: int, columns: int, pixels: int) -> None:
    """The latents are equal down to one cell, and in strips down to one row."""
    factor = models[name][2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(row_strips.STRIP_PIXELS, "cpu", pixels)
        assert_same(models[name], image_of(rows * factor, columns * factor))


def test_alpha_is_a_fourth_channel(models: dict[str, Pair], strip_pixels: Callable[[int], None]) -> None:
    """Alpha reaches the latent through the strips, and the check of a new encoder includes it."""
    strip_pixels(300)
    model, encoder, _ = models["2.1 RGBA"]
    pixels = image_of(40, 24, colours=4)
    assert_same(models["2.1 RGBA"], pixels)
    with torch.inference_mode():
        assert difference(model, encoder) is None
        assert not torch.equal(encoder(pixels), encoder(pixels * torch.tensor([1, 1, 1, -1]).view(1, 4, 1, 1, 1)))


def test_options_of_a_models_encode_are_taken(models: dict[str, Pair]) -> None:
    """The encoder ignores the `device` that newer releases give to some models."""
    _, encoder, _ = models["2.1"]
    with torch.inference_mode():
        assert torch.equal(encoder(image_of(16, 16), device=torch.device("cpu")), encoder(image_of(16, 16)))


def test_pixels_are_free_before_the_attention(models: dict[str, Pair]) -> None:
    """With `free` the encoder leaves its pixels empty, and gives the same latent to the last bit."""
    _, encoder, _ = models["2.1"]
    with torch.inference_mode():
        pixels = image_of(32, 48)
        assert torch.equal(encoder(pixels.clone(), free=True), encoder(pixels))
        encoder(pixels, free=True)
    assert pixels.numel() == 0


def test_memory_of_an_encode_is_that_of_its_attention() -> None:
    """With many rows, the tensors alive at once are the attention's input, keys, values and a block's scores, and strips."""
    rows, channels = 256, 32
    block = SimpleNamespace(
        norm=SimpleNamespace(gamma=torch.ones(channels)),
        to_qkv=torch.nn.Conv2d(channels, 3 * channels, 1),
        proj=torch.nn.Conv2d(channels, channels, 1),
    )
    strip = torch.rand(8, 32, channels)
    stream = row_strips.Stream(((strip, start + 8 == rows) for start in range(0, rows, 8)), rows)
    image = rows * strip[0].nbytes
    with torch.inference_mode():
        layer = Attention(block)
        size = attention.block_size(torch.empty(rows * 32, channels))
        with PeakOfTensors() as memory:
            assert sum(piece.shape[0] for piece, _ in layer(stream)) == rows
    assert memory.peak <= 3 * image + size * rows * 32 * 4 + 2**20


def test_strip_borders_at_every_offset(models: dict[str, Pair], strip_pixels: Callable[[int], None]) -> None:
    """The latent of an image of 48 rows is the same in strips of 1 to 25 rows."""
    for rows in range(1, 26):
        strip_pixels(rows * 16)
        assert_same(models["2.1"], image_of(48, 16))


@pytest.mark.parametrize(("height", "width"), [(2048, 8), (8, 2048), (8, 8)])
def test_very_long_images(models: dict[str, Pair], height: int, width: int) -> None:
    """A column and a row of 256 cells, and a single cell, are encoded as the model encodes them."""
    assert_same(models["2.1"], image_of(height, width))


def test_image_wider_than_a_strip(models: dict[str, Pair], strip_pixels: Callable[[int], None]) -> None:
    """Each strip then has one row, of pixels or of Wan 2.2's patches, and the latent is the same."""
    strip_pixels(1)
    for name in ("2.1", "2.2"):
        pixels = image_of(32, 64)
        patch = models[name][1].patch
        assert [rows.shape[0] for rows, _ in row_strips.strips(pixels[0, :, 0], patch)] == [1] * (32 // patch)
        assert_same(models[name], pixels)


def test_image_wider_than_a_strip_of_the_default_size(models: dict[str, Pair]) -> None:
    """An image with more pixels in a row than a strip has is encoded one row at a time, as the model encodes it."""
    pixels = image_of(8, row_strips.STRIP_PIXELS["cpu"] + 8)
    assert [rows.shape[0] for rows, _ in row_strips.strips(pixels[0, :, 0], 1)] == [1] * 8
    assert_same(models["2.1"], pixels)


def test_bfloat16_is_no_further_from_float32_than_the_models_own(models: dict[str, Pair]) -> None:
    """The mean distance to the model's float32 latent is at most that of the model's own bfloat16 latent."""
    model, _, _ = models["2.1 wide"]
    half = copy.deepcopy(model).bfloat16()
    pixels = image_of(96, 96)
    with torch.inference_mode():
        exact = model.encode(pixels)
        own = half.encode(pixels.bfloat16()).float()
        given = SingleFrameEncoder(half)(pixels.bfloat16()).float()
    assert (given - exact).abs().mean() <= (own - exact).abs().mean()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_gpu(models: dict[str, Pair], dtype: torch.dtype) -> None:
    """The encoder moves to the GPU with the model, and is at most 1.1 times as far from float32 as the model's own encode."""
    model, _, _ = models["2.1 wide"]
    half = copy.deepcopy(model).to(dtype)
    half.single_frame = SingleFrameEncoder(half, target=torch.device("cuda"))
    half.cuda()
    pixels = image_of(96, 96)
    with torch.inference_mode():
        exact = model.encode(pixels)
        own = half.encode(pixels.to("cuda", dtype)).float().cpu()
        given = half.single_frame(pixels.to("cuda", dtype)).float().cpu()
    assert (given - exact).abs().mean() <= 1.1 * (own - exact).abs().mean()


@pytest.mark.usefixtures("encoder")
def test_other_models_are_not_taken_over() -> None:
    """An image VAE, and a Wan VAE with an unknown layer or number of channels, are refused with the reason."""
    with pytest.raises(UnknownArchitecture, match="is not built like a Wan VAE"):
        SingleFrameEncoder(importlib.import_module("comfy.taesd.taesd").TAESD(latent_channels=4))
    model = random_model("comfy.ldm.wan.vae", dim=8, z_dim=16)
    model.encoder.middle[1] = torch.nn.Identity()
    with pytest.raises(UnknownArchitecture, match="it has an unknown layer, Identity"):
        SingleFrameEncoder(model)
    model = random_model("comfy.ldm.wan.vae", dim=8, z_dim=16)
    model.encoder.conv1.weight = torch.nn.Parameter(model.encoder.conv1.weight[:, :2])
    with pytest.raises(UnknownArchitecture, match="takes 2 channels"):
        SingleFrameEncoder(model)


@pytest.mark.usefixtures("encoder")
def test_model_that_computes_otherwise_is_found_out() -> None:
    """A model with the known parts that computes something else with them fails the check, with the reason."""
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
    """A Wan VAE keeps the weights of its single-frame encoder; another VAE keeps those of its encoder."""
    with torch.inference_mode():
        wan, kl = (encoder.vaes.get(name) for name in (VAE, "random_kl.safetensors"))
    assert wan.single_frame is not None
    kept = {name for name, parameter in wan.vae.first_stage_model.named_parameters() if parameter.numel()}
    assert kept == {f"single_frame.{name}" for name, _ in wan.single_frame.named_parameters()}
    kept = {name.split(".")[0] for name, parameter in kl.vae.first_stage_model.named_parameters() if parameter.numel()}
    assert kept == {"encoder", "quant_conv"}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_compiled_encoder_gives_the_same(models: dict[str, Pair], strip_pixels: Callable[[int], None]) -> None:
    """A compiled encoder gives the model's latent for images of different sizes, in strips of different heights."""
    model, _, factor = models["2.1"]
    strip_pixels(300)
    for rows, columns in ((6, 3), (9, 2)):
        assert_same((model, SingleFrameEncoder(model, compiled=True), factor), image_of(rows * factor, columns * factor))


def test_several_frames_are_left_to_the_models_own_encode(encoder: LatentEncoder) -> None:
    """Several frames give the latent of a video, as ComfyUI's nodes do; a single image after them is encoded as before."""
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
