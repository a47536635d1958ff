"""The encoder in strips against ComfyUI's own `encode` of the SD-style models that it is made from."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_encoder.vae import image_strips_layers
from latent_encoder.vae.encoders import difference, fast_encoder
from latent_encoder.vae.group_norm import GroupNorm, Moments
from latent_encoder.vae.image_strips import ImageStripsEncoder
from latent_encoder.vae.single_frame import UnknownArchitecture
from service import LatentEncoder

pytestmark = pytest.mark.core

ATOL = 2e-5  # three times the largest difference that was measured at full size, 7e-6; a wrong layer is off by 1 or so

SHAPE: dict[str, Any] = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}

CPU = torch.device("cpu")

Pair = tuple[Any, ImageStripsEncoder]
"""A model and its encoder in strips."""


def with_random_weights(model: Any) -> Any:
    """Give a model random weights of a fixed seed, under which activations neither vanish nor explode."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.eval().requires_grad_(False).named_parameters():
        random = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = random * parameter.shape[1:].numel() ** -0.5
        else:
            parameter.data = 0.1 * random + (1 if "norm" in name and name.endswith("weight") else 0)
    return model


def kl(**shape: Any) -> Any:
    """Return an AutoencoderKL of ComfyUI, as for SD."""
    module = importlib.import_module("comfy.ldm.models.autoencoder")
    config = {**SHAPE, **shape}
    return with_random_weights(module.AutoencoderKL(ddconfig=config, embed_dim=config["z_channels"]))


def engine(**shape: Any) -> Any:
    """Return an AutoencodingEngine of ComfyUI, as for SD3 and FLUX.1: it has no `quant_conv`."""
    module, model = (f"comfy.ldm.m{name}" for name in ("odels.autoencoder", "odules.diffusionmodules.model"))
    config = {**SHAPE, "z_channels": 16, **shape}
    return with_random_weights(
        importlib.import_module(module).AutoencodingEngine(
            regularizer_config={"target": f"{module}.DiagonalGaussianRegularizer"},
            encoder_config={"target": f"{model}.Encoder", "params": config},
            decoder_config={"target": f"{model}.Decoder", "params": config},
        )
    )


@pytest.fixture(scope="module")
def pairs(encoder: LatentEncoder) -> dict[str, Pair]:
    """Small models of each class, one with enough channels for Winograd's convolution at most levels, and FLUX.2's."""
    assert encoder.runtime.version  # ComfyUI can be imported once it is loaded
    models = {
        "KL": kl(),
        "KL wide": kl(ch=64),
        "engine": engine(),
        "three levels": kl(ch_mult=[1, 2, 4], num_res_blocks=1),
    }
    if hasattr(models["KL"], "bn"):
        models["FLUX.2"] = kl(z_channels=32, batch_norm_latent=True)
    return {name: (model, ImageStripsEncoder(model)) for name, model in models.items()}


def image_of(height: int, width: int, count: int = 1) -> torch.Tensor:
    """Return noise in [-1, 1], `[count, 3, height, width]`, the same for the same size."""
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(height * 1000 + width)) * 2 - 1


def assert_same(pair: Pair, pixels: torch.Tensor) -> None:
    """Assert that model and encoder give latents of the same shape that differ by `ATOL` at most."""
    model, encoder = pair
    with torch.inference_mode():
        expected, given = model.encode(pixels), encoder(pixels)
    assert given.shape == expected.shape
    torch.testing.assert_close(given, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["KL", "KL wide", "engine", "three levels"])
@settings(max_examples=10)
@given(height=st.integers(8, 90), width=st.integers(8, 60), values=st.integers(1, 60_000))
def test_latent_of_any_size_in_any_strips(name: str, pairs: dict[str, Pair], height: int, width: int, values: int) -> None:
    """The latents are equal for odd sides too, down to one cell and in strips down to one row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_strips_layers, "STRIP_VALUES", values)
        assert_same(pairs[name], image_of(height, width))


@pytest.mark.parametrize("values", [1, 64 * 16, 5 * 64 * 16, 10**9])
@pytest.mark.parametrize(("height", "width"), [(512, 8), (8, 512), (8, 8), (40, 16)])
def test_long_images_in_strips(
    height: int, width: int, values: int, pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column and a row of cells, and a single cell, are encoded as the model encodes them, in one strip or many."""
    monkeypatch.setattr(image_strips_layers, "STRIP_VALUES", values)
    for name in ("KL", "KL wide"):
        assert_same(pairs[name], image_of(height, width))


def test_normalisation_of_flux2s_latent_is_the_models_own(pairs: dict[str, Pair]) -> None:
    """A model that normalises its latent gives the same latent of 2 x 2 patches."""
    if "FLUX.2" not in pairs:
        pytest.skip("this release has no FLUX.2")
    model, encoder = pairs["FLUX.2"]
    model.bn.running_mean.fill_(0.5)
    model.bn.running_var.fill_(4.0)
    assert_same((model, encoder), image_of(48, 32))
    assert encoder(image_of(48, 32)).shape == (1, 128, 3, 2)


