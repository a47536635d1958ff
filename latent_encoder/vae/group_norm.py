"""Group normalisation of an image that is computed in strips: its mean and variance are gathered while the strips are made.

Wu and He, "Group Normalization" (2018): the channels are divided into groups, and all values of a group, of all pixels, are
brought to mean 0 and variance 1. So no pixel can be normalised before the whole image is known. Of each strip, only the mean
and the sum of squared deviations of every channel are kept, in float64. They are merged by the formula of Chan, Golub and
LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances" (1979), which never subtracts two large
sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Moments:
    """Count, mean and sum of squared deviations of each channel of the strips that were added."""

    def __init__(self) -> None:
        self._count = 0
        self._mean: Tensor | float = 0.0
        self._deviations: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        """Take in a strip, float32 `[height, width, channels]`.

        torch's `var_mean` over a dimension that is not the last takes 40 times as long as this.
        """
        pixels = rows.flatten(0, 1)
        mean = pixels.mean(0)
        deviations = (pixels - mean).square_().sum(0).double()
        count = self._count + pixels.shape[0]
        apart = mean.double() - self._mean
        self._deviations = self._deviations + deviations + apart.square() * (self._count * pixels.shape[0] / count)
        self._mean = self._mean + apart * (pixels.shape[0] / count)
        self._count = count

    def of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each group of consecutive channels, float64 `[groups, 1]`."""
        means = torch.as_tensor(self._mean).view(groups, -1)
        variances = torch.as_tensor(self._deviations).view(groups, -1) / self._count
        mean = means.mean(1, keepdim=True)
        return mean, (variances + (means - mean).square()).mean(1, keepdim=True)


class GroupNorm(nn.Module):
    """The weights of a ComfyUI `GroupNorm`."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.groups, self.epsilon = norm.num_groups, norm.eps
        self.weight, self.bias = nn.Parameter(norm.weight), nn.Parameter(norm.bias)

    def of(self, moments: Moments) -> AppliedNorm:
        """Return the normalisation of an image with these moments."""
        mean, variance = moments.of_groups(self.groups)
        weight = self.weight.double().view(self.groups, -1)
        scale = weight * (variance + self.epsilon).rsqrt()
        shift = self.bias.double().view(self.groups, -1) - mean * scale
        return AppliedNorm(scale.flatten().float(), shift.flatten().float())


class AppliedNorm:
    """The normalisation of one image: each channel times its `scale` plus its `shift`, both float32 `[channels]`."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        self.scale, self.shift = scale, shift

    def __call__(self, rows: Tensor) -> Tensor:
        """Return `rows` `[…, channels]` normalised."""
        return torch.addcmul(self.shift, rows, self.scale)

    def silu(self, rows: Tensor, out: Tensor) -> None:
        """Write SiLU of the normalised rows to `out`. SiLU is x * sigmoid(x)."""
        functional.silu(torch.addcmul(self.shift, rows, self.scale, out=out), inplace=True)
