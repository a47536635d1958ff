"""An open output folder, and the operations on the files in it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from errors import OutputDirNotWritable
from latent_encoder.access import AllowedFolders
from latent_encoder.outputs.checksums import checksum

NOT_SUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
"""Errors of a file system that lacks an operation: some on networks or in user space cannot flush a folder, or lock a file."""


@dataclass(frozen=True)
class OutputFolder:
    """An open folder. All operations use its descriptor, so a path that somebody changes meanwhile does not matter."""

    path: Path
    descriptor: int

    def create(self, name: str) -> BinaryIO:
        """Create a file for writing.

        Raises:
            OSError: the file exists already, or cannot be created.
        """
        return open(name, "xb", opener=self.open)

    def open(self, name: str, flags: int) -> int:
        """Open a file, and return its descriptor. Symlinks are not followed, and a named pipe is not waited for."""
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666, dir_fd=self.descriptor)

    def read(self, name: str) -> bytes:
        """Return the content of a regular file. Symlinks are not followed, and a named pipe is not waited for.

        Raises:
            OSError: it is no regular file, or cannot be read.
        """
        with open(name, "rb", opener=self.open) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "Not a regular file")
            return file.read()

    def contents(self, names: Sequence[str]) -> Mapping[str, bytes]:
        """Return the bytes of those of the files that are there and can be read."""
        found = {}
        for name in names:
            with suppress(OSError):
                found[name] = self.read(name)
        return found

    def whole(self, checksums: Mapping[str, str]) -> frozenset[str]:
        """Return the names of the files that have these checksums."""
        return frozenset(name for name, sha256 in checksums.items() if self._has_checksum(name, sha256))

    def _has_checksum(self, name: str, sha256: str) -> bool:
        try:
            return checksum(self.read(name)) == sha256
        except OSError:
            return False

    def has(self, name: str) -> bool:
        """Return whether there is an entry of that name.

        Raises:
            OSError: it cannot be looked up.
        """
        try:
            self.state(name)
        except FileNotFoundError:
            return False
        return True

    def names(self) -> Iterator[str]:
        """Yield the names of all entries of the folder."""
        with os.scandir(self.descriptor) as entries:
            yield from (entry.name for entry in entries)

    def has_folder(self, name: str) -> bool:
        """Return whether the name is that of a folder."""
        try:
            return stat.S_ISDIR(self.state(name).st_mode)
        except FileNotFoundError:
            return False

    def state(self, name: str) -> os.stat_result:
        """Return the state of an entry; a symlink is not followed."""
        return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)

    def link(self, name: str, new: str) -> None:
        """Give the file a second name."""
        os.link(name, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor, follow_symlinks=False)

    def rename(self, name: str, new: str) -> None:
        """Give the file another name. A file that had that name is replaced."""
        os.replace(name, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def remove(self, name: str) -> None:
        """Remove the file if it exists."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def flush(self) -> None:
        """Write renames to disk, so that they survive a power cut."""
        flush(self.descriptor)

    def free_bytes(self) -> int | None:
        """Return the free space in bytes, or None if the file system does not report it, as some in user space do not."""
        state = os.fstatvfs(self.descriptor)
        return state.f_bavail * state.f_frsize if state.f_blocks else None


def flush(descriptor: int) -> None:
    """Write a file or a folder to disk, if its file system can do that."""
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno not in NOT_SUPPORTED:
            raise


@contextmanager
def open_output_folder(path: Path, allowed: AllowedFolders) -> Iterator[OutputFolder]:
    """Open the folder for the duration of the context. It is created if it is missing.

    Raises:
        AccessDenied: it is in none of the allowed folders.
        OutputDirNotWritable: it cannot be created or opened.
    """
    with ExitStack() as stack:
        with reported(path):
            descriptor = stack.enter_context(allowed.open_folder(str(path), create=True))
        yield OutputFolder(path, descriptor)


@contextmanager
def reported(folder: Path) -> Iterator[None]:
    """Turn an OSError inside into `OutputDirNotWritable`, with the system's reason; the OSError is its cause."""
    try:
        yield
    except OSError as exc:
        raise OutputDirNotWritable(f"Cannot write to output folder: {folder} ({exc.strerror or exc})") from exc
