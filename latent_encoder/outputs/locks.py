"""Locks in an output folder: one process at a time publishes files of a name, and abandoned files are told from those in use.

A lock is one of the system (flock), so it ends with its process. A name's lock is held on a hidden file beside the outputs,
which is removed with the lock. Each file under a temporary name is locked by its writer.

On NFS the locks hold between hosts, unless the mount says otherwise (`nolock`, `local_lock`). A file system without locks is
used without them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from errors import OutputDirNotWritable
from latent_encoder.outputs.folder import OutputFolder
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder")

PREFIX = ".latent-encoder-"
TEMPORARY, REPLACED, LOCK = ".tmp", ".old", ".lock"
"""Endings of our hidden files: not yet published, replaced by a publication that has not ended, and held as a lock."""

WAIT_S = 10.0
"""Longest wait for a name's lock, in seconds. A publication takes milliseconds, some seconds on a slow disk; a process that
holds the lock for longer was stopped, and the request is tried again later.
"""
POLL_S = 0.01
"""Seconds between two attempts: shorter than most publications."""


@contextmanager
def name_lock(folder: OutputFolder, name: str, wait_s: float = WAIT_S) -> Iterator[int]:
    """Hold the lock of a name in the folder as long as the context lasts, and yield its open file.

    Raises:
        OutputDirNotWritable: another process holds it for longer than `wait_s`.
        OSError: the file of the lock cannot be made.
    """
    file = f"{PREFIX}{key_of(name)}{LOCK}"
    descriptor = _acquire(folder, file, time.monotonic() + wait_s)
    if descriptor is None:
        raise OutputDirNotWritable(
            f"Cannot write to output folder: {folder.path} (for {wait_s:g} s another process has been writing {name}; "
            "end that process if it was stopped)"
        )
    try:
        yield descriptor
    finally:
        with suppress(OSError):
            folder.remove(file)
        release(descriptor)


def key_of(name: str) -> str:
    """Return the part of our hidden files' names that stands for a name."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def _acquire(folder: OutputFolder, file: str, deadline: float) -> int | None:
    """Return the descriptor that holds the lock of a file, which is made if absent; None if the deadline has passed."""
    while True:
        descriptor = _open(folder, file)
        if _lock(descriptor) and is_there(folder, file, descriptor):
            return descriptor
        os.close(descriptor)
        if time.monotonic() >= deadline:
            return None
        time.sleep(POLL_S)


def _open(folder: OutputFolder, file: str) -> int:
    try:
        return folder.open(file, os.O_RDWR | os.O_CREAT)
    except PermissionError:  # another user's file: locking it takes no right to write, except on NFS
        return folder.open(file, os.O_RDONLY)


def _lock(descriptor: int) -> bool:
    """Lock an open file unless another process holds it, and return whether that worked. Without locks it always works."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as exc:
        log.debug("the output folder has no locks", reason=exc.strerror)
    return True


def release(descriptor: int) -> None:
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing would not end it if a child process has inherited the descriptor
    os.close(descriptor)


def is_there(folder: OutputFolder, file: str, descriptor: int) -> bool:
    """Return whether the open file still has that name. It is opened anew, because NFS clients keep attributes for a while."""
    try:
        again = folder.open(file, os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.path.samestat(os.fstat(again), os.fstat(descriptor))
    finally:
        os.close(again)


def create_temporary(folder: OutputFolder) -> tuple[str, BinaryIO]:
    """Create a file under a new temporary name, and return both; it is locked as long as it is open."""
    while True:
        name = f"{PREFIX}{secrets.token_hex(8)}{TEMPORARY}"
        file = folder.create(name)
        if _lock(file.fileno()) and os.fstat(file.fileno()).st_nlink:
            return name, file
        file.close()  # a process that starts has just taken it for abandoned
