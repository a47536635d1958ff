"""What can be found out about a latent file: its values, its metadata, and whether the files beside it are what they were."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError

from errors import one_line
from latent_encoder.outputs.files import OutputFiles
from latent_encoder.outputs.latent_files import read_latent_file
from models import FileFormat, Metadata

HashState = Literal["ok", "differs", "missing"]

# Of the families that have so many channels, the one that a latent without metadata most probably is of.
LIKELY_SPACES = {4: "SD15", 16: "Wan21", 48: "Wan22"}


@dataclass(frozen=True)
class Channel:
    """The values of one channel, over all that is finite in it; None where nothing is."""

    mean: float | None
    deviation: float | None
    """Of the population: the root of the mean square of the differences from the mean."""
    minimum: float | None
    maximum: float | None
    finite: bool
    """Whether every value is."""


@dataclass(frozen=True)
class HashCheck:
    """Whether a file is the one that the metadata names by its SHA-256."""

    name: str
    """Its kind: `latent`, `scaled_image`, `preview` or `roundtrip`."""
    path: Path
    state: HashState
    """`missing` where it is not there as a file that can be read."""


@dataclass(frozen=True)
class LatentSpace:
    """ComfyUI's name of the latent's kind, or None where it is not known."""

    name: str | None
    guessed: bool
    """Whether only the number of channels speaks for it."""


@dataclass(frozen=True, eq=False)
class Inspection:
    """Everything that was found about one latent file."""

    files: OutputFiles
    """The latent, and where the files that belong to it would be."""
    latent_format: FileFormat
    latent: torch.Tensor
    """`[batch, channels, height, width]`."""
    channels: tuple[Channel, ...]
    metadata: Metadata | None
    metadata_note: str | None
    """Why there is no metadata."""
    checks: tuple[HashCheck, ...]
    """Of the files that the metadata names."""
    space: LatentSpace

    @property
    def dtype(self) -> str:
        return str(self.latent.dtype).removeprefix("torch.")

    @property
    def finite(self) -> bool:
        return all(channel.finite for channel in self.channels)

    @property
    def problems(self) -> list[str]:
        """What is wrong with it, a sentence each; none where all is well."""
        words = {"differs": "is not the file that the metadata names: its hash differs", "missing": "is missing"}
        found = [f"{check.path.name} {words[check.state]}." for check in self.checks if check.state != "ok"]
        if not self.finite:
            broken = [str(number) for number, channel in enumerate(self.channels) if not channel.finite]
            found.append(f"It has values that are not finite, in channel {', '.join(broken)}.")
        return found

    def state_of(self, name: str) -> HashState | None:
        """What checking that kind of file gave; None where the metadata does not name it."""
        return next((check.state for check in self.checks if check.name == name), None)


def inspect_latent(path: Path) -> Inspection:
    """Look at a latent file and at what is beside it.

    Raises:
        LatentUnreadable: it cannot be read as a latent.
    """
    latent, latent_format = read_latent_file(path)
    files = OutputFiles.of(path)
    metadata, note = read_metadata(files.metadata)
    return Inspection(
        files=files,
        latent_format=latent_format,
        latent=latent,
        channels=tuple(channel_statistics(latent)),
        metadata=metadata,
        metadata_note=note,
        checks=() if metadata is None else tuple(check_hashes(files, metadata)),
        space=latent_space(metadata, latent.shape[1]),
    )


def channel_statistics(latent: torch.Tensor) -> list[Channel]:
    """Of each channel of a tensor `[batch, channels, …]`, computed in float64."""
    return [_statistics(values.flatten().double()) for values in latent.unbind(1)]


def _statistics(values: torch.Tensor) -> Channel:
    kept = values[values.isfinite()]
    finite = len(kept) == len(values)
    if not len(kept):
        return Channel(None, None, None, None, finite)
    deviation, mean = torch.std_mean(kept, correction=0)
    return Channel(mean.item(), deviation.item(), kept.min().item(), kept.max().item(), finite)


def read_metadata(path: Path) -> tuple[Metadata | None, str | None]:
    """The metadata in that file, or why there is none."""
    try:
        return Metadata.model_validate_json(path.read_bytes()), None
    except FileNotFoundError:
        return None, f"{path.name} is not there"
    except OSError as exc:
        return None, f"{path.name} cannot be read ({exc.strerror})"
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        reason = one_line(ValueError(f"{field}: {first['msg']}" if field else first["msg"]))
        return None, f"{path.name} does not hold this service's metadata ({reason})"


def check_hashes(files: OutputFiles, metadata: Metadata) -> list[HashCheck]:
    """Compare every file that the metadata names with its SHA-256."""
    paths: dict[str, Path] = {name: getattr(files, name) for name in metadata.sha256_by_file}
    return [HashCheck(name, paths[name], _compare(paths[name], sha256)) for name, sha256 in metadata.sha256_by_file.items()]


def _compare(path: Path, sha256: str) -> HashState:
    if not path.is_file() or not os.access(path, os.R_OK):
        return "missing"
    with path.open("rb") as file:
        return "ok" if hashlib.file_digest(file, "sha256").hexdigest() == sha256.lower() else "differs"


def latent_space(metadata: Metadata | None, channels: int) -> LatentSpace:
    """What the metadata says, else what the number of channels makes likely."""
    if metadata is not None and metadata.latent_space is not None:
        return LatentSpace(metadata.latent_space, guessed=False)
    name = LIKELY_SPACES.get(channels)
    return LatentSpace(name, guessed=name is not None)