def test_several_images_and_options(pairs: dict[str, Pair]) -> None:
    """Each image of a batch gets its own latent, and the `device` of newer releases is ignored."""
    model, encoder = pairs["KL"]
    pixels = image_of(24, 16, count=3)
    assert_same((model, encoder), pixels)
    with torch.inference_mode():
        assert torch.equal(encoder(pixels, device=CPU)[1:2], encoder(pixels[1:2]))


def test_image_is_not_changed(pairs: dict[str, Pair]) -> None:
    """Results are written in place, but never to the image."""
    pixels = image_of(24, 16)
    with torch.inference_mode():
        pairs["KL"][1](pixels)
    assert torch.equal(pixels, image_of(24, 16))


@pytest.mark.usefixtures("encoder")
def test_moments_are_exact_far_from_zero() -> None:
    """Mean and variance of values around 1000 are those of float64, whatever the strips."""
    pixels = torch.randn(50, 7, 8, generator=torch.Generator().manual_seed(0)) + 1000
    moments = Moments()
    for rows in torch.split(pixels, [1, 20, 3, 26]):
        moments.add(rows)
    mean, variance = moments.of_groups(2)
    groups = pixels.double().view(-1, 2, 4).transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean[:, 0], groups.mean(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(variance[:, 0], groups.var(1, correction=0), rtol=1e-5, atol=0)


def test_norm_is_torchs() -> None:
    """The normalisation is that of torch's GroupNorm."""
    norm = torch.nn.GroupNorm(4, 16, eps=1e-6)
    norm.weight.data.uniform_(0.5, 1.5)
    norm.bias.data.normal_()
    pixels, moments = torch.randn(9, 5, 16) * 3 + 2, Moments()
    moments.add(pixels)
    with torch.inference_mode():
        expected = norm(pixels.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
        torch.testing.assert_close(GroupNorm(norm).of(moments)(pixels), expected, atol=5e-6, rtol=0)


def changed(model: Any, path: str, part: Any) -> Any:
    """Return the model with another part at a path of names, such as `mid.attn_1`, in its encoder."""
    *parents, name = path.split(".")
    owner = model.encoder
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, name, part)
    return model


@pytest.mark.usefixtures("encoder")
def test_other_models_are_not_taken_over() -> None:
    """Models with another class, layer, shape, dtype or device are refused with the reason."""
    conv2d = type(kl().encoder.conv_in)
    refused = {
        "NoneType is not built like an SD-style encoder": importlib.import_module("comfy.taesd.taesd").TAESD(
            latent_channels=4
        ),
        "has attention before its middle": kl(attn_resolutions=[256]),
        "unknown layer, Identity in place of AttnBlock": changed(kl(), "mid.attn_1", torch.nn.Identity()),
        "unknown layer, Identity in place of GroupNorm": changed(kl(), "norm_out", torch.nn.Identity()),
        "unknown layer, VideoConv3d|unknown layer, CarriedConv3d": kl(conv3d=True),
        "unknown convolution": changed(kl(), "conv_in", conv2d(3, 32, 3, padding=1, padding_mode="reflect")),
        "its weights are torch.bfloat16 on cpu": kl().bfloat16(),
    }
    for reason, model in refused.items():
        with pytest.raises(UnknownArchitecture, match=reason):
            ImageStripsEncoder(model)
    with pytest.raises(UnknownArchitecture, match="on a CPU only"):
        fast_encoder(kl(), torch.device("cuda"))
    assert isinstance(fast_encoder(kl(), CPU), ImageStripsEncoder)


@pytest.mark.usefixtures("encoder")
def test_model_that_computes_otherwise_is_found_out() -> None:
    """A model with the known parts that computes something else with them fails the check, with the reason."""
    model = kl()
    encoder = ImageStripsEncoder(model)
    with torch.inference_mode():
        assert difference(model, encoder) is None
        model.encoder.mid.block_1.swish = torch.nn.ReLU()
        assert "of the largest value" in str(difference(model, encoder))
        model.encode = lambda pixels: pixels
        assert "a latent of shape" in str(difference(model, encoder))


def test_weights_of_a_copy_are_its_own(pairs: dict[str, Pair]) -> None:
    """The encoder keeps its weights after the model's encoder has lost its own, and the model keeps its class."""
    model = copy.deepcopy(pairs["KL"][0])
    encoder = ImageStripsEncoder(model)
    with torch.inference_mode():
        expected = model.encode(image_of(24, 16))
        for parameter in model.encoder.parameters():
            parameter.data = parameter.new_empty(0)
        torch.testing.assert_close(encoder(image_of(24, 16)), expected, atol=ATOL, rtol=0)
