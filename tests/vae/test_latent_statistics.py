"""The mean and deviation of each latent space, against ComfyUI's own `process_in` and the VAEs of diffusers."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from config import Settings
from latent_encoder.comfy_runtime import LatentSpace
from latent_encoder.outputs.marks import HEADER_KEY
from latent_encoder.releases import is_older
from latent_encoder.vae.families import FAMILIES
from latent_encoder.vae.latent_spaces import statistics_of
from models import FileFormat, LatentStatistics, Metadata
from service import LatentEncoder
from tests.helpers import Encode, request_for

pytestmark = pytest.mark.core

LATENT_SPACES = sorted({family.latent_space for family in FAMILIES if family.latent_space is not None})

REARRANGED = {"HunyuanImage21Refiner": "0.3.75"}
"""Spaces whose `process_in` does more than scale and shift, each with the release since which it does."""

ULPS = 3
"""Most units in the last place of a float32 by which the formula may differ: it rounds three times, ComfyUI two or three."""


def random_latent(space: LatentSpace) -> torch.Tensor:
    latent = 3 * torch.randn(1, space.latent_channels, 5, 7, generator=torch.Generator().manual_seed(0))
    return latent.unsqueeze(2) if space.latent_dimensions == 3 else latent


def normalised(latent: torch.Tensor, statistics: LatentStatistics) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, -1, *([1] * (latent.ndim - 2))) for values in (statistics.mean, statistics.std))
    return (latent - mean) / std


@pytest.mark.parametrize("name", LATENT_SPACES)
def test_formula_gives_the_numbers_of_comfyui(name: str, encoder: LatentEncoder) -> None:
    """`(latent - mean) / std` is ComfyUI's `process_in` in float32, for each family that this release has."""
    space = encoder.runtime.latent_space(name)
    if space is None:
        assert is_older(encoder.runtime.version, "0.33.0")
        return
    found = statistics_of(space, space.latent_channels)
    if name in REARRANGED and not is_older(encoder.runtime.version, REARRANGED[name]):
        assert found is None
        return
    assert found is not None
    assert len(found.mean) == len(found.std) == space.latent_channels
    latent = random_latent(space)
    expected = space.process_in(latent)
    unit = ULPS * torch.finfo(torch.float32).eps
    largest = max(expected.abs().max().item(), 1.0)
    torch.testing.assert_close(normalised(latent, found), expected, rtol=unit, atol=unit * largest)


@pytest.mark.parametrize("name", LATENT_SPACES)
def test_back_again_it_is_the_latent_of_the_vae(name: str, encoder: LatentEncoder) -> None:
    """`latent * std + mean` is ComfyUI's `process_out`."""
    space: Any = encoder.runtime.latent_space(name)
    found = statistics_of(space, space.latent_channels) if space is not None else None
    if found is None:
        return
    seen = random_latent(space)
    mean, std = (torch.tensor(values).view(1, -1, *([1] * (seen.ndim - 2))) for values in (found.mean, found.std))
    torch.testing.assert_close(seen * std + mean, space.process_out(seen), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "model"),
    [("Wan21", "AutoencoderKLQwenImage"), ("Wan21", "AutoencoderKLWan"), ("Mochi", "AutoencoderKLMochi")],
)
def test_numbers_are_those_of_diffusers(name: str, model: str, encoder: LatentEncoder) -> None:
    """Means and deviations of diffusers' VAEs are the same float32 numbers; those of Qwen-Image and Wan in every digit."""
    defaults = signature(getattr(pytest.importorskip("diffusers"), model).__init__).parameters
    space: Any = encoder.runtime.latent_space(name)
    found: Any = statistics_of(space, space.latent_channels)
    for ours, theirs in ((found.mean, "latents_mean"), (found.std, "latents_std")):
        assert torch.equal(torch.tensor(ours), torch.tensor(defaults[theirs].default))
        assert name != "Wan21" or list(ours) == list(defaults[theirs].default)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("SD15", "AutoencoderKL"),
        ("HunyuanVideo", "AutoencoderKLHunyuanVideo"),
        ("HunyuanVideo15", "AutoencoderKLHunyuanVideo15"),
        ("CogVideoX", "AutoencoderKLCogVideoX"),
    ],
)
def test_deviation_is_the_inverse_of_diffusers_factor(name: str, model: str, encoder: LatentEncoder) -> None:
    """The one factor of other VAEs of diffusers is 1 / std, and the mean is 0."""
    diffusers = pytest.importorskip("diffusers")
    if (space := encoder.runtime.latent_space(name)) is None:
        assert is_older(encoder.runtime.version, "0.33.0")
        return
    found = statistics_of(space, space.latent_channels)
    assert found is not None
    assert set(found.mean) == {0.0}
    factor = signature(getattr(diffusers, model).__init__).parameters["scaling_factor"].default
    assert [1 / std for std in found.std] == pytest.approx([factor] * space.latent_channels, rel=1e-7)


class Odd:
    """A latent space whose `process_in` is a function that a test gives."""

    latent_channels = 4
    latent_dimensions = 2

    def __init__(self, process_in: Any) -> None:
        self.process_in = process_in


@pytest.mark.parametrize(
    "process_in",
    [torch.tanh, torch.abs, lambda latent: latent.flip(1), lambda latent: latent.flip(-1), lambda latent: latent * 0,
     lambda latent: torch.cat((latent, latent), 1), lambda latent: latent.mean(1, keepdim=True).expand_as(latent)],
    ids=["tanh", "abs", "channels", "columns", "zero", "doubled", "mixed"],
)  # fmt: skip
def test_other_than_scale_and_shift_has_none(process_in: Any) -> None:
    """A latent space that is not scaled and shifted by channel has no statistics."""
    space: Any = Odd(process_in)
    assert statistics_of(space, 4) is None


def test_other_count_of_channels_has_none(encoder: LatentEncoder) -> None:
    """A latent with another count of channels than the class states has no statistics."""
    space = encoder.runtime.latent_space("Wan21")
    assert space is not None
    assert statistics_of(space, 32) is None


@pytest.mark.parametrize("latent_format", ["pt", "safetensors", "comfy"])
def test_metadata_and_headers_have_them(latent_format: FileFormat, encode: Encode) -> None:
    """The response, the metadata's file and the header have the same numbers, one for each channel of the latent."""
    response = encode("photo.jpg", latent_format=latent_format)
    found = response.metadata.latent_statistics
    assert len(found.mean) == response.latent_shape[1]
    stored = Metadata.model_validate_json(Path(f"{response.latent_file_path}.json").read_bytes())
    assert stored.latent_statistics == found
    if latent_format != "pt":
        with safe_open(response.latent_file_path, framework="pt") as file:
            header = json.loads(file.metadata()[HEADER_KEY])
        assert LatentStatistics.model_validate(header["latent_statistics"]) == found


def test_response_of_an_older_version_is_repeated_without_them(
    encoder: LatentEncoder, settings: Settings, tmp_path: Path
) -> None:
    """Metadata without the field still give their stored response, with null in its place: it is not in the fingerprint."""
    request = request_for(settings, tmp_path, "photo.jpg", {})
    written = encoder.encode(request)
    path = Path(f"{written.latent_file_path}.json")
    fields = json.loads(path.read_bytes())
    del fields["latent_statistics"]
    path.write_text(json.dumps(fields), encoding="utf-8")
    stored = encoder.stored_response(request)
    assert stored is not None
    assert stored.metadata == written.metadata.model_copy(update={"latent_statistics": None})
