"""Checks of the folders that the service writes to, and of those that requests are limited to."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from errors import AccessDenied, InvalidRequest
from latent_encoder.access import AllowedFolders, absolute
from latent_encoder.doctor.check import Check, Installation, cross, cross_of, tick, warning
from latent_encoder.geometry import Size
from latent_encoder.outputs.files import space_needed
from latent_encoder.storage.locations import is_url

PLENTY = 100
"""Requests that must fit on the disk; with room for fewer, a batch may fill it soon."""
FACTOR, CHANNELS = 8, 16
"""Pixels of one latent's pixel along a side, and channels, of the Qwen-Image VAE: the sizes of the files depend on both."""


def check_output_dir(installation: Installation) -> Iterator[Check]:
    """Check that files can be written to OUTPUT_DIR, or that it can be made, and the room on its disk. Leave nothing there."""
    settings = installation.settings
    advice = "Set OUTPUT_DIR to a folder that this user may write to and that has room."
    try:
        AllowedFolders.of_outputs(settings).check(settings.output_dir)
    except (AccessDenied, InvalidRequest) as exc:
        yield cross_of("output folder", exc, advice)
        return
    if is_url(settings.output_dir):
        yield tick("output folder", f"{settings.output_dir} is in object storage")
        return
    folder = absolute(settings.output_dir)
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
    """Report the free space on the disk of the VAE files."""
    settings = installation.settings
    folder = _existing(absolute(str(settings.model_dir or settings.comfyui_path)))
    yield tick("model disk", f"{_size(_free_bytes(folder))} free for models in {folder}")


def check_allowed_folders(installation: Installation) -> Iterator[Check]:
    """Check that the folders exist that requests are limited to."""
    for field in ("allowed_input_dirs", "allowed_output_dirs"):
        folders: tuple[Path, ...] | None = getattr(installation.settings, field)
        missing = [str(folder) for folder in folders or () if not folder.is_dir()]
        if folders is None:
            yield tick(field, "not set: any folder is allowed")
        elif missing:
            yield warning(field, f"missing: {', '.join(missing)}", f"Make them, or remove them from {field.upper()}.")
        else:
            yield tick(field, ", ".join(map(str, folders)))


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(place for place in (folder, *folder.parents) if os.path.exists(place))  # noqa: PTH110  # Path's may raise


def _free_bytes(folder: Path) -> float:
    """Return the free space on the folder's disk; infinity if the file system, such as one in user space, reports no size."""
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize if state.f_blocks else math.inf


def _room(folder: Path, megapixels: float) -> Check:
    """Compare the free space with the files of one request, and of `PLENTY`."""
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
