"""The way to compute norm and SiLU: torch's operations, or one kernel for a GPU if it is quicker there.

Eager torch reads and writes the strip eight times, and takes two float32 copies of it. A kernel reads it once and writes it
once. On a GPU it is chosen by a measurement when a VAE is loaded. If it cannot be built or fails, torch's operations take its
place: Triton needs a C compiler, which many machines lack.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from errors import is_out_of_memory, one_line
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.vae.single_frame_layers import Activation, norm_silu

log = get_logger("latent_encoder")

TRIAL_SHAPE = (512, 512, 96)
"""Height, width and channels of the strip for the measurement: the first level of Wan 2.1, large enough to fill a GPU."""

TRIAL_BORDER = 1
"""Columns beside the trial's result, as in the buffer of a convolution."""

TRIAL_RUNS = 10

WORTH_IT = 1.1
"""A kernel must be faster than torch by this factor. With less, the choice would depend on chance."""

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-1}
"""Largest allowed difference of a kernel's result from torch's, whose values go up to 8: some units in the last place."""


class KernelDiffers(Exception):
    """A kernel's result is not that of torch's operations; the text has the difference."""


class Guarded:
    """A kernel for GPUs, with torch's operations for CPUs and for the time after a failure."""

    def __init__(self, name: str, kernel: Activation) -> None:
        self.name = name
        self._kernel: Activation | None = kernel

    def __call__(self, rows: Tensor, gamma: Tensor, out: Tensor) -> None:
        """Compute `norm_silu`."""
        if self._kernel is None or rows.device.type == "cpu":
            norm_silu(rows, gamma, out)
            return
        try:
            self._kernel(rows, gamma, out)
        except Exception as exc:
            if is_out_of_memory(exc):
                raise
            self._kernel = None
            log.warning("gpu kernel failed and is not used any more", kernel=self.name, reason=one_line(exc))
            norm_silu(rows, gamma, out)


def activation_for(target: torch.device, dtype: torch.dtype, *, compiled: bool) -> Activation:
    """Return the quickest `norm_silu` for a device. On a CPU it is torch's, or with `compiled` that of `torch.compile`."""
    if target.type == "cuda":
        return _quickest_on_gpu(target, dtype, compiled)
    return torch.compile(norm_silu, dynamic=True) if compiled else norm_silu


@cache
def _quickest_on_gpu(target: torch.device, dtype: torch.dtype, compiled: bool) -> Activation:
    return quickest(target, dtype, dict(_kernels(compiled=compiled)))


def _kernels(*, compiled: bool) -> Iterator[tuple[str, Activation]]:
    """Yield the kernels to try, by name."""
    try:
        from latent_encoder.vae.norm_silu_kernel import norm_silu_kernel  # torch for CPUs comes without Triton
    except Exception as exc:
        log.info("gpu kernel is not used", kernel="triton", reason=one_line(exc))
    else:
        yield "triton", norm_silu_kernel
    if compiled:
        yield "torch.compile", torch.compile(norm_silu, dynamic=True)


def quickest(target: torch.device, dtype: torch.dtype, kernels: dict[str, Activation]) -> Activation:
    """Return the quickest of the kernels if it is worth it and computes the same, else `norm_silu`."""
    try:
        best, least = norm_silu, _microseconds(norm_silu, target, dtype)
    except Exception as exc:  # memory, for example; no reason to refuse the VAE
        log.warning("gpu kernels are not used", reason=one_line(exc))
        return norm_silu
    microseconds = {"torch": round(least)}
    for name, kernel in kernels.items():
        try:
            _check(kernel, target, dtype)
            took = _microseconds(kernel, target, dtype)
        except Exception as exc:  # no compiler, another GPU than Triton knows, another Triton: all have the same consequence
            log.info("gpu kernel is not used", kernel=name, reason=one_line(exc))
            continue
        microseconds[name] = round(took)
        if took * WORTH_IT < least:
            best, least = Guarded(name, kernel), took
    log.info("norm and silu are computed by", kernel=getattr(best, "name", "torch"), microseconds=microseconds)
    return best


def _check(kernel: Activation, target: torch.device, dtype: torch.dtype) -> None:
    """Raise `KernelDiffers` if a kernel's result is not that of `norm_silu`."""
    given, expected = _trial(target, dtype), _trial(target, dtype)
    kernel(*given)
    norm_silu(*expected)
    apart = float((given[2].float() - expected[2].float()).abs().max())
    if not apart <= TOLERANCE[dtype]:
        raise KernelDiffers(f"its result is off by {apart:.1e}")


def _trial(target: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows of fixed noise, gamma, and a place for the result that has columns beside it."""
    height, width, channels = TRIAL_SHAPE
    generator = torch.Generator(target).manual_seed(0)
    rows = torch.randn(TRIAL_SHAPE, generator=generator, device=target, dtype=dtype)
    gamma = torch.randn(channels, generator=generator, device=target)
    buffer = torch.zeros(height, width + 2 * TRIAL_BORDER, channels, device=target, dtype=dtype)
    return rows, gamma, buffer[:, TRIAL_BORDER : TRIAL_BORDER + width]


def _microseconds(activate: Activation, target: torch.device, dtype: torch.dtype) -> float:
    """Return the time of one run on a GPU. The first run, which may compile, is not measured."""
    with torch.cuda.device(target):
        arguments = _trial(target, dtype)
        activate(*arguments)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(TRIAL_RUNS):
            activate(*arguments)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1000 / TRIAL_RUNS
