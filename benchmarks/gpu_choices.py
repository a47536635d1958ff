"""The choices of the path on a GPU, each measured against today's: heights of strips, kernels, CUDA graphs, attention.

Each is one encode of the model alone, `SingleFrameEncoder`, with the pixels on the device. Nothing here changes the product.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from errors import one_line
from latent_encoder.vae import gpu
from latent_encoder.vae.single_frame import SingleFrameEncoder
from latent_encoder.vae.single_frame_layers import Activation, norm_silu

STRIPS = (128, 256, 512, 1280)  # Ki pixels: from launches that take longer than the work, to a megapixel as one strip
TOKENS = (16384, 65536)  # pixels of the attention at 1 and 4 megapixels
ATTENTION_CHANNELS = 384
QUERY_BLOCK = 4096  # queries of a block; the scores of one are 128 MB at 1 megapixel in half precision

Choice = dict[str, Any]
Call = Callable[[], Any]
Make = Callable[[], AbstractContextManager[Call]]
"""The function that makes a choice, which is undone when its context ends. The context is the call to measure."""

AS_IT_IS = "as it is"


def measure_choices(encoder: SingleFrameEncoder, pixels: Tensor, rounds: int, vae: Any) -> list[Choice]:
    """Return the milliseconds and the peak memory of each choice; a choice that cannot be measured has an error."""
    device = vae.vae.device
    encoder.to(device)
    frame = (pixels.to(device) * 2 - 1).movedim(-1, 1).unsqueeze(2).to(next(encoder.parameters()).dtype)
    calls = {
        AS_IT_IS: lambda: _unchanged(lambda: encoder(frame)),
        **dict(_of_encoder(encoder, frame)),
        **dict(_of_attention(frame)),
        "as one CUDA graph": lambda: _as_graph(encoder, frame),  # last: a failed capture may spoil what follows
    }
    return [_measured(name, make, rounds, device) for name, make in calls.items()]


def _of_encoder(encoder: SingleFrameEncoder, frame: Tensor) -> Iterator[tuple[str, Make]]:
    for strip in STRIPS:
        yield f"strips of {strip} Ki pixels", partial(_with_strips, encoder, frame, strip * 1024)
    yield "norm and SiLU by torch", lambda: _with_activation(encoder, frame, lambda: norm_silu)
    yield "norm and SiLU by Triton", lambda: _with_activation(encoder, frame, _triton)
    yield "norm and SiLU by torch.compile", lambda: _with_activation(encoder, frame, _compiled)
    yield "cuDNN tries algorithms (benchmark)", lambda: _with_benchmark(encoder, frame)


def _of_attention(frame: Tensor) -> Iterator[tuple[str, Make]]:
    for tokens in TOKENS if frame.device.type == "cuda" else (1024,):
        made = [torch.randn(tokens, ATTENTION_CHANNELS, device=frame.device, dtype=frame.dtype) for _ in range(3)]
        yield f"attention of {tokens} pixels: fused", partial(_unchanged, partial(_fused, *made))
        yield f"attention of {tokens} pixels: by products", partial(_unchanged, partial(_by_products, *made))


def _measured(name: str, make: Make, rounds: int, device: torch.device) -> Choice:
    on_gpu = device.type == "cuda"
    try:
        with make() as call:
            call()
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            milliseconds = []
            for _ in range(rounds):
                start = time.perf_counter()
                call()
                if on_gpu:
                    torch.cuda.synchronize()
                milliseconds.append((time.perf_counter() - start) * 1000)
            peak = torch.cuda.max_memory_allocated() if on_gpu else None
            return {"choice": name, "milliseconds": milliseconds, "allocated": peak}
    except Exception as exc:
        kind = "error" if name == AS_IT_IS else "not possible"  # a machine may have no compiler, and a CPU has no graphs
        return {"choice": name, kind: f"{type(exc).__name__}: {one_line(exc)[:200]}"}


@contextmanager
def _unchanged(call: Call) -> Iterator[Call]:
    yield call


@contextmanager
def _with_strips(encoder: SingleFrameEncoder, frame: Tensor, pixels: int) -> Iterator[Call]:
    before, gpu.MOST_STRIP_PIXELS = gpu.MOST_STRIP_PIXELS, pixels
    try:
        yield lambda: encoder(frame)
    finally:
        gpu.MOST_STRIP_PIXELS = before


@contextmanager
def _with_activation(encoder: SingleFrameEncoder, frame: Tensor, make: Callable[[], Activation]) -> Iterator[Call]:
    layers: list[Any] = [layer for layer in encoder.modules() if hasattr(layer, "activate")]
    before, activate = [layer.activate for layer in layers], make()
    try:
        for layer in layers:
            layer.activate = activate
        yield lambda: encoder(frame)
    finally:
        for layer, activate in zip(layers, before, strict=True):
            layer.activate = activate


def _triton() -> Activation:
    from latent_encoder.vae.norm_silu_kernel import norm_silu_kernel

    return norm_silu_kernel


def _compiled() -> Activation:
    if not torch.cuda.is_available():
        raise RuntimeError("no GPU to compile for")
    compiled: Activation = torch.compile(norm_silu, dynamic=True)
    return compiled


@contextmanager
def _with_benchmark(encoder: SingleFrameEncoder, frame: Tensor) -> Iterator[Call]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield lambda: encoder(frame)
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def _as_graph(encoder: SingleFrameEncoder, frame: Tensor) -> Iterator[Call]:
    """Capture the encode of one size. The free memory is asked for before, because that is no operation of a graph."""
    free, ask = gpu.free_bytes(frame.device), gpu.free_bytes
    gpu.free_bytes = lambda device: free  # noqa: ARG005
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):  # as torch's manual says: libraries prepare themselves before the capture
                encoder(frame)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            encoder(frame)
        yield graph.replay
    finally:
        gpu.free_bytes = ask


def _fused(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(queries[None, None], keys[None, None], values[None, None])


def _by_products(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return the attention by two matrix products and a softmax, for a block of queries at a time."""
    scaled = queries / math.sqrt(queries.shape[1])
    return torch.cat([torch.softmax(block @ keys.T, dim=-1) @ values for block in torch.split(scaled, QUERY_BLOCK)])
