"""The findings about a latent file: its values, its metadata, and the checksums of the files that belong to it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError

from errors import one_line
from latent_encoder.inspection.copies import Copies
from latent_encoder.outputs.latent_files import read_latent_file
from latent_encoder.outputs.names import OutputFiles
from models import FileFormat, Metadata

FileState = Literal["ok", "differs", "missing"]

LIKELY_SPACES = {4: "SD15", 16: "Wan21", 48: "Wan22"}
"""The most probable latent space of a latent without metadata, by its count of channels."""


@dataclass(frozen=True)
class Channel:
    """The statistics of one channel, over its finite values; None if there are none."""

    mean: float | None
    deviation: float | None
    """The population standard deviation: the root of the mean squared difference from the mean."""
    minimum: float | None
    maximum: float | None
    finite: bool
    """Every value is finite."""


@dataclass(frozen=True)
class FileCheck:
    """The comparison of a file with the SHA-256 checksum in the metadata."""

    name: str
    """`latent`, `scaled_image`, `preview` or `roundtrip`."""
    path: Path
    state: FileState
    """`missing` if there is no readable file."""
    fault: str | None = None
    """The reason why an object that may exist cannot be read."""


@dataclass(frozen=True)
class NamedSpace:
    """ComfyUI's name of a latent space, or None if it is unknown."""

    name: str | None
    guessed: bool
    """The name follows from the count of channels alone."""


@dataclass(frozen=True, eq=False)
class Inspection:
    """The findings about one latent file."""

    copies: Copies
    """The latent and the files that belong to it, on this machine."""
    latent_format: FileFormat
    latent: torch.Tensor
    """`[batch, channels, height, width]`."""
    channels: tuple[Channel, ...]
    metadata: Metadata | None
    metadata_note: str | None
    """The reason why there is no metadata."""
    checks: tuple[FileCheck, ...]
    """One for each file that the metadata names."""
    space: NamedSpace

    @property
    def files(self) -> OutputFiles:
        """The paths of the latent and of the files that belong to it."""
        return self.copies.files

    @property
    def dtype(self) -> str:
        return str(self.latent.dtype).removeprefix("torch.")

    @property
    def finite(self) -> bool:
        return all(channel.finite for channel in self.channels)

    @property
    def problems(self) -> list[str]:
        """The problems of the file, a sentence each."""
        words = {"differs": "is not the file that the metadata names: its checksum differs", "missing": "is missing"}
        found = [
            f"{check.path.name} {f'cannot be read ({check.fault})' if check.fault else words[check.state]}."
            for check in self.checks
            if check.state != "ok"
        ]
        if not self.finite:
            broken = [str(number) for number, channel in enumerate(self.channels) if not channel.finite]
            found.append(f"It has values that are not finite, in channel {', '.join(broken)}.")
        return found

    def state_of(self, name: str) -> FileState | None:
        """Return the state of that kind of file; None if the metadata does not name it."""
        return next((check.state for check in self.checks if check.name == name), None)


def inspect_latent(copies: Copies) -> Inspection:
    """Inspect a latent file and the files that belong to it.

    Raises:
        LatentUnreadable: the file cannot be read as a latent.
    """
    files = copies.files
    latent, latent_format = read_latent_file(files.latent, copies.here)
    metadata, note = read_metadata(copies)
    return Inspection(
        copies=copies,
        latent_format=latent_format,
        latent=latent,
        channels=tuple(channel_statistics(latent)),
        metadata=metadata,
        metadata_note=note,
        checks=() if metadata is None else tuple(check_files(copies, metadata)),
        space=latent_space(metadata, latent.shape[1]),
    )


def channel_statistics(latent: torch.Tensor) -> list[Channel]:
    """Return the statistics of each channel of a tensor `[batch, channels, …]`, computed in float64."""
    return [_statistics(values.flatten().double()) for values in latent.unbind(1)]


def _statistics(values: torch.Tensor) -> Channel:
    kept = values[values.isfinite()]
    finite = len(kept) == len(values)
    if not len(kept):
        return Channel(None, None, None, None, finite)
    deviation, mean = torch.std_mean(kept, correction=0)
    return Channel(mean.item(), deviation.item(), kept.min().item(), kept.max().item(), finite)


def read_metadata(copies: Copies) -> tuple[Metadata | None, str | None]:
    """Return the metadata of a latent, or the reason why there are none."""
    path = copies.files.metadata
    try:
        return Metadata.model_validate_json(copies.here(path).read_bytes()), None
    except FileNotFoundError:
        return None, f"{path.name} is not there"
    except OSError as exc:
        return None, f"{path.name} cannot be read ({exc.strerror})"
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        reason = one_line(ValueError(f"{field}: {first['msg']}" if field else first["msg"]))
        return None, f"{path.name} does not hold this service's metadata ({reason})"


def check_files(copies: Copies, metadata: Metadata) -> list[FileCheck]:
    """Compare every file that the metadata name with its checksum."""
    return [_compared(name, getattr(copies.files, name), copies, sha256) for name, sha256 in metadata.sha256_by_file.items()]


def _compared(name: str, path: Path, copies: Copies, sha256: str) -> FileCheck:
    try:
        file = copies.here(path)
    except FileNotFoundError:
        return FileCheck(name, path, "missing")
    except OSError as exc:
        return FileCheck(name, path, "missing", exc.strerror)
    return FileCheck(name, path, _state(file, sha256))


def _state(path: Path, sha256: str) -> FileState:
    if not path.is_file() or not os.access(path, os.R_OK):
        return "missing"
    with path.open("rb") as file:
        return "ok" if hashlib.file_digest(file, "sha256").hexdigest() == sha256.lower() else "differs"


def latent_space(metadata: Metadata | None, channels: int) -> NamedSpace:
    """Return the latent space in the metadata, or else the one that the count of channels makes likely."""
    if metadata is not None and metadata.latent_space is not None:
        return NamedSpace(metadata.latent_space, guessed=False)
    name = LIKELY_SPACES.get(channels)
    return NamedSpace(name, guessed=name is not None)
