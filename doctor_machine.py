"""Checks of the machine: Python, torch, device, memory, and the folders that are written to."""

from __future__ import annotations

import math
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import torch

from access import AllowedFolders, absolute
from doctor_check import Check, Installation, cross, cross_of, tick, warning
from errors import AccessDenied, one_line
from geometry import Size
from output_files import space_needed
from service import usable_cpus

OLDEST_PYTHON, TESTED_PYTHON = (3, 11), "3.11"

# What an encode takes at its peak with the full-size VAE in float32 on a CPU: docs/encode_benchmark.png has the curve.
PEAK_AT_MEGAPIXELS, PEAK_GB = (1.0, 4.0, 16.0), (1.4, 1.9, 4.4)

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of control groups, version 2: docs.kernel.org/admin-guide/cgroup-v2.html

PLENTY = 100  # requests
FACTOR, CHANNELS = 8, 16  # of the VAEs that most use, for what a request writes


def check_python(_: Installation) -> Iterator[Check]:
    """The version that runs this."""
    found = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        yield cross("python", found, "Install Python 3.11 or newer and run ./setup_comfyui.sh.")
    else:
        yield tick("python", found if found.startswith(f"{TESTED_PYTHON}.") else f"{found} (tested: {TESTED_PYTHON})")


def check_torch(_: Installation) -> Iterator[Check]:
    """The version of torch, and whether torchvision's compiled operators fit it."""
    yield tick("torch", torch.__version__)
    try:
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError, AttributeError, OSError) as exc:
        found = f"it does not work with torch {torch.__version__}: {one_line(exc)}"
        yield cross("torchvision", found, "Run ./setup_comfyui.sh, which installs two that fit.")
    else:
        yield tick("torchvision", f"{torchvision.__version__}, fits torch")


def check_device(installation: Installation) -> Iterator[Check]:
    """Where DEVICE lets the encode run, and on how many threads."""
    settings = installation.settings
    if reason := installation.missing_device:
        yield cross("device", reason, "Check the driver (nvidia-smi), install a torch with CUDA, or set DEVICE=auto.")
    elif settings.device == "cpu" or not torch.accelerator.is_available():
        yield tick("device", f"cpu (DEVICE={settings.device}), {_processor()}")
    else:
        yield tick("device", f"{_accelerator()} (DEVICE={settings.device})")
    origin = "TORCH_NUM_THREADS" if settings.torch_num_threads else "what this process may use"
    yield tick("threads", f"{settings.torch_num_threads or usable_cpus()} ({origin}) of {os.cpu_count()} CPUs")


def check_memory(installation: Installation) -> Iterator[Check]:
    """What is available, against what an encode of MEGAPIXELS needs on a CPU."""
    megapixels = installation.settings.megapixels
    needed = float(np.interp(megapixels, PEAK_AT_MEGAPIXELS, PEAK_GB))
    available = min(psutil.virtual_memory().available, _container_limit()) / 1e9
    found = f"{available:.1f} GB available; MEGAPIXELS={megapixels:g} takes about {needed:.1f} GB to encode"
    if available < needed:
        yield warning("memory", found, "End other programs, ask for fewer megapixels, or give the container more memory.")
    else:
        yield tick("memory", found)


def check_output_dir(installation: Installation) -> Iterator[Check]:
    """Whether files can be written to OUTPUT_DIR, or where it would be made. Nothing is left there."""
    settings = installation.settings
    folder = absolute(settings.output_dir)
    advice = "Set OUTPUT_DIR to a folder that this user may write to and that has room."
    try:
        AllowedFolders("ALLOWED_OUTPUT_DIRS", settings.allowed_output_dirs).resolve(settings.output_dir)
    except AccessDenied as exc:
        yield cross_of("output folder", exc, advice)
        return
    existing = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as exc:
        yield cross("output folder", f"{folder} cannot be written to ({exc.strerror})", advice)
        return
    yield tick("output folder", f"{folder} {'can be written to' if existing == folder else 'can be made'}")
    yield _room(existing, settings.megapixels)


def check_model_disk(installation: Installation) -> Iterator[Check]:
    """What is free where VAE files are kept."""
    settings = installation.settings
    folder = _existing(absolute(str(settings.model_dir or settings.comfyui_path)))
    yield tick("model disk", f"{_size(_free_bytes(folder))} free for models in {folder}")


def check_allowed_folders(installation: Installation) -> Iterator[Check]:
    """Whether the folders are there that requests are limited to."""
    for field in ("allowed_input_dirs", "allowed_output_dirs"):
        folders: tuple[Path, ...] | None = getattr(installation.settings, field)
        missing = [str(folder) for folder in folders or () if not folder.is_dir()]
        if folders is None:
            yield tick(field, "not set: any folder is allowed")
        elif missing:
            yield warning(field, f"not there: {', '.join(missing)}", f"Make them, or take them out of {field.upper()}.")
        else:
            yield tick(field, ", ".join(map(str, folders)))


def _processor() -> str:
    return platform.processor() or platform.machine()


def _accelerator() -> str:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return f"cuda, {properties.name}, {properties.total_memory / 1e9:.1f} GB"
    return str(torch.accelerator.current_accelerator())


def _container_limit() -> float:
    """What the container's control group allows, in bytes; infinite where it says nothing."""
    text = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.exists() else "max"
    return math.inf if text == "max" else float(text)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(place for place in (folder, *folder.parents) if os.path.exists(place))  # noqa: PTH110  # Path's may raise


def _free_bytes(folder: Path) -> float:
    """Infinite where the file system does not say, as some in user space do not."""
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize if state.f_blocks else math.inf


def _room(folder: Path, megapixels: float) -> Check:
    side = round(1024 * math.sqrt(megapixels))
    needed = space_needed(Size(side, side), FACTOR, CHANNELS)
    free = _free_bytes(folder)
    found = f"{_size(free)} free; a request with MEGAPIXELS={megapixels:g} writes up to {_size(needed)}"
    advice = "Free space, or set OUTPUT_DIR to a folder on another disk."
    if free < needed:
        return cross("output disk", found, advice)
    return warning("output disk", found, advice) if free < PLENTY * needed else tick("output disk", found)


def _size(count: float) -> str:
    if count == math.inf:
        return "an unknown amount"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
