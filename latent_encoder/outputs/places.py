"""Output folders on disk and in buckets: one of the two by the place's kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latent_encoder.access import AllowedFolders
from latent_encoder.outputs.bucket import BucketFolder, open_bucket_folder
from latent_encoder.outputs.files import StagedFiles, prepare_output_folder
from latent_encoder.outputs.folder import OutputFolder, open_output_folder
from latent_encoder.outputs.objects import StagedObjects
from latent_encoder.storage.locations import ObjectPath

Folder = OutputFolder | BucketFolder


@contextmanager
def open_place(place: Path, allowed: AllowedFolders) -> Iterator[Folder]:
    """Open a folder for the duration of the context. It is created if it is missing.

    Raises:
        AccessDenied: it is in none of the allowed places.
        OutputDirNotWritable: it cannot be created or opened.
    """
    if isinstance(place, ObjectPath):
        yield open_bucket_folder(place, allowed)
        return
    with open_output_folder(place, allowed) as folder:
        yield folder


@contextmanager
def existing_place(place: Path, allowed: AllowedFolders) -> Iterator[Folder]:
    """Open a folder for the duration of the context.

    Raises:
        AccessDenied: it is in none of the allowed places.
        OSError: it does not exist, or cannot be opened.
        OutputDirNotWritable: the environment lacks a setting for this storage.
    """
    if isinstance(place, ObjectPath):
        yield open_bucket_folder(place, allowed)
        return
    with allowed.open_folder(str(place)) as descriptor:
        yield OutputFolder(place, descriptor)


def prepare_place(place: Path, allowed: AllowedFolders, needed: int) -> None:
    """Check that files of `needed` bytes can be written there. A bucket has room, and shows its faults at the first call.

    Raises:
        AccessDenied: it is in none of the allowed places.
        OutputDirNotWritable: the files cannot be written.
    """
    if isinstance(place, ObjectPath):
        open_bucket_folder(place, allowed)
    else:
        prepare_output_folder(place, allowed, needed)


def staged_in(folder: Folder, shared_name: str) -> StagedFiles | StagedObjects:
    """Return an empty set of files that will be published together in that folder."""
    return StagedObjects(folder, shared_name) if isinstance(folder, BucketFolder) else StagedFiles(folder, shared_name)
