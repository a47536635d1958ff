"""The removal of expired output files: whole sets that this service wrote, and nothing else.

A set is a request's files in one folder: the latent in each format, the images, and the metadata of each latent. Its metadata
files identify it: names of ours, metadata that can be read, and for every other file the checksum that they state. So a file
that somebody else wrote, or changed, stays.

A set is removed under the lock of its name, so nobody publishes files of it meanwhile. The metadata go first: a reader never
finds metadata of files that are gone. A hidden journal has the names and checksums of the rest, so that the next sweep removes
it if this process is killed in between.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from errors import OutputDirNotWritable
from latent_encoder.access import READ_FOLDER, AllowedFolders
from latent_encoder.outputs.folder import OutputFolder
from latent_encoder.outputs.holds import is_held
from latent_encoder.outputs.locks import PREFIX, create_temporary, key_of, name_lock
from latent_encoder.outputs.names import LATENT_NAME, OutputFiles
from models import Metadata

JOURNAL = ".expired"
"""Ending of the hidden journal of a removal that has not ended."""

DEEPEST = 32
"""Most folders below each other that a sweep goes down: each takes an open file."""

LARGEST_METADATA = 1 << 20
"""Bytes. Ours have 2 kB, and the path of the image, which may have 4 kB with six bytes for a character."""

_JOURNAL = re.compile(rf"{re.escape(PREFIX)}[0-9a-f]{{16}}{re.escape(JOURNAL)}")


@dataclass
class Removed:
    """Counts of a sweep."""

    sets: int = 0
    files: int = 0
    bytes: int = 0
    failures: int = 0
    reason: str | None = None
    """The first failure."""

    def failed(self, path: Path, exc: OSError) -> None:
        """Count a path that could not be read or removed."""
        self.failures += 1
        self.reason = self.reason or f"{path}: {exc.strerror or exc}"


class Sweep:
    """One search for expired sets in a folder and the folders below it. Symlinks are not followed."""

    def __init__(self, ttl_s: float, most_sets: int, stopping: Callable[[], bool] = lambda: False) -> None:
        """Remove sets that are older than `ttl_s` seconds, at most `most_sets` of them."""
        self._ttl_s = ttl_s
        self._most_sets = most_sets
        self._stopping = stopping
        self.removed = Removed()

    @property
    def full(self) -> bool:
        """The limit of sets is reached; more may be expired."""
        return self.removed.sets >= self._most_sets

    def run(self, path: Path, allowed: AllowedFolders) -> None:
        """Sweep a folder; one that does not exist yet has nothing to remove.

        Raises:
            AccessDenied: it is in none of the allowed folders.
            OSError: it cannot be opened.
        """
        with suppress(FileNotFoundError), allowed.open_folder(str(path)) as descriptor:
            self._folder(OutputFolder(path, descriptor), DEEPEST)

    def _folder(self, folder: OutputFolder, levels: int) -> None:
        with os.scandir(folder.descriptor) as entries:
            for entry in entries:
                if self.full or self._stopping():
                    return
                try:
                    self._entry(folder, entry, levels)
                except OutputDirNotWritable:
                    continue  # somebody has the lock: the set is in use
                except OSError as exc:
                    self.removed.failed(folder.path / entry.name, exc)

    def _entry(self, folder: OutputFolder, entry: os.DirEntry[str], levels: int) -> None:
        if entry.is_dir(follow_symlinks=False):
            if levels and not entry.name.startswith("."):  # for example snapshots of a file server
                with _below(folder, entry.name) as below:
                    self._folder(below, levels - 1)
        elif _JOURNAL.fullmatch(entry.name):
            self._resume(folder, entry.name)
        elif (latent := _described_by(entry.name)) is not None and self._looks_old(entry):
            self._remove_if_expired(folder, OutputFiles.of(folder.path / latent))

    def _looks_old(self, entry: os.DirEntry[str]) -> bool:
        with suppress(FileNotFoundError):
            state = entry.stat(follow_symlinks=False)
            return stat.S_ISREG(state.st_mode) and state.st_mtime < time.time() - self._ttl_s
        return False

    def _remove_if_expired(self, folder: OutputFolder, files: OutputFiles) -> None:
        with name_lock(folder, files.shared_name, wait_s=0) as lock, ExitStack() as holds:
            # The lock's file is new, so it has the time of the file server, whose clock may differ from this machine's.
            now = min(time.time(), os.fstat(lock).st_mtime)
            sets = [_Described.read(folder, name, holds) for name in files.metadata_of_all_formats]
            described = [each for each in sets if each is not None]
            if not described or any(each.held or each.newest >= now - self._ttl_s for each in described):
                return
            stated = _checksums(files, described)
            _write_journal(folder, files, stated)
            for each in described:
                self._remove(folder, each.name)
            folder.flush()
            self._remove_rest(folder, files, stated)
            self.removed.sets += 1

    def _resume(self, folder: OutputFolder, journal: str) -> None:
        """End a removal whose process was killed."""
        found = _read_journal(folder, journal)
        if found is None:
            return
        files, stated = found
        with name_lock(folder, files.shared_name, wait_s=0):
            self._remove_rest(folder, files, stated)

    def _remove_rest(self, folder: OutputFolder, files: OutputFiles, stated: dict[str, list[str]]) -> None:
        """Remove the files that have a stated checksum and that no metadata describe, then the journal."""
        with ExitStack() as holds:
            sets = [_Described.read(folder, name, holds) for name in files.metadata_of_all_formats]
            claimed = _checksums(files, [each for each in sets if each is not None])
        for name in stated.keys() - claimed.keys():
            if _checksum(folder, name) in stated[name]:
                self._remove(folder, name)
        folder.remove(_journal_of(files))

    def _remove(self, folder: OutputFolder, name: str) -> None:
        size = folder.state(name).st_size
        folder.remove(name)
        self.removed.files += 1
        self.removed.bytes += size


@dataclass(frozen=True)
class _Described:
    """A metadata file of ours."""

    name: str
    metadata: Metadata
    newest: float
    """The later one of the file's last change and of the time that it states, in seconds since 1970."""
    held: bool

    @classmethod
    def read(cls, folder: OutputFolder, name: str, holds: ExitStack) -> _Described | None:
        """Return the metadata file of that name; None if there is none of ours. Nobody holds it until `holds` is closed."""
        try:
            file = holds.enter_context(os.fdopen(folder.open(name, os.O_RDONLY), "rb"))
        except OSError:
            return None
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode) or state.st_size > LARGEST_METADATA:
            return None
        held = is_held(file.fileno())
        try:
            metadata = Metadata.model_validate_json(file.read())
            stated = datetime.fromisoformat(metadata.timestamp).timestamp()
        except (OSError, ValueError, OverflowError):  # ValidationError is a ValueError
            return None
        return cls(name, metadata, max(state.st_mtime, stated), held)


