"""The publication of files in an output folder: together, whole or not at all."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, TypeVar

from errors import OutputDirNotWritable
from latent_encoder.access import AllowedFolders
from latent_encoder.geometry import Size
from latent_encoder.outputs.folder import OutputFolder, flush, open_output_folder, reported
from latent_encoder.outputs.locks import create_temporary, key_of, name_lock
from latent_encoder.outputs.replacing import Replacement
from latent_encoder.outputs.staging import Staging

FIXED_BYTES = 49_152  # more than metadata without the path (3 kB; 12 kB with 128 channels), headers, rests of last blocks

BYTES_OF_A_CHARACTER = 20
"""The most bytes of one character of a path: 14 in a header, where JSON stands in JSON, and 6 in the metadata file."""

R = TypeVar("R")


class Writers:
    """The writers of this process: contexts that last from the first byte until all files are published."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0
        self._ended = False

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._ended)
            self._count += 1

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def end(self, wait_s: float | None = None) -> None:
        """Wait for all writers, `wait_s` seconds at most, and let no other begin. The process has to end right afterwards."""
        with self._changed:
            self._ended = True
            self._changed.wait_for(lambda: self._count == 0, wait_s)


WRITING = Writers()
"""The writers of files on disk that the process waits for before it ends at once."""

PUBLISHING = Writers()
"""The writers of files in buckets that the process waits for, PUBLISHING_S at most, before it ends at once."""

PUBLISHING_S = 8.0
"""Seconds. A publication takes one or two, and minutes if the storage does not respond. One that is cut off leaves a claim and
files without metadata. Docker waits for 10 s before it kills a container."""


def end_writers() -> None:
    """Wait for the writers, and let no other begin. The process has to end right afterwards."""
    WRITING.end()
    PUBLISHING.end(PUBLISHING_S)


def prepare_output_folder(path: Path, allowed: AllowedFolders, needed: int) -> None:
    """Create the folder if it is missing, and check that files of `needed` bytes can be written there.

    Raises:
        AccessDenied: it is in none of the allowed folders.
        OutputDirNotWritable: the files cannot be written.
    """
    with open_output_folder(path, allowed) as folder, reported(path):
        probe, file = create_temporary(folder)
        file.close()
        folder.remove(probe)
        free = folder.free_bytes()
    if free is not None and free < needed:
        raise OutputDirNotWritable(
            f"Cannot write to output folder: {path} (the files may need {_megabytes(needed)}, {_megabytes(free)} are free)"
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def space_needed(scaled: Size, factor: int, channels: int, images: int = 1, image_path: str = "") -> int:
    """Return the most bytes that a request's files can take.

    They are `images` PNGs of the scaled size that do not compress, and a float32 latent with `channels` channels and a cell
    for `factor` pixels a side. Deflate adds under 1 % to bytes that do not compress. The metadata and the latent's header have
    the `image_path`.
    """
    latent = 4 * channels * (scaled.width // factor) * (scaled.height // factor)
    scanlines = images * (1 + 3 * scaled.width) * scaled.height
    return latent + scanlines + scanlines // 100 + FIXED_BYTES + BYTES_OF_A_CHARACTER * len(image_path)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


class StagedFiles(Staging):
    """Files that are written under temporary names, and get their own names together when `publish` is called.

    Each file is flushed to disk before it is renamed. `publish` first removes an earlier file with the name of the last one.
    Then it renames the files in the order in which they were added. So if the last file is there, all are there and belong
    together. The end of the context removes files that were not published.

    Raises:
        OutputDirNotWritable: the file system refuses; each method may raise it.
    """

    def __init__(self, folder: OutputFolder, shared_name: str = "") -> None:
        """`shared_name` is one for all sets of files that have a name in common, by default that of the last file."""
        super().__init__(shared_name)
        self.folder = folder
        self._staged: list[tuple[str, str]] = []
        self._open: list[BinaryIO] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        for temporary, _ in self._staged:
            with suppress(OSError):  # a process that starts later removes it
                self.folder.remove(temporary)
        for file in self._open:
            with suppress(OSError):  # data that the full disk did not take
                file.close()

    def add(self, final: str, data: bytes) -> None:
        """Write a file whose name will be `final`."""
        self.add_parts(final, (data,))

    def add_parts(self, final: str, parts: Iterable[bytes]) -> None:
        """Write a file whose name will be `final`, part by part as they are made."""
        with reported(self.folder.path):
            temporary, file = create_temporary(self.folder)
            self._open.append(file)  # other processes take it for abandoned as soon as it is closed
            self._staged.append((temporary, final))
            for part in parts:
                file.write(part)
            file.flush()
            flush(file.fileno())

    def publish(self, instead: Callable[[], R | None] = lambda: None, *, adding: bool = False) -> R | None:
        """Give all files their names, or none, while no other process does so; former files of these names are replaced.

        If `instead` has a result, return it and publish nothing. It is called when no other process can publish. With
        `adding`, the last file describes others too, which stay: the former one is there until the new one replaces it.

        Raises:
            OutputDirNotWritable: the files cannot be published. Each name has its former file, or the text tells otherwise.
        """
        shared = self._shared_name or self._staged[-1][1]
        with reported(self.folder.path), name_lock(self.folder, shared):
            found = instead()
            if found is None:
                self._replace(Replacement(self.folder, key_of(shared)), adding=adding)
        return found

    def _replace(self, replacement: Replacement, *, adding: bool) -> None:
        replacement.check([*(final for _, final in self._staged), *self._outdated, *self._obsolete])
        try:
            for name in (*([] if adding else [self._staged[-1][1]]), *self._outdated, *self._obsolete):
                replacement.remove(name)
            for temporary, final in self._staged:
                replacement.place(temporary, final)
            self.folder.flush()
        except BaseException as exc:
            self._undo(replacement, exc)
            raise
        self._staged.clear()
        with suppress(OSError):  # a process that starts later removes them
            replacement.finish()

    def _undo(self, replacement: Replacement, cause: BaseException) -> None:
        try:
            replacement.undo()
        except OSError as exc:
            raise OutputDirNotWritable(
                f"Cannot write to output folder: {self.folder.path} ({_reason(cause)}; files of this attempt stay there, "
                f"because the former ones cannot be restored: {_reason(exc)})"
            ) from cause


def _reason(exc: BaseException) -> str:
    return getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
