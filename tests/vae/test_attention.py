"""Attention in blocks against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latent_encoder.vae import attention

CHANNELS = 384


def computed(pixels: Tensor) -> Tensor:
    """Return the attention of pixels to themselves, with other projections for queries, keys and values, in blocks."""
    size = attention.block_size(pixels)
    keys, values = attention.empty_like(pixels)
    keys.copy_(pixels.flip(1))
    values.copy_(pixels.roll(1, 0))
    return torch.cat([attention.attended(block, keys, values) for block in torch.split(pixels, size)])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("count", [1, 256, 700])
def test_result_is_that_of_the_formula(count: int, dtype: torch.dtype, tolerance: float) -> None:
    """A single pixel, one whole block, and blocks of which the last is smaller give the same as all at once."""
    pixels = torch.randn(count, CHANNELS, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = pixels.double()
    scores = wide @ wide.flip(1).t() / CHANNELS**0.5
    expected = torch.softmax(scores, dim=-1) @ wide.roll(1, 0)
    given = computed(pixels)
    assert given.dtype == dtype
    assert (given - expected).std(correction=0) <= tolerance * expected.std(correction=0)


def test_scores_do_not_fill_the_memory() -> None:
    """A block of a 16-megapixel image has at most 64 MB of scores in float32."""
    pixels = torch.empty(262144, 1)
    assert attention.block_size(pixels) * len(pixels) * 4 <= 64 * 1024**2