@contextmanager
def _below(folder: OutputFolder, name: str) -> Iterator[OutputFolder]:
    """Open a folder inside another one. A symlink that has taken its place is not followed."""
    descriptor = os.open(name, READ_FOLDER | os.O_NOFOLLOW, dir_fd=folder.descriptor)
    try:
        yield OutputFolder(folder.path / name, descriptor)
    finally:
        os.close(descriptor)


def _checksums(files: OutputFiles, described: list[_Described]) -> dict[str, list[str]]:
    """Return the checksums that metadata state for each file: the formats of a latent share the images."""
    stated: dict[str, list[str]] = {}
    for each in described:
        own = OutputFiles.of(files.folder / each.name.removesuffix(".json"))
        for kind, sha256 in each.metadata.sha256_by_file.items():
            path: Path = getattr(own, kind)
            stated.setdefault(path.name, []).append(sha256)
    return stated


def _checksum(folder: OutputFolder, name: str) -> str | None:
    """Return the checksum of a regular file; None if there is none."""
    try:
        with open(name, "rb", opener=folder.open) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _described_by(name: str) -> str | None:
    """Return the name of the latent that a metadata file of that name describes; None if it is no such name."""
    latent = name.removesuffix(".json")
    return latent if latent != name and LATENT_NAME.fullmatch(latent) else None


def _journal_of(files: OutputFiles) -> str:
    return f"{PREFIX}{key_of(files.shared_name)}{JOURNAL}"


def _write_journal(folder: OutputFolder, files: OutputFiles, stated: dict[str, list[str]]) -> None:
    temporary, file = create_temporary(folder)
    try:
        with file:
            file.write(json.dumps({"latent": files.latent.name, "sha256": stated}).encode())
            folder.rename(temporary, _journal_of(files))
    except BaseException:
        folder.remove(temporary)
        raise


def _read_journal(folder: OutputFolder, journal: str) -> tuple[OutputFiles, dict[str, list[str]]] | None:
    """Return the set of a journal and the checksums of its files; None if it is not one of ours."""
    try:
        content: Any = json.loads(folder.read(journal))
        latent, stated = str(content["latent"]), dict(content["sha256"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    files = OutputFiles.of(folder.path / latent)
    named = {Path(name).stem for name in files.metadata_of_all_formats}
    named |= {files.scaled_image.name, files.preview.name, files.roundtrip.name}
    ours = LATENT_NAME.fullmatch(latent) and "/" not in latent and _journal_of(files) == journal
    return (files, stated) if ours and stated.keys() <= named else None
