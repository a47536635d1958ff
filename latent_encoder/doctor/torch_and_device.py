"""Checks of torch, and of the device that encodes."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator

import torch

from errors import one_line
from latent_encoder.doctor.check import Check, Installation, cross, tick
from latent_encoder.torch_threads import encode_threads


def check_torch(_: Installation) -> Iterator[Check]:
    """Report the version of torch, and check that torchvision's compiled operators fit it."""
    yield tick("torch", torch.__version__)
    try:
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError, AttributeError, OSError) as exc:
        found = f"it does not work with torch {torch.__version__}: {one_line(exc)}"
        yield cross(
            "torchvision", found, "Run ./setup_comfyui.sh, which installs a torch and a torchvision that fit each other."
        )
    else:
        yield tick("torchvision", f"{torchvision.__version__}, fits torch")


def check_device(installation: Installation) -> Iterator[Check]:
    """Check that the device of DEVICE can be used, and report the number of threads."""
    settings = installation.settings
    if reason := installation.missing_device:
        yield cross("device", reason, "Check the driver (nvidia-smi), install a torch with CUDA, or set DEVICE=auto.")
    elif settings.device == "cpu" or not torch.accelerator.is_available():
        yield tick("device", f"cpu (DEVICE={settings.device}), {_processor()}")
    else:
        yield tick("device", f"{_accelerator()} (DEVICE={settings.device})")
    origin = "TORCH_NUM_THREADS" if settings.torch_num_threads else "CPUs of this process"
    yield tick("threads", f"{settings.torch_num_threads or encode_threads()} ({origin}) of {os.cpu_count()} CPUs")


def _processor() -> str:
    return platform.processor() or platform.machine()


def _accelerator() -> str:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return f"cuda, {properties.name}, {properties.total_memory / 1e9:.1f} GB"
    return str(torch.accelerator.current_accelerator())
