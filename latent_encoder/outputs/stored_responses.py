"""The success response of a request: for files that were just written, and for whole files of an earlier run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from latent_encoder.access import AllowedFolders
from latent_encoder.outputs.checksums import checksum
from latent_encoder.outputs.names import OutputFiles
from latent_encoder.outputs.owners import Owner, metadata_in, owners_of
from latent_encoder.outputs.places import Folder, existing_place
from latent_encoder.storage.locations import shown
from models import EncodeRequest, Metadata, SuccessResponse

READS = 3
"""Attempts to read files that another process replaces meanwhile. It replaces them once, so the second attempt succeeds."""


@dataclass(frozen=True)
class StoredFiles:
    """The files that an earlier run left."""

    files: OutputFiles
    metadata: Metadata
    metadata_sha256: str
    """Checksum of the metadata file."""
    whole: frozenset[Path]
    """The files that are there and have the checksum that the metadata state."""

    @property
    def complete(self) -> bool:
        """True if latent and scaled image, which every response names, are whole."""
        return {self.files.latent, self.files.scaled_image} <= self.whole

    def are_of(self, request: EncodeRequest) -> bool:
        """Return whether they are not another request's. The metadata of older versions have no request id."""
        return self.metadata.request_id in (None, request.request_id)

    def are_of_record(self, origin: str | None) -> bool:
        """Return whether they were written for this Kafka record, and so may be those of a response that was sent."""
        return origin is not None and self.metadata.origin == origin and self.complete


def read_stored(files: OutputFiles, allowed: AllowedFolders) -> StoredFiles | None:
    """Return the stored files of these names, or None if their metadata cannot be read or are of another version.

    Raises:
        AccessDenied: the folder is none of those that are allowed.
        OutputDirNotWritable: the bucket cannot be read.
    """
    try:
        with existing_place(files.folder, allowed) as folder:
            return stored_in(folder, files)
    except OSError:
        return None


def stored_in(folder: Folder, files: OutputFiles) -> StoredFiles | None:
    """Return the stored files of these names in an open folder, or None if their metadata cannot be read.

    Another process may replace them meanwhile. It takes the metadata away first, so metadata that are still the same at the
    end belong to the files that were read.
    """
    for _ in range(READS):
        data = metadata_in(folder, files.metadata.name)
        if data is None:
            return None
        try:
            metadata = Metadata.model_validate_json(data)
        except ValidationError:
            return None
        stated = {getattr(files, name).name: sha256 for name, sha256 in metadata.sha256_by_file.items()}
        whole = frozenset(files.folder / name for name in folder.whole(stated))
        if metadata_in(folder, files.metadata.name) == data:
            return StoredFiles(files, metadata, checksum(data), whole)
    return None


def look(files: OutputFiles, allowed: AllowedFolders) -> tuple[str | None, frozenset[Owner]]:
    """Return the checksum of the metadata file, None if there is none, and the `owners_in` the folder.

    Raises:
        AccessDenied: the folder is none of those that are allowed.
        OutputDirNotWritable: the bucket cannot be read.
    """
    try:
        with existing_place(files.folder, allowed) as folder:
            found = folder.contents(files.metadata_of_all_formats)
            content = found.get(files.metadata.name)
            return checksum(content) if content is not None else None, owners_of(found)
    except OSError:
        return None, frozenset()


def success_response(
    request: EncodeRequest, files: OutputFiles, metadata: Metadata, present: Collection[Path]
) -> SuccessResponse:
    """Return the response to a request with these files. It names preview and roundtrip image only if they are `present`.

    Stored metadata may name the image by another path; the response has the path of this request.
    """
    return SuccessResponse(
        request_id=request.request_id,
        latent_file_path=str(files.latent),
        latent_shape=metadata.latent_shape,
        scaled_image_path=str(files.scaled_image),
        metadata=metadata.model_copy(update={"image_path": shown(request.image_path)}),
        preview_path=str(files.preview) if files.preview in present else None,
        roundtrip_path=str(files.roundtrip) if files.roundtrip in present else None,
    )
