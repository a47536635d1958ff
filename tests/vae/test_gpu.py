"""The parts of a GPU's path that a machine without one can test: sizes, choices and falls back to torch's own operations."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from latent_encoder.vae import activation, attention, gpu, single_frame
from latent_encoder.vae.activation import Guarded, quickest
from latent_encoder.vae.single_frame import SingleFrameEncoder
from latent_encoder.vae.single_frame_layers import norm_silu
from service import LatentEncoder
from tests.helpers import PROJECT
from tests.kafka_tools import Events
from tests.tensor_memory import PeakOfTensors

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
SHAPE = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True]}
BYTES_PER_PIXEL = 4224
"""`bytes_per_pixel` of Wan 2.1 in half precision."""

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the fault that is tested is the lack of a GPU")


def full_size_model(encoder: LatentEncoder, dtype: torch.dtype) -> Any:
    """Return ComfyUI's model with the shapes of Wan 2.1, without data."""
    assert encoder.runtime.version  # ComfyUI can be imported once it is loaded
    with META:
        return importlib.import_module("comfy.ldm.wan.vae").WanVAE(dim=96, z_dim=16, **SHAPE).to(dtype)


def peak_of(encoder: SingleFrameEncoder, side: int, dtype: torch.dtype) -> int:
    """Return the peak of tensors while a square image is encoded."""
    pixels = torch.empty(1, 3, 1, side, side, dtype=dtype, device=META)
    tensors = PeakOfTensors()
    with torch.inference_mode(), tensors:
        encoder(pixels)
    return tensors.peak


@given(st.integers(0, 2**38), st.integers(1, 2**16))
def test_strip_fits_into_its_share(free: int, bytes_per_pixel: int) -> None:
    """A strip takes its share of the free memory at most, unless it is the smallest; twice its pixels would be too many."""
    pixels = gpu.pixels_that_fit(free, bytes_per_pixel)
    assert gpu.LEAST_STRIP_PIXELS <= pixels <= gpu.MOST_STRIP_PIXELS
    needed = pixels * bytes_per_pixel * gpu.SHARE_OF_FREE
    assert needed <= free or pixels < 2 * gpu.LEAST_STRIP_PIXELS
    assert pixels == gpu.MOST_STRIP_PIXELS or 2 * needed > free


@pytest.mark.parametrize(("free_gb", "pixels"), [(78, 1280), (20, 640), (10, 320), (5, 160), (2, 80), (0.1, 80)])
def test_strip_of_common_gpus(free_gb: float, pixels: int) -> None:
    """Half precision with Wan 2.1's channels: a megapixel in one strip on a large GPU, fewer rows with less free memory."""
    assert gpu.pixels_that_fit(int(free_gb * 1e9), BYTES_PER_PIXEL) == pixels * 1024


def test_strip_on_a_device_that_reports_no_memory() -> None:
    """A device whose free memory is unknown gets strips of a fixed size."""
    assert gpu.strip_pixels(META, BYTES_PER_PIXEL) == gpu.UNKNOWN_STRIP_PIXELS


@needs_no_gpu
def test_memory_that_cannot_be_asked_for(events: Events) -> None:
    """If CUDA fails to report its memory, strips have the fixed size, and the log has the reason."""
    assert gpu.strip_pixels(CUDA, BYTES_PER_PIXEL) == gpu.UNKNOWN_STRIP_PIXELS
    assert len(events("free gpu memory is unknown")) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("strip", [128, 256, 1280])
