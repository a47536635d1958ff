"""Matrix products by the quickest library at hand.

torch multiplies float32 matrices on a CPU by Intel's MKL. On AMD's processors MKL leaves AVX-512 unused; oneDNN, which torch
contains for its convolutions, uses it. Measured on an AMD EPYC (Zen 5), one thread, 1024 x 384 x 384: 250 and 110 GFLOP/s. On
Intel's both are alike.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `rows` `[count, in]` times the transpose of `weight` `[out, in]`, plus `bias` `[out]`, as `[count, out]`."""
    if not _by_onednn(rows):
        return functional.linear(rows, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


def linear_plus(rows: Tensor, weight: Tensor, summand: Tensor) -> Tensor:
    """Return `linear(rows, weight)` plus `summand` `[count, out]`, which may be overwritten."""
    if not _by_onednn(rows):
        return summand.addmm_(rows, weight.t())
    total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(rows, summand, weight, None, "add")
    return total


def _by_onednn(rows: Tensor) -> bool:
    return rows.dtype == torch.float32 and rows.device.type == "cpu" and ONEDNN


ONEDNN: bool = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""torch was built with oneDNN, and has the operation that `torch.compile` uses for products with a weight."""
