"""The files of a response: their names, and their publication, whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from errors import InvalidRequest, OutputDirNotWritable, in_utf8
from latent_encoder.access import AllowedFolders, absolute
from latent_encoder.geometry import Size
from latent_encoder.outputs.latent_files import SUFFIXES
from models import IMAGE_FILES, FileFormat

LONGEST_FRAME = len("latent_") + len("_") + len(".safetensors.json")  # bytes around stem and request id in the longest name

FIXED_BYTES = 32_768  # more than the metadata (2 kB), the headers of the formats, and the unused rest of each last block

WRITING = threading.Lock()
"""Held from the first byte that is written until all files are published. Take it before ending the process at once."""


@dataclass(frozen=True)
class OutputFiles:
    """Absolute paths of the files of one request, all in one folder."""

    latent: Path
    scaled_image: Path
    metadata: Path
    preview: Path
    roundtrip: Path

    @property
    def folder(self) -> Path:
        return self.latent.parent

    @classmethod
    def of(cls, latent: Path) -> OutputFiles:
        """Return the paths of all files of a request by its latent's path: `latent_X.pt` has `preview_X.png`."""
        unique = latent.stem.removeprefix("latent_")
        images = {name: latent.with_name(f"{name}_{unique}.png") for name in IMAGE_FILES}
        return cls(latent=latent, metadata=latent.with_name(f"{latent.name}.json"), **images)


def output_files(output_dir: str, image_path: str, request_id: str, latent_format: FileFormat = "pt") -> OutputFiles:
    """Return the paths of a request's files: `latent_<stem>_<request_id>.pt`, with the suffix of the format, and the others.

    `stem` is the name of the image file without its suffix. Stem and request id are made safe by `safe_name`.

    Raises:
        InvalidRequest: the folder is relative, and the working folder has a name that no response can hold.
    """
    folder = absolute(output_dir)
    if (shown := in_utf8(str(folder))) != str(folder):
        raise InvalidRequest(
            f"Invalid request: output_dir: its absolute path is not UTF-8, so no response can hold it (got {shown}); "
            "give an absolute path, or start the service in another folder"
        )
    limit = (_longest_name(folder) - LONGEST_FRAME) // 2
    unique = f"{safe_name(Path(image_path).stem, limit)}_{safe_name(request_id, limit)}"
    return OutputFiles.of(folder / f"latent_{unique}{SUFFIXES[latent_format]}")


def safe_name(text: str, limit: int) -> str:
    """Return `text` as a part of a file name: ASCII letters, digits, `.`, `_` and `-`, at most `limit` (10 or more).

    If a character had to be replaced or cut off, 8 hexadecimal digits of the text's SHA-256 end the name. Without them `a/b`
    and `a b` would give the same name.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", text)
    if safe == text and len(text) <= limit:
        return text
    checksum = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{safe[: limit - 9]}-{checksum}"


def _longest_name(folder: Path) -> int:
    """Return the longest file name, in bytes, that the file system of the folder takes. The folder need not exist yet."""
    with _reported(folder):
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        return os.pathconf(existing, "PC_NAME_MAX")


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
        return open(name, "xb", opener=self._opener)

    def read(self, name: str) -> bytes:
        """Return the content of a regular file. Symlinks are not followed, and a named pipe is not waited for.

        Raises:
            OSError: it is no regular file, or cannot be read.
        """
        with open(name, "rb", opener=self._opener) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "Not a regular file")
            return file.read()

    def rename(self, name: str, new: str) -> None:
        """Give the file another name. A file that had that name is replaced."""
        os.replace(name, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def remove(self, name: str) -> None:
        """Remove the file if it exists."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def flush(self) -> None:
        """Write renames to disk, so that they survive a power cut."""
        os.fsync(self.descriptor)

    def free_bytes(self) -> int | None:
        """Return the free space in bytes, or None if the file system does not report it, as some in user space do not."""
        state = os.fstatvfs(self.descriptor)
        return state.f_bavail * state.f_frsize if state.f_blocks else None

    def _opener(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666, dir_fd=self.descriptor)


@contextmanager
def open_output_folder(path: Path, allowed: AllowedFolders) -> Iterator[OutputFolder]:
    """Open the folder for the duration of the context. It is created if it is missing.

    Raises:
        AccessDenied: it is in none of the allowed folders.
        OutputDirNotWritable: it cannot be created or opened.
    """
    with ExitStack() as stack:
        with _reported(path):
            descriptor = stack.enter_context(allowed.open_folder(str(path), create=True))
        yield OutputFolder(path, descriptor)


def prepare_output_folder(path: Path, allowed: AllowedFolders, needed: int) -> None:
    """Create the folder if it is missing, and check that files of `needed` bytes can be written there.

    Raises:
        AccessDenied: it is in none of the allowed folders.
        OutputDirNotWritable: the files cannot be written.
    """
    with open_output_folder(path, allowed) as folder, _reported(path):
        probe = _temporary_name()
        folder.create(probe).close()
        folder.remove(probe)
        free = folder.free_bytes()
    if free is not None and free < needed:
        raise OutputDirNotWritable(
            f"Cannot write to output folder: {path} (the files may need {_megabytes(needed)}, {_megabytes(free)} are free)"
        )


def space_needed(scaled: Size, factor: int, channels: int, images: int = 1) -> int:
    """Return the most bytes that a request's files can take.

    They are `images` PNGs of the scaled size that do not compress, and a float32 latent with `channels` channels and a cell
    for `factor` pixels a side. Deflate adds under 1 % to bytes that do not compress.
    """
    latent = 4 * channels * (scaled.width // factor) * (scaled.height // factor)
    scanlines = images * (1 + 3 * scaled.width) * scaled.height
    return latent + scanlines + scanlines // 100 + FIXED_BYTES


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


class StagedFiles:
    """Files that are written under temporary names, and get their own names together when `publish` is called.

    Each file is flushed to disk before it is renamed. `publish` first removes an earlier file with the name of the last one.
    Then it renames the files in the order in which they were added. So if the last file is there, all are there and belong
    together. The end of the context removes files that were not published.

    Raises:
        OutputDirNotWritable: the file system refuses; each method may raise it.
    """

    def __init__(self, folder: OutputFolder) -> None:
        self._folder = folder
        self._staged: list[tuple[str, str]] = []
        self._obsolete: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        for temporary, _ in self._staged:
            self._folder.remove(temporary)

    def add(self, final: str, data: bytes) -> None:
        """Write a file whose name will be `final`."""
        temporary = _temporary_name()
        with _reported(self._folder.path), self._folder.create(temporary) as file:
            self._staged.append((temporary, final))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def add_or_remove(self, final: str, data: bytes | None) -> None:
        """Write a file whose name will be `final`. Without data, let `publish` remove such a file of an earlier run."""
        if data is not None:
            self.add(final, data)
        else:
            self._obsolete.append(final)

    def publish(self) -> None:
        """Give all files their names."""
        with _reported(self._folder.path):
            for name in (self._staged[-1][1], *self._obsolete):
                self._folder.remove(name)
            for temporary, final in self._staged:
                self._folder.rename(temporary, final)
            self._folder.flush()
        self._staged.clear()


def _temporary_name() -> str:
    return f".latent-encoder-{secrets.token_hex(8)}.tmp"


@contextmanager
def _reported(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise OutputDirNotWritable(f"Cannot write to output folder: {folder} ({exc.strerror})") from exc
