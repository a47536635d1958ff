"""The success response of a request: for files that were just written, and for whole files of an earlier run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
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


class Found:
    """The earlier files of a request. Each is looked up once, as soon as it is asked for.

    Raises, in each property:
        AccessDenied: the folder is none of those that are allowed.
        OutputDirNotWritable: the bucket cannot be read.
    """

    def __init__(self, files: OutputFiles, allowed: AllowedFolders, *, absent: bool = False) -> None:
        """`absent` says that there are no metadata of these names, so that nothing is looked up."""
        self.files = files
        self._allowed = allowed
        self._metadata: dict[str, bytes | None] = dict.fromkeys(files.metadata_of_all_formats) if absent else {}
        """The contents of the metadata files that were read, by name; None for each that is not there."""

    @cached_property
    def stored(self) -> StoredFiles | None:
        """The stored files of these names; None if their metadata cannot be read or are of another version."""
        name = self.files.metadata.name
        if self._metadata.get(name, b"") is None:
            return None
        try:
            with existing_place(self.files.folder, self._allowed) as folder:
                data = self._metadata[name] = metadata_in(folder, name)
                return stored_in(folder, self.files, data)
        except OSError:
            return None

    @cached_property
    def owners(self) -> frozenset[Owner]:
        """The owners in the metadata files of these names, in any format of the latent and of any version."""
        return owners_of(self._read(self.files.metadata_of_all_formats))

    @cached_property
    def replaceable(self) -> str | None:
        """Checksum of the metadata file; None if there is none."""
        data = self._read([self.files.metadata.name]).get(self.files.metadata.name)
        return checksum(data) if data is not None else None

    def _read(self, names: Sequence[str]) -> Mapping[str, bytes]:
        """Return the contents of the metadata files that are there. Those that were not read yet are read together."""
        missing = [name for name in names if name not in self._metadata]
        found: Mapping[str, bytes] = {}
        if missing:
            with suppress(OSError), existing_place(self.files.folder, self._allowed) as folder:
                found = folder.contents(missing)
        self._metadata |= {name: found.get(name) for name in missing}
        return {name: data for name in names if (data := self._metadata[name]) is not None}


def stored_in(folder: Folder, files: OutputFiles, metadata: bytes | None) -> StoredFiles | None:
    """Return the stored files of these names in an open folder, or None if their metadata cannot be read.

    Another process may replace them meanwhile. It takes the metadata away first, so metadata that are still the same at the
    end belong to the files that were read. `metadata` are the bytes of their file, just read; None if there is none.
    """
    for _ in range(READS):
        described = parsed(metadata) if metadata is not None else None
        if metadata is None or described is None:
            return None
        stated = {getattr(files, name).name: sha256 for name, sha256 in described.sha256_by_file.items()}
        whole = frozenset(files.folder / name for name in folder.whole(stated))
        now = metadata_in(folder, files.metadata.name)
        if now == metadata:
            return StoredFiles(files, described, checksum(metadata), whole)
        metadata = now
    return None


def parsed(metadata: bytes) -> Metadata | None:
    """Return the metadata in a file; None if they cannot be read or are of another version."""
    try:
        return Metadata.model_validate_json(metadata)
    except ValidationError:
        return None


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
