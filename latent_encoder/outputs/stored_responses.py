"""The success response of a request: for files that were just written, and for whole files of an earlier run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from latent_encoder.access import AllowedFolders
from latent_encoder.outputs.files import OutputFiles, OutputFolder
from latent_encoder.outputs.metadata import checksum
from models import EncodeRequest, Metadata, SuccessResponse


@dataclass(frozen=True)
class StoredFiles:
    """The files that an earlier run left."""

    metadata: Metadata
    whole: frozenset[Path]
    """The files that are there and have the checksum that the metadata state."""


def read_stored(files: OutputFiles, allowed: AllowedFolders) -> StoredFiles | None:
    """Return the stored files of these names, or None if their metadata cannot be read or are of another version.

    Raises:
        AccessDenied: the folder is none of those that are allowed.
    """
    try:
        with allowed.open_folder(str(files.folder)) as descriptor:
            folder = OutputFolder(files.folder, descriptor)
            metadata = Metadata.model_validate_json(folder.read(files.metadata.name))
            stated: dict[Path, str] = {getattr(files, name): sha256 for name, sha256 in metadata.sha256_by_file.items()}
            return StoredFiles(metadata, frozenset(path for path in stated if _is_whole(folder, path.name, stated[path])))
    except (OSError, ValidationError):
        return None


def success_response(
    request: EncodeRequest, files: OutputFiles, metadata: Metadata, present: Collection[Path]
) -> SuccessResponse:
    """Return the response to a request with these files. It names preview and roundtrip image only if they are `present`."""
    return SuccessResponse(
        request_id=request.request_id,
        latent_file_path=str(files.latent),
        latent_shape=metadata.latent_shape,
        scaled_image_path=str(files.scaled_image),
        metadata=metadata,
        preview_path=str(files.preview) if files.preview in present else None,
        roundtrip_path=str(files.roundtrip) if files.roundtrip in present else None,
    )


def _is_whole(folder: OutputFolder, name: str, sha256: str) -> bool:
    """Return whether the folder has a file of that name with that checksum."""
    try:
        return checksum(folder.read(name)) == sha256
    except OSError:
        return False
