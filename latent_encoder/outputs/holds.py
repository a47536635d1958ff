"""Keeping stored files from the sweep that removes expired ones: by their age, and by a lock while a response waits.

The age counts from the metadata file's last change, so a stored response that is given again sets that to now. A lock that is
shared (flock, LOCK_SH) on the metadata file keeps the set, however old it is. It ends with its process. Other programs can
take it too.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from typing import BinaryIO

from pydantic import ValidationError

from errors import AccessDenied
from latent_encoder.access import AllowedFolders, place_of
from latent_encoder.outputs.folder import OutputFolder
from latent_encoder.outputs.locks import name_lock
from latent_encoder.outputs.names import OutputFiles
from latent_encoder.storage.locations import ObjectPath
from models import Metadata, SuccessResponse

ATTEMPTS = 100
PAUSE_S = 0.01
"""Attempts to hold files, and the seconds between two: a sweep looks at the age of young files for a few milliseconds."""


def renewed(files: OutputFiles, metadata: Metadata, allowed: AllowedFolders) -> bool:
    """Make stored files as young as new ones, and return whether they are still those of the metadata.

    Files in a folder that cannot be written to stay as they are: no sweep removes them either.

    Raises:
        AccessDenied: the folder is none of those that are allowed.
        OutputDirNotWritable: another process has been writing or removing these files for long.
    """
    if isinstance(files.folder, ObjectPath):
        return True  # no sweep looks at buckets
    try:
        with allowed.open_folder(str(files.folder)) as descriptor:
            folder = OutputFolder(files.folder, descriptor)
            with name_lock(folder, files.shared_name):
                return _renewed(folder, files.metadata.name, metadata)
    except OSError:
        return True


def _renewed(folder: OutputFolder, name: str, expected: Metadata) -> bool:
    with suppress(OSError):  # another user's file, or it is gone
        os.utime(name, dir_fd=folder.descriptor, follow_symlinks=False)
    try:
        return Metadata.model_validate_json(folder.read(name)) == expected
    except (FileNotFoundError, ValidationError):
        return False


def hold(response: SuccessResponse, allowed: AllowedFolders) -> BinaryIO | None:
    """Keep the files of a response until the returned file is closed; None if they cannot be kept."""
    files = OutputFiles.of(place_of(response.latent_file_path))
    if isinstance(files.folder, ObjectPath):
        return None  # no sweep looks at buckets
    try:
        with allowed.open_folder(str(files.folder)) as descriptor:
            file = os.fdopen(OutputFolder(files.folder, descriptor).open(files.metadata.name, os.O_RDONLY), "rb")
    except (OSError, AccessDenied):
        return None
    for _ in range(ATTEMPTS):
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # a sweep looks at its age
            time.sleep(PAUSE_S)
            continue
        except OSError:  # the file system has no locks
            pass
        break
    return file


def is_held(descriptor: int) -> bool:
    """Return whether somebody holds the open metadata file. If nobody does, nobody can until the descriptor is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    return False
