"""The warning of a precision that a CPU has no instructions for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from latent_encoder.vae.precision import INSTRUCTIONS, warn_of_slow_precision

Events = Callable[[str], list[dict[str, Any]]]

EVENT = "this cpu is slow in that precision, fp32 is faster"


@pytest.mark.parametrize("has_them", [True, False])
@pytest.mark.parametrize("precision", ["auto", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_slow_precision_is_warned_of(
    device: str, precision: str, has_them: bool, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warning comes for half precision on a CPU without the instructions, and for nothing else."""
    for names, _ in INSTRUCTIONS.values():
        for name in names:
            monkeypatch.setattr(torch.cpu, name, lambda: has_them)
    warn_of_slow_precision(precision, device)
    slow = device == "cpu" and precision in INSTRUCTIONS and not has_them
    assert [event["vae_precision"] for event in events(EVENT)] == ([precision] if slow else [])


def test_torch_knows_the_instructions() -> None:
    """torch has not renamed its functions; without them the warning would never come."""
    assert all(hasattr(torch.cpu, name) for names, _ in INSTRUCTIONS.values() for name in names)
