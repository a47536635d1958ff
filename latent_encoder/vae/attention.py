"""Attention with one head, for a block of queries at a time.

On a CPU it is three steps: the scores of a block, their softmax, and the mean of the values. The two matrix products take the
quickest library, and half precision (see `vae/matrix_products.py`); torch's own fused attention does neither. Measured with
9216 pixels of 384 channels, one thread of an AMD EPYC (Zen 5): 0.61 and 1.23 s in float32, 0.32 and 1.24 s in bfloat16.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from latent_encoder.vae.matrix_products import linear

MOST_QUERIES = 256
"""Queries of a block: the measured optimum. Fewer make the products slow, more leave the processor's cache."""

MOST_SCORES = 16 * 1024**2
"""Scores of a block, 64 MB in float32. At 16 megapixels, with 262144 keys, a block has 64 queries."""


def block_size(pixels: Tensor) -> int:
    """Return the count of queries in a block for pixels `[count, channels]`: all of them if the device is no CPU."""
    count = pixels.shape[0]
    return count if pixels.device.type != "cpu" else max(1, min(MOST_QUERIES, MOST_SCORES // count))


def empty_like(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return memory for keys and values of pixels `[count, channels]`, laid out as `attended` reads them.

    torch's fused attention on a GPU needs consecutive channels; without them, it would make the matrix of all scores.
    """
    count, channels = pixels.shape
    if pixels.device.type != "cpu":
        return pixels.new_empty(count, channels), pixels.new_empty(count, channels)
    return pixels.new_empty(count, channels), pixels.new_empty(channels, count).t()


def attended(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return softmax(queries keys' / sqrt(channels)) values (Vaswani et al., "Attention Is All You Need", 2017).

    `queries` are `[block, channels]`, `keys` and `values` `[count, channels]`, in float32 or half precision.
    """
    if queries.device.type != "cpu":
        return functional.scaled_dot_product_attention(queries[None, None], keys[None, None], values[None, None])[0, 0]
    scores = linear(queries / math.sqrt(queries.shape[1]), keys)
    return linear(torch.softmax(scores, dim=-1, out=scores), values.t())
