"""The preview: a latent as an image, against ComfyUI's own previewer, and beside the scaled image."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from latent_encoder.geometry import Box
from latent_encoder.outputs.preview import comfyui_colours, latent_image, preview_image, stretched
from latent_encoder.releases import is_older
from latent_encoder.vae.families import FAMILIES
from service import LatentEncoder
from tests.kafka_tools import Events

LATENT_SPACES = sorted({family.latent_space for family in FAMILIES if family.latent_space is not None})

# Without colours in every tested release that has them.
COLOURLESS = {"CogVideoX", "CogVideoX1_5", "HunyuanImage21Refiner", "SeedVR2"}

# In releases since 0.33 only.
NEW = {"CogVideoX", "CogVideoX1_5", "LTXAV", "MiniMaxH3Video", "SeedVR2"}


def random_latent(channels: int, height: int = 5, width: int = 7) -> Tensor:
    return 2 * torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))


def comfyui_preview(latent: Tensor, known: Any) -> Any:
    """Return the pixels that a sampler of stock ComfyUI shows for a latent of its model."""
    previewer = importlib.import_module("latent_preview").Latent2RGBPreviewer(
        known.latent_rgb_factors, known.latent_rgb_factors_bias, getattr(known, "latent_rgb_factors_reshape", None)
    )
    of_vae = latent.unsqueeze(2) if known.latent_dimensions == 3 else latent
    return np.asarray(previewer.decode_latent_to_preview(known.process_in(of_vae)))


@pytest.mark.parametrize("latent_space", LATENT_SPACES)
def test_the_image_is_comfyuis_own_preview(encoder: LatentEncoder, latent_space: str) -> None:
    known: Any = encoder.runtime.latent_space(latent_space)
    if known is None:
        assert latent_space in NEW
        assert is_older(encoder.runtime.version, "0.33.0")
        return
    if latent_space in COLOURLESS:
        assert known.latent_rgb_factors is None
        return
    latent = random_latent(known.latent_channels)
    colours = comfyui_colours(latent, known)
    assert colours.dtype == torch.float32
    expected = comfyui_preview(latent, known)
    assert np.unique(expected).size > 20, "an image of few values would prove little"
    assert np.array_equal((colours[0] * 0xFF).to(torch.uint8).numpy(), expected)
    assert torch.equal(latent_image(encoder.runtime, latent, latent_space), stretched(colours))


def test_colours_are_stretched_together() -> None:
    """A pale image fills the range from dark to light; its greys stay grey, and the order of its colours stays."""
    pale = 0.5 + 0.3 * torch.rand(1, 20, 30, 3, generator=torch.Generator().manual_seed(0))
    pale[0, 0] = pale[0, 0, :, :1]
    seen = stretched(pale)
    assert (float(seen.min()), float(seen.max())) == (0, 1)
    assert torch.equal(seen[0, 0, :, 0], seen[0, 0, :, 2])
    assert (seen.flatten()[pale.flatten().argsort()].diff() >= 0).all()


@pytest.mark.parametrize("value", [0.0, 0.2, 1.0])
def test_an_even_image_stays_as_it_is(value: float) -> None:
    """Noise of 1 % is enlarged four times at most, around the colour that it had."""
    noise = 0.01 * torch.rand(1, 20, 30, 3, generator=torch.Generator().manual_seed(0)) - 0.005
    assert torch.equal(stretched(torch.full((1, 4, 4, 3), value)), torch.full((1, 4, 4, 3), value))
    assert (stretched(value + noise) - value).abs().max() < 0.04


def test_single_cells_do_not_decide(encoder: LatentEncoder) -> None:
    """One cell with extreme values leaves the colours of the others as they are."""
    latent = random_latent(16, 30, 30)
    loud = latent.clone()
    loud[0, :, 0, 0] *= 100
    usual, seen = (latent_image(encoder.runtime, each, "Wan21") for each in (latent, loud))
    assert (usual - seen)[0].flatten(0, 1)[1:].abs().max() < 0.05


@pytest.mark.parametrize(("latent_space", "channels"), [("HunyuanImage21Refiner", 32), ("SeedVR2", 16), ("CogVideoX", 16)])
def test_a_family_without_colours_has_the_principal_components(
    encoder: LatentEncoder, latent_space: str, channels: int
) -> None:
    """Also the refiner of HunyuanImage, whose class has twice the channels that its VAE gives."""
    latent = random_latent(channels)
    expected = latent_image(encoder.runtime, latent, None)
    assert torch.equal(latent_image(encoder.runtime, latent, latent_space), expected)


def test_a_latent_format_is_a_class_of_that_module(encoder: LatentEncoder) -> None:
    """The name may come from a metadata file, and must not reach anything else in the module."""
    assert encoder.runtime.latent_space("Wan21") is not None
    for name in ("torch", "NoSuchModel", "__doc__"):
        assert encoder.runtime.latent_space(name) is None


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 16, 128])
def test_a_latent_without_known_colours_has_an_image_too(encoder: LatentEncoder, events: Events, channels: int) -> None:
    latent_shown = latent_image(encoder.runtime, random_latent(channels), None)
    assert latent_shown.shape == (1, 5, 7, 3)
    assert latent_shown.dtype == torch.float32
    assert 0 <= latent_shown.min() < 0.4
    assert 0.6 < latent_shown.max() <= 1
    assert events("the preview has no true colours") != []


def test_colours_of_another_number_of_channels_are_not_used(encoder: LatentEncoder) -> None:
    latent = random_latent(4)
    assert torch.equal(latent_image(encoder.runtime, latent, "Wan21"), latent_image(encoder.runtime, latent, None))


def test_what_differs_most_is_red(encoder: LatentEncoder) -> None:
    latent = 0.1 * random_latent(8)
    latent[0, 5, :, :3] += 10  # the left half is bright in one channel
    latent_shown = latent_image(encoder.runtime, latent, None)[0]
    assert latent_shown[:, :3, 0].min() > latent_shown[:, 3:, 0].max() + 0.2
    assert abs(float(latent_shown[:, :3, 1].mean() - latent_shown[:, 3:, 1].mean())) < 0.1


def test_a_latent_that_is_the_same_everywhere_is_grey(encoder: LatentEncoder) -> None:
    latent_shown = latent_image(encoder.runtime, torch.full((1, 6, 4, 4), 3.0), None)
    assert torch.equal(latent_shown, torch.full((1, 4, 4, 3), 0.5))


@pytest.mark.parametrize("latent_space", ["Wan21", None])
def test_what_is_not_finite_counts_as_zero(encoder: LatentEncoder, latent_space: str | None) -> None:
    broken, zero = random_latent(16), random_latent(16)
    broken[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    zero[0, 0, 0, :3] = 0
    shown = [latent_image(encoder.runtime, latent, latent_space) for latent in (broken, zero)]
    assert torch.equal(*shown)


def test_the_preview_has_what_is_covered_at_the_left_and_the_latent_at_the_right() -> None:
    scaled = torch.rand(1, 21, 19, 3, generator=torch.Generator().manual_seed(0))
    latent_shown = torch.zeros(1, 2, 2, 3)
    latent_shown[0, :, 1] = 1  # its right half is white
    image = preview_image(latent_shown, scaled, Box(1, 2, 17, 18), factor=8)
    assert image.shape == (1, 16, 32, 3)
    assert torch.equal(image[:, :, :16], scaled[:, 2:18, 1:17])
    assert image[:, :, 16:20].max() < 0.1
    assert image[:, :, 28:].min() > 0.9


def test_without_a_crop_the_whole_image_is_shown() -> None:
    assert preview_image(torch.zeros(1, 2, 3, 3), torch.ones(1, 16, 24, 3), None, factor=8).shape == (1, 16, 48, 3)


def test_an_image_alone_is_upscaled_by_the_factor() -> None:
    latent_shown = torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    image = preview_image(latent_shown, None, None, factor=8)
    assert image.shape == (1, 16, 24, 3)
    assert torch.allclose(image.mean((1, 2)), latent_shown.mean((1, 2)), atol=0.1)


def test_overshoot_of_the_scaled_image_is_clipped() -> None:
    image = preview_image(torch.zeros(1, 1, 1, 3), torch.full((1, 8, 8, 3), 1.2), None, factor=8)
    assert image.max() == 1