def test_bytes_per_pixel_bound_the_peak(
    strip: int, dtype: torch.dtype, encoder: LatentEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tensors of an encode take no more memory than the figure from which the height of strips is computed."""
    monkeypatch.setattr(single_frame, "strip_pixels", lambda *_: strip * 1024)
    fast = SingleFrameEncoder(full_size_model(encoder, dtype), target=META)
    assert peak_of(fast, 1024, dtype) <= strip * 1024 * fast.bytes_per_pixel
    assert fast.bytes_per_pixel == BYTES_PER_PIXEL * dtype.itemsize // 2


def test_megapixel_in_half_precision(encoder: LatentEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """One megapixel in float16 takes 1.5 GB of tensors by torch's operations, and 1.1 GB with one kernel for norm and SiLU."""
    monkeypatch.setattr(single_frame, "strip_pixels", lambda *_: gpu.MOST_STRIP_PIXELS)
    model = full_size_model(encoder, torch.float16)
    assert peak_of(SingleFrameEncoder(model, target=META), 1024, torch.float16) < 1.5e9
    monkeypatch.setattr(single_frame, "activation_for", lambda *_, **__: lambda *_: None)
    assert peak_of(SingleFrameEncoder(model, target=META), 1024, torch.float16) < 1.15e9


def test_attention_has_no_matrix_of_scores() -> None:
    """Keys and values on a GPU have consecutive channels, without which torch's fused attention is not used."""
    pixels = torch.empty(64, 384, device=META)
    assert [tensor.stride() for tensor in attention.empty_like(pixels)] == [(384, 1), (384, 1)]


def test_no_winograd_on_a_gpu(encoder: LatentEncoder) -> None:
    """A float32 VAE that will run on a GPU has no convolution of Winograd, although it is loaded on the CPU."""
    model = full_size_model(encoder, torch.float32)
    kinds = {
        target.type: any(getattr(layer, "winograd", False) for layer in SingleFrameEncoder(model, target=target).modules())
        for target in (CPU, CUDA)
    }
    assert kinds == {"cpu": True, "cuda": False}


@needs_no_gpu
def test_kernels_without_a_gpu(events: Events) -> None:
    """If kernels cannot be measured, torch's operations are used, and the log has the reason."""
    assert activation.activation_for(CUDA, torch.float16, compiled=False) is norm_silu
    assert len(events("gpu kernels are not used")) == 1


def test_pixels_for_a_cpu_stay() -> None:
    """For a VAE on the CPU, pixels are neither copied nor pinned."""
    pixels = torch.zeros(1, 8, 8, 3)
    assert gpu.pinned(pixels, CPU) is pixels
    assert gpu.uploaded(pixels, CPU) is pixels


@needs_no_gpu
def test_pixels_that_cannot_be_moved(events: Events) -> None:
    """Pixels that can be neither pinned nor uploaded stay as they are, and the encode goes on."""
    pixels = torch.zeros(1, 8, 8, 3)
    assert gpu.pinned(pixels, CUDA) is pixels
    assert gpu.uploaded(pixels, CUDA) is pixels
    assert len(events("pixels cannot be kept in pinned memory")) == 1


def failing(*_: Any) -> None:
    raise RuntimeError("no C compiler")


def out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def wrong(rows: Tensor, gamma: Tensor, out: Tensor) -> None:
    norm_silu(rows, gamma, out)
    out[0, 0, 0] += 1


def right(rows: Tensor, gamma: Tensor, out: Tensor) -> None:
    norm_silu(rows, gamma, out)


@pytest.mark.parametrize(
    ("kernel", "microseconds", "chosen"),
    [
        (right, 50, True),
        (right, 95, False),
        (right, 200, False),
        (wrong, 50, False),
        (failing, 50, False),
        (out_of_memory, 50, False),
    ],
)
def test_choice_of_a_kernel(kernel: Any, microseconds: float, chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is chosen if it computes the same in less time; torch takes 100 microseconds here."""
    times = {norm_silu: 100.0, kernel: microseconds}
    monkeypatch.setattr(activation, "_microseconds", lambda function, *_: times[function])
    best = quickest(CPU, torch.float32, {"kernel": kernel})
    assert (best.name if isinstance(best, Guarded) else "torch") == ("kernel" if chosen else "torch")


def test_kernel_that_fails_later(events: Events) -> None:
    """A kernel that fails is logged once and replaced by torch's operations; one that lacks memory is kept."""
    rows, gamma = torch.empty(2, 2, 8, device=META), torch.empty(8, device=META)
    guarded = Guarded("kernel", failing)
    guarded(rows, gamma, torch.empty_like(rows))
    guarded(rows, gamma, torch.empty_like(rows))
    assert len(events("gpu kernel failed and is not used any more")) == 1
    with pytest.raises(torch.OutOfMemoryError):
        Guarded("kernel", out_of_memory)(rows, gamma, torch.empty_like(rows))


def test_kernel_is_for_gpus_only() -> None:
    """On the CPU, where a VAE is checked before ComfyUI moves it, torch's operations run."""
    rows, gamma = torch.randn(2, 2, 8), torch.randn(8)
    given, expected = torch.empty_like(rows), torch.empty_like(rows)
    Guarded("kernel", failing)(rows, gamma, given)
    norm_silu(rows, gamma, expected)
    assert torch.equal(given, expected)


INTERPRETED = """
import torch
from latent_encoder.vae.norm_silu_kernel import norm_silu_kernel
from latent_encoder.vae.single_frame_layers import norm_silu
for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 4e-2)):
    for height, width, channels in ((3, 5, 96), (2, 33, 160), (1, 1, 384), (4, 7, 8), (5, 1, 96)):
        rows = torch.randn(height, width + 2, channels).to(dtype)[:, :width]
        if channels == 8:
            rows = rows.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        rows[0, 0] = 0
        results = [torch.zeros(height, width + 2, channels, dtype=dtype) for _ in range(2)]
        gamma = torch.randn(channels)
        for compute, result in zip((norm_silu_kernel, norm_silu), results):
            compute(rows, gamma, result[:, 1 : 1 + width])
        torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)
"""


def test_triton_kernel_computes_the_same() -> None:
    """Triton's interpreter gives torch's numbers for several widths and channels, and leaves the columns beside alone."""
    pytest.importorskip("triton")
    command = [sys.executable, "-c", INTERPRETED]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
