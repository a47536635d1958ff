"""Checks of the folders that are written to, and of those that requests are limited to."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from errors import AccessDenied
from latent_encoder.access import AllowedFolders, absolute
from latent_encoder.doctor.check import Check, Installation, cross, cross_of, tick, warning
from latent_encoder.geometry import Size
from latent_encoder.outputs.files import space_needed

PLENTY = 100  # requests
FACTOR, CHANNELS = 8, 16  # of the VAEs that most use, for what a request writes


def check_output_dir(installation: Installation) -> Iterator[Check]:
    """Whether files can be written to OUTPUT_DIR, or where it would be made. Nothing is left there."""
    settings = installation.settings
    folder = absolute(settings.output_dir)
    advice = "Set OUTPUT_DIR to a folder that this user may write to and that has room."
    try:
        AllowedFolders("ALLOWED_OUTPUT_DIRS", settings.allowed_output_dirs).check(settings.output_dir)
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
