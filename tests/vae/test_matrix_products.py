"""Matrix products by oneDNN against those in float64."""

from __future__ import annotations

import pytest
import torch

from latent_encoder.vae import matrix_products
from latent_encoder.vae.matrix_products import linear, linear_plus


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("count", [1, 7, 300])
def test_products_are_right_with_and_without_onednn(count: int, onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both give the product, with a bias or another summand, for rows in one piece or a part of larger ones."""
    if onednn:
        assert matrix_products.ONEDNN, "torch lost the operation; the encoder is slower on AMD's processors"
    monkeypatch.setattr(matrix_products, "ONEDNN", onednn)
    torch.manual_seed(0)
    rows, weight, bias = torch.randn(count, 70)[:, 5:69], torch.randn(32, 64), torch.randn(32)
    product = rows.double() @ weight.double().t()
    torch.testing.assert_close(linear(rows, weight), product.float())
    torch.testing.assert_close(linear(rows, weight, bias), (product + bias).float())
    summand = torch.randn(count, 32)
    expected = (product + summand).float()
    torch.testing.assert_close(linear_plus(rows, weight, summand), expected)
