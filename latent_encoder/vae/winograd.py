"""A 3 x 3 convolution in half the multiplications: Winograd's F(4, 3) along the width.

Four neighbouring outputs of a filter with three taps take 12 multiplications one by one, and 6 as a product of polynomials:

    y = A' [(G g) * (B' d)]

The notation is that of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016): d are the six inputs
on which the four outputs y depend, g is the filter, * multiplies element by element, and ' transposes. Over all channels and
the three rows of the kernel, those products are matrix products, and they take nearly all of the time. B' and A' are a few
additions for each number. Rows stay as they are, so images can be convolved in strips of any height.

The additions cost accuracy: in float32 the rounding error is about 1e-6 of the result's standard deviation, a few times that
of a direct convolution. In half precision, which has 2 or 3 digits, the loss would be too large.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latent_encoder.vae.matrix_products import linear, linear_plus

TILE = 4  # outputs that are computed together: the 4 of F(4, 3)

POINTS = 6  # products for one tile: TILE + 3 taps - 1

# The factors of a kernel's three taps in each product, from the paper's section on F(4x4, 3x3). Row k is the filter as a
# polynomial at the point 0, 1, -1, 2, -2 or infinity, divided so that B' and A' have whole numbers.
G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)

WORTH_IT = 64
"""The least in * out / (in + out), in channels, for which this is faster. Measured on a CPU: kernels
of 192 x 96 channels, which have 64, are worth it; those of 96 x 96, which have 48, are not."""


def is_worth_it(weight: Tensor) -> bool:
    """Return whether a kernel `[out, in, 3, 3]` is float32 and faster this way than directly on a CPU.

    The additions grow with in + out and the saved multiplications with in * out, so the ratio of these decides.
    """
    outputs, inputs, *_ = weight.shape
    return weight.dtype == torch.float32 and inputs * outputs >= WORTH_IT * (inputs + outputs)


def transformed_kernel(weight: Tensor) -> Tensor:
    """Return the kernel `[out, in, 3, 3]` as `[3, 6, out, in]`: G g of each of its rows, ready for the matrix products.

    It is computed in float64 and rounded once, to the kernel's dtype.
    """
    outputs, inputs, rows, _ = weight.shape
    kernel = weight.new_empty(rows, POINTS, outputs, inputs)
    taps = weight.permute(3, 2, 0, 1).double()
    for point, factors in enumerate(G):
        kernel[:, point] = sum(factor * tap for factor, tap in zip(factors, taps, strict=True))
    return kernel


def convolve(window: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """Return the convolution of a window `[height + 2, 4 n + 2, in]`, `[height, 4 n, out]`.

    `kernel` is a `transformed_kernel`, `bias` is `[out]`. The window has a border of one row or column on each side: zeros, or
    the neighbouring rows of the image.
    """
    height, tiles = window.shape[0] - 2, (window.shape[1] - 2) // TILE
    inputs = _transformed_input(window, tiles)
    products = []
    for point in range(POINTS):
        rows = [inputs[point, row : row + height].flatten(0, 1) for row in range(3)]
        product = linear(rows[0], kernel[0, point], bias if point == 1 else None)  # A' [0, b, 0, 0, 0, 0] = [b, b, b, b]
        product = linear_plus(rows[1], kernel[1, point], product)
        product = linear_plus(rows[2], kernel[2, point], product)
        products.append(product.view(height, tiles, -1))
    return _outputs(products)


def _transformed_input(window: Tensor, tiles: int) -> Tensor:
    """Return B' d of each tile, `[6, height, tiles, channels]`. Tile t has the inputs 4 t to 4 t + 5 of its row.

    B' = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1]]. Its rows 1 and 2, and 3 and 4, differ in the signs of the odd inputs alone and share their halves.
    """
    d = [window[:, tap : tap + TILE * tiles - 3 : TILE] for tap in range(POINTS)]
    points = window.new_empty(POINTS, window.shape[0], tiles, window.shape[2])
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


def _outputs(m: Sequence[Tensor]) -> Tensor:
    """Return A' m, `[height, 4 tiles, channels]`, of six products `[height, tiles, channels]`, some of which are overwritten.

    A' = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]].
    """
    height, tiles, channels = m[0].shape
    outputs = m[0].new_empty(height, TILE * tiles, channels)
    y = [outputs[:, place::TILE] for place in range(TILE)]
    near_sum, near_difference = torch.add(m[1], m[2]), torch.sub(m[1], m[2], out=m[1])
    far_sum, far_difference = torch.add(m[3], m[4], out=m[2]), torch.sub(m[3], m[4], out=m[3])
    torch.add(m[0], near_sum, out=y[0]).add_(far_sum)
    torch.add(near_difference, far_difference, alpha=2, out=y[1])
    torch.add(near_sum, far_sum, alpha=4, out=y[2])
    torch.add(near_difference, far_difference, alpha=8, out=y[3]).add_(m[5])
    return outputs
