"""A GPU's memory: the size of strips that fits into the free part, and the way of pixels to it.

Prepared, not measured: docs/gpu.md has the command that measures it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from errors import one_line
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder")

MOST_STRIP_PIXELS = 1280 * 1024
"""Most pixels of a strip at the image's full size. A GPU is faster with fewer and larger operations, and an image of one
megapixel is one strip, also if scaling has rounded its sides up."""

LEAST_STRIP_PIXELS = 64 * 1024
"""Fewest pixels of a strip. With fewer, starting the operations would take longer than the operations."""

UNKNOWN_STRIP_PIXELS = 256 * 1024
"""Pixels of a strip on a device whose free memory is unknown: 1.1 GB with Wan 2.1's channels in half precision."""

SHARE_OF_FREE = 4
"""A strip takes a quarter of the free memory at most: convolutions take working memory of their own, and other processes may
use the GPU too."""


def strip_pixels(device: torch.device, bytes_per_pixel: int) -> int:
    """Return the count of pixels in a strip on a device that is no CPU, for layers that take so much memory for each."""
    free = free_bytes(device)
    return UNKNOWN_STRIP_PIXELS if free is None else pixels_that_fit(free, bytes_per_pixel)


def pixels_that_fit(free: int, bytes_per_pixel: int) -> int:
    """Return the count of pixels in a strip with so many bytes free: a power of two times `MOST_STRIP_PIXELS`, within bounds.

    Libraries choose an algorithm by a tensor's size, and round differently. With few sizes, the latent of an image does not
    depend on some bytes of free memory.
    """
    pixels = MOST_STRIP_PIXELS
    while pixels * bytes_per_pixel * SHARE_OF_FREE > free and pixels // 2 >= LEAST_STRIP_PIXELS:
        pixels //= 2
    return pixels


def free_bytes(device: torch.device) -> int | None:
    """Return the memory of a GPU that is free, or kept by torch for reuse; None if the device does not report it."""
    if device.type != "cuda":
        return None
    try:
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    except RuntimeError as exc:
        log.warning("free gpu memory is unknown", device=str(device), reason=one_line(exc))
        return None


def pinned(pixels: Tensor, device: torch.device) -> Tensor:
    """Return pixels on the CPU in memory that a GPU copies without help of the CPU; for a CPU, the pixels themselves."""
    if device.type != "cuda":
        return pixels
    try:
        return pixels.pin_memory()
    except RuntimeError as exc:
        log.warning("pixels cannot be kept in pinned memory", reason=one_line(exc))
        return pixels


def uploaded(pixels: Tensor, device: torch.device) -> Tensor:
    """Return pixels on a GPU, for which the CPU does not wait if they are `pinned`; for a CPU, the pixels themselves.

    If there is no room for them, they stay: ComfyUI moves them, when it has freed the memory of other models.
    """
    if device.type != "cuda":
        return pixels
    try:
        return pixels.to(device, non_blocking=True)
    except RuntimeError as exc:
        log.debug("pixels are not moved in advance", reason=one_line(exc))
        return pixels
