"""The files of an answer: how they are named, and how they appear, whole or not at all."""

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

from errors import OutputDirNotWritable
from latent_encoder.access import AllowedFolders, absolute
from latent_encoder.geometry import Size
from latent_encoder.outputs.latent_files import SUFFIXES
from models import FileFormat

LONGEST_FRAME = len("latent_") + len("_") + len(".safetensors.json")  # what stands around stem and request id

FIXED_BYTES = 32_768  # more than the metadata, what the formats add, and the rest of each file's last block

# Held from the first byte that is written until all is published: whoever ends the process at once takes it first.
WRITING = threading.Lock()


@dataclass(frozen=True)
class OutputFiles:
    """Where the files of one request go, all in one folder; the paths are absolute."""

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
        """The files that belong to a latent file, by its name: `latent_X.pt` has `preview_X.png`."""
        unique = latent.stem.removeprefix("latent_")
        pictures = {name: latent.with_name(f"{name}_{unique}.png") for name in ("scaled_image", "preview", "roundtrip")}
        return cls(latent=latent, metadata=latent.with_name(f"{latent.name}.json"), **pictures)


def output_files(output_dir: str, image_path: str, request_id: str, latent_format: FileFormat = "pt") -> OutputFiles:
    """The files' names: `latent_<stem>_<request_id>.pt` (or its format's own suffix) and its siblings.

    `stem` is that of the image's name. Stem and request id are made safe by `safe_name`.
    """
    folder = absolute(output_dir)
    limit = (_longest_name(folder) - LONGEST_FRAME) // 2
    unique = f"{safe_name(Path(image_path).stem, limit)}_{safe_name(request_id, limit)}"
    return OutputFiles.of(folder / f"latent_{unique}{SUFFIXES[latent_format]}")


def safe_name(text: str, limit: int) -> str:
    """`text` as a part of a file name: ASCII letters, digits, `.`, `_` and `-`, at most `limit` (10 or more) of them.

    Where something had to be changed, 8 hexadecimal digits of the text's SHA-256 at the end keep it apart from others.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", text)
    if safe == text and len(text) <= limit:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{safe[: limit - 9]}-{digest}"


def _longest_name(folder: Path) -> int:
    """The longest file name, in bytes, that the file system of the (perhaps not yet existing) folder takes."""
    with _reported(folder):
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        return os.pathconf(existing, "PC_NAME_MAX")


@dataclass(frozen=True)
class OutputFolder:
    """A folder that is open. What is done in it goes through its descriptor, wherever its path leads by now."""

    path: Path
    descriptor: int

    def create(self, name: str) -> BinaryIO:
        """A new file, to be written.

        Raises:
            OSError: it is there already, or cannot be made.
        """
        return open(name, "xb", opener=self._opener)

    def read(self, name: str) -> bytes:
        """What is in the file, which has to be a regular one itself: no symlink, nothing that would be waited for.

        Raises:
            OSError: it is not, or cannot be read.
        """
        with open(name, "rb", opener=self._opener) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "Not a regular file")
            return file.read()

    def rename(self, name: str, new: str) -> None:
        """Give the file another name; what had that name is gone."""
        os.replace(name, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def remove(self, name: str) -> None:
        """Remove the file where it is there."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def flush(self) -> None:
        """Make what was renamed survive a power cut."""
        os.fsync(self.descriptor)

    def free_bytes(self) -> int | None:
        """How much may be written; None where the file system does not say, as some in user space do not."""
        state = os.fstatvfs(self.descriptor)
        return state.f_bavail * state.f_frsize if state.f_blocks else None

    def _opener(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666, dir_fd=self.descriptor)


@contextmanager
def open_output_folder(path: Path, allowed: AllowedFolders) -> Iterator[OutputFolder]:
    """The folder, made where it is missing, open as long as the context lasts.

    Raises:
        AccessDenied: it is in none of the folders that are allowed.
        OutputDirNotWritable: it cannot be made or opened.
    """
    with ExitStack() as stack:
        with _reported(path):
            descriptor = stack.enter_context(allowed.open_folder(str(path), create=True))
        yield OutputFolder(path, descriptor)


def prepare_output_dir(path: Path, allowed: AllowedFolders, needed: int) -> None:
    """Make the folder where it is missing, and make sure that files of so many bytes can be written in it.

    Raises:
        AccessDenied: it is in none of the folders that are allowed.
        OutputDirNotWritable: they cannot.
    """
    with open_output_folder(path, allowed) as folder, _reported(path):
        probe = _temporary_name()
        folder.create(probe).close()
        folder.remove(probe)
        free = folder.free_bytes()
    if free is not None and free < needed:
        raise OutputDirNotWritable(
            f"Cannot write to output directory: {path} (the files may need {_megabytes(needed)}, {_megabytes(free)} are free)"
        )


def space_needed(scaled: Size, factor: int, channels: int, pictures: int = 1) -> int:
    """How many bytes the files take at most: of `pictures` that do not compress, and of a latent with so many `channels`."""
    latent = 4 * channels * (scaled.width // factor) * (scaled.height // factor)
    scanlines = pictures * (1 + 3 * scaled.width) * scaled.height
    return latent + scanlines + scanlines // 100 + FIXED_BYTES


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


class StagedFiles:
    """Files that are written under temporary names first, and appear together under their own when they are `publish`ed.

    Each is flushed to disk before it is renamed, and they are renamed in the order in which they were added, after the
    last one's predecessor was removed: where the last one is there, all are, and they belong together. What was not
    published is removed at the end of the context.

    Raises:
        OutputDirNotWritable: from each method, where the file system refuses.
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
        """Write a file that gets the name `final`."""
        temporary = _temporary_name()
        with _reported(self._folder.path), self._folder.create(temporary) as file:
            self._staged.append((temporary, final))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def add_or_remove(self, final: str, data: bytes | None) -> None:
        """Write a file that gets that name; or have an earlier run's removed, which does not belong to those that appear."""
        if data is not None:
            self.add(final, data)
        else:
            self._obsolete.append(final)

    def publish(self) -> None:
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
        raise OutputDirNotWritable(f"Cannot write to output directory: {folder} ({exc.strerror})") from exc
