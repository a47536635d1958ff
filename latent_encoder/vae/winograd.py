"""A 3 x 3 convolution in half the multiplications: Winograd's F(4, 3) along the width.

Four neighbouring outputs of a three-tap filter take 12 multiplications one by one, and 6 by way of polynomials:
y = A' [(G g) * (B' d)] in the notation of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016),
where d are the six inputs that the four outputs y see, g is the filter, and * multiplies element by element. Over all channels
and the three rows of the kernel, those products are matrix products, and they take nearly all of the time; B' and A' are a
few additions for each number. Rows stay as they are, so that pictures can be convolved in strips of any height.

The additions cost accuracy: the rounding error is a few times that of a direct convolution, some 1e-6 of the result's standard
deviation in float32. Half precision could not spare that.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 4  # outputs that are computed together

G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)

WORTH_IT = 64


def is_worth_it(weight: Tensor) -> bool:
    """Whether a float32 kernel `[out, in, 3, 3]` on a CPU is faster this way than directly.

    The additions grow with in + out, the products that are saved with in * out; where they balance was measured.
    """
    outputs, inputs, *_ = weight.shape
    return weight.dtype == torch.float32 and inputs * outputs >= WORTH_IT * (inputs + outputs)


def transformed_kernel(weight: Tensor) -> Tensor:
    """The kernel `[out, in, 3, 3]` as `[3, 6, in, out]`: for each of its rows G g, ready for the matrix products."""
    outputs, inputs, rows, _ = weight.shape
    kernel = weight.new_empty(rows, len(G), inputs, outputs)
    taps = weight.permute(3, 2, 1, 0).double()
    for point, factors in enumerate(G):
        kernel[:, point] = sum(factor * tap for factor, tap in zip(factors, taps, strict=True))
    return kernel


def convolve(window: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """The convolution of `[height + 2, 4 n + 2, in]`, zeros around the picture included: `[height, 4 n, out]`."""
    height, tiles = window.shape[0] - 2, (window.shape[1] - 2) // TILE
    points = _transformed_input(window, tiles)
    rows = [points[:, row : row + height].flatten(1, 2) for row in range(3)]
    products = torch.bmm(rows[0], kernel[0])
    products.baddbmm_(rows[1], kernel[1]).baddbmm_(rows[2], kernel[2])
    products[1] += bias  # A' [0, b, 0, 0, 0, 0] = [b, b, b, b]
    return _outputs(products.view(6, height, tiles, -1))


def _transformed_input(window: Tensor, tiles: int) -> Tensor:
    """B' d: `[6, height, tiles, channels]`."""
    d = [window[:, tap : tap + TILE * tiles - 3 : TILE] for tap in range(6)]
    points = window.new_empty(6, window.shape[0], tiles, window.shape[2])
    torch.sub(d[4], d[2], alpha=5, out=points[0]).add_(d[0], alpha=4)
    torch.sub(d[5], d[3], alpha=5, out=points[5]).add_(d[1], alpha=4)
    even, odd = torch.sub(d[4], d[2], alpha=4), torch.sub(d[3], d[1], alpha=4)
    torch.add(even, odd, out=points[1])
    torch.sub(even, odd, out=points[2])
    torch.sub(d[4], d[2], out=even)
    torch.sub(d[3], d[1], out=odd)
    torch.add(even, odd, alpha=2, out=points[3])
    torch.sub(even, odd, alpha=2, out=points[4])
    return points


def _outputs(m: Tensor) -> Tensor:
    """A' m: of `[6, height, tiles, channels]`, which is overwritten, the outputs side by side."""
    _, height, tiles, channels = m.shape
    outputs = m.new_empty(height, TILE * tiles, channels)
    y = [outputs[:, place::TILE] for place in range(TILE)]
    near_sum, near_difference = torch.add(m[1], m[2]), torch.sub(m[1], m[2], out=m[1])
    far_sum, far_difference = torch.add(m[3], m[4], out=m[2]), torch.sub(m[3], m[4], out=m[3])
    torch.add(m[0], near_sum, out=y[0]).add_(far_sum)
    torch.add(near_difference, far_difference, alpha=2, out=y[1])
    torch.add(near_sum, far_sum, alpha=4, out=y[2])
    torch.add(near_difference, far_difference, alpha=8, out=y[3]).add_(m[5])
    return outputs
