"""The hidden files that killed processes left in an output folder, and their removal."""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections import OrderedDict
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from errors import AccessDenied, InvalidRequest, OutputDirNotWritable
from latent_encoder.access import AllowedFolders
from latent_encoder.outputs.bucket import BucketFolder, open_bucket_folder, reported
from latent_encoder.outputs.claims import Claim, seen_since
from latent_encoder.outputs.folder import OutputFolder
from latent_encoder.outputs.locks import LOCK, PREFIX, REPLACED, TEMPORARY, is_there, release
from latent_encoder.storage.locations import ObjectPath
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder")

HIDDEN = re.compile(rf"{re.escape(PREFIX)}(?P<key>[0-9a-f]{{16}})(-\d+)?(?P<ending>{TEMPORARY}|{REPLACED}|{LOCK})")

MOST_FOLDERS = 1024
"""Folders that are remembered as looked at, about 200 bytes each. One that was forgotten is looked at again."""

ABANDONED_S = 86_400.0
"""Age in seconds, one day, at which a hidden file counts as abandoned on a file system that has no locks."""


class Leftovers:
    """The removal of left-over files, once in each folder. A second removal in another thread does no harm."""

    def __init__(self, allowed: AllowedFolders) -> None:
        self._allowed = allowed
        self._looked_at: OrderedDict[Path, None] = OrderedDict()

    def remove(self, path: Path) -> None:
        """Remove the left-over files of a folder that this process has not looked at yet. They stay if that fails."""
        if path in self._looked_at:
            return
        self._looked_at[path] = None
        if len(self._looked_at) > MOST_FOLDERS:
            self._looked_at.popitem(last=False)
        if isinstance(path, ObjectPath):
            with suppress(OutputDirNotWritable, AccessDenied, InvalidRequest):
                remove_abandoned_claims(open_bucket_folder(path, self._allowed))
            return
        with suppress(OSError, AccessDenied), self._allowed.open_folder(str(path)) as descriptor:
            remove_abandoned(OutputFolder(path, descriptor))


def remove_abandoned(folder: OutputFolder) -> None:
    """Remove the hidden files that killed processes left in the folder. Those that a process uses stay."""
    found = [hidden for name in folder.names() if (hidden := HIDDEN.fullmatch(name))]
    removed = [hidden for hidden in found if _removed(folder, hidden)]
    if removed:
        log.info("removed the temporary files of a process that was killed", folder=str(folder.path), files=len(removed))


def remove_abandoned_claims(folder: BucketFolder) -> None:
    """Remove the claims that killed processes left in a folder of a bucket, and that nobody has taken over for a day."""
    with reported(folder.path):
        found = list(folder.store.names_from(folder.path.key, PREFIX))
    for each in found:
        seen_since(folder, each.name, each.e_tag)
    old = [each.name for each in found if (datetime.now(UTC) - each.changed).total_seconds() > ABANDONED_S]
    for name in old:
        if hidden := HIDDEN.fullmatch(name):
            Claim(folder, hidden["key"]).clear()
    if old:
        log.info("removed the claims of processes that were killed", folder=str(folder.path), files=len(old))


def _removed(folder: OutputFolder, hidden: re.Match[str]) -> bool:
    """Remove a hidden file if no process uses it, and return whether it was removed."""
    name = hidden[0]
    lock = f"{PREFIX}{hidden['key']}{LOCK}" if hidden["ending"] == REPLACED else name
    try:
        descriptor = folder.open(lock, os.O_RDWR | (os.O_CREAT if lock != name else 0))
    except OSError:  # it is gone, or another user's
        return False
    try:
        if not _is_abandoned(folder, name, descriptor) or not is_there(folder, lock, descriptor):
            return False
        folder.remove(name)
        folder.remove(lock)
    except OSError:
        return False
    finally:
        release(descriptor)
    return True


def _is_abandoned(folder: OutputFolder, name: str, descriptor: int) -> bool:
    """Return whether no process has the lock that is open; without locks, whether the file's last change is long ago."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return time.time() - folder.state(name).st_ctime > ABANDONED_S
    return True
