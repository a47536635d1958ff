"""Winograd's convolution against torch's direct one in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import conv2d

from latent_encoder.vae import winograd


@given(
    height=st.integers(1, 9),
    tiles=st.integers(1, 6),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_result_is_that_of_the_direct_convolution(height: int, tiles: int, inputs: int, outputs: int, seed: int) -> None:
    """Both agree for any height, and for any width that is a multiple of the tile, within 1e-5 of the largest value."""
    generator = torch.Generator().manual_seed(seed)
    window = torch.randn(height + 2, winograd.TILE * tiles + 2, inputs, generator=generator)
    weight, bias = torch.randn(outputs, inputs, 3, 3, generator=generator), torch.randn(outputs, generator=generator)
    expected = conv2d(window.permute(2, 0, 1).double(), weight.double(), bias.double()).permute(1, 2, 0)
    given = winograd.convolve(window, winograd.transformed_kernel(weight), bias)
    assert (given - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_many_channels_add_up_to_no_large_error() -> None:
    """With the 384 channels of the real VAE, the error is at most 2e-5 of the outputs' standard deviation, on average 2e-6."""
    generator = torch.Generator().manual_seed(0)
    window = torch.randn(10, 34, 384, generator=generator)
    weight, bias = torch.randn(384, 384, 3, 3, generator=generator), torch.randn(384, generator=generator)
    expected = conv2d(window.permute(2, 0, 1).double(), weight.double(), bias.double()).permute(1, 2, 0)
    given = winograd.convolve(window, winograd.transformed_kernel(weight), bias)
    assert (given - expected).abs().max() <= 2e-5 * expected.std()
    assert (given - expected).abs().mean() <= 2e-6 * expected.std()


@pytest.mark.parametrize(
    ("outputs", "inputs", "dtype", "expected"),
    [
        (384, 384, torch.float32, True),
        (192, 96, torch.float32, True),
        (96, 96, torch.float32, False),
        (384, 384, torch.bfloat16, False),
        (32, 384, torch.float32, False),
    ],
)
def test_it_is_used_where_it_pays(outputs: int, inputs: int, dtype: torch.dtype, *, expected: bool) -> None:
    """It takes many channels on both sides, and float32."""
    assert winograd.is_worth_it(torch.empty(outputs, inputs, 3, 3, dtype=dtype)) is expected
