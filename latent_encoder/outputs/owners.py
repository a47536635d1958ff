"""The requests that files in an output folder belong to, by the metadata beside them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from errors import InvalidRequest
from latent_encoder.outputs.names import OutputFiles
from latent_encoder.outputs.places import Folder

LONGEST_SHOWN = 80  # characters of an id or a path in an error message, so that it stays on one line


@dataclass(frozen=True)
class Owner:
    """The request and the image that a metadata file names; None for each that it lacks."""

    request_id: str | None
    source_id: str | None
    image_sha256: str | None
    image_path: str | None

    def has_other_image(self, source_id: str | None, image_sha256: str | None) -> bool:
        """Return whether the files are those of an image at another place and of other content."""
        return None not in (source_id, self.source_id) and source_id != self.source_id and image_sha256 != self.image_sha256


def metadata_in(folder: Folder, name: str) -> bytes | None:
    """Return the content of a metadata file, or None if it cannot be read."""
    try:
        return folder.read(name)
    except OSError:
        return None


def owner_in(folder: Folder, name: str) -> Owner | None:
    """Return the owner in a metadata file of any version, or None if there is none."""
    return _owner(metadata_in(folder, name) or b"null")


def _owner(content: bytes) -> Owner | None:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    texts = {key: value for key, value in fields.items() if isinstance(value, str)}
    return Owner(*(texts.get(key) for key in ("request_id", "source_id", "image_sha256", "image_path")))


def owners_in(folder: Folder, files: OutputFiles) -> frozenset[Owner]:
    """Return the owners in the metadata files of these names, in any format of the latent and of any version."""
    return owners_of(folder.contents(files.metadata_of_all_formats))


def owners_of(metadata: Mapping[str, bytes]) -> frozenset[Owner]:
    """Return the owners in the contents of metadata files."""
    owners = map(_owner, metadata.values())
    return frozenset(owner for owner in owners if owner is not None)


def refuse_files_of_another(
    files: OutputFiles, owners: Collection[Owner], request_id: str, source_id: str | None, image_sha256: str
) -> None:
    """Refuse a request whose files would replace those of another request id, or of another image.

    Ids with the same file names are rare: two that differ only in case, on a file system that ignores it, or two with the same
    checksum. Images at the same place below two folders have the same id. `owners` are those in the metadata files.

    Raises:
        InvalidRequest: one of them is another.
    """
    belong = f"Invalid request: request_id: {files.latent} and the files beside it belong to"
    remedy = "and would be replaced; use another request_id or output_dir, or move those files"
    if others := sorted({owner.request_id for owner in owners if owner.request_id is not None} - {request_id}):
        raise InvalidRequest(f"{belong} the request {others[0][:LONGEST_SHOWN]!r}, {remedy}")
    if images := sorted(str(owner.image_path) for owner in owners if owner.has_other_image(source_id, image_sha256)):
        raise InvalidRequest(f"{belong} another image, {images[0][:LONGEST_SHOWN]!r}, {remedy}")
