"""The files of an answer: how they are named, and how they appear, whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from isal import isal_zlib

from errors import OutputDirNotWritable

LONGEST_FRAME = len("scaled_image_") + len("_") + len(".png")  # what stands around stem and request id

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_FILTER_UP = 2  # each row holds the differences from the one above
DEFLATE_LEVEL = 1

# Held from the first byte that is written until all is published: whoever ends the process at once takes it first.
WRITING = threading.Lock()


@dataclass(frozen=True)
class OutputFiles:
    """Where the files of one request go, all in one folder; the paths are absolute."""

    latent: Path
    scaled_image: Path
    metadata: Path


def output_files(output_dir: str, image_path: str, request_id: str) -> OutputFiles:
    """The files' names: `latent_<stem>_<request_id>.pt` and its siblings.

    `stem` is that of the image's name. Stem and request id are made safe by `safe_name`.
    """
    folder = Path(output_dir).absolute()
    limit = (_longest_name(folder) - LONGEST_FRAME) // 2
    unique = f"{safe_name(Path(image_path).stem, limit)}_{safe_name(request_id, limit)}"
    latent = folder / f"latent_{unique}.pt"
    return OutputFiles(latent, folder / f"scaled_image_{unique}.png", Path(f"{latent}.json"))


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


def prepare_output_dir(folder: Path) -> None:
    """Make the folder where it is missing, and make sure that a file can be written in it.

    Raises:
        OutputDirNotWritable: it cannot.
    """
    with _reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = _temporary_name(folder)
        probe.touch()
        probe.unlink()


def latent_bytes(latent: torch.Tensor) -> bytes:
    """The tensor as `torch.save` writes it. The bytes depend on nothing else: not on a file's name, not on the time."""
    buffer = BytesIO()
    torch.save(latent, buffer)
    return buffer.getvalue()


def png_bytes(image: torch.Tensor) -> bytes:
    """The first image of a float tensor `[batch, height, width, 3]` as an 8-bit RGB PNG; values outside [0, 1] are clipped.

    Written here, since the libraries' encoders take as long as all other file work five times over. The format: PNG
    Specification (Third Edition), W3C 2025, sections 5.2, 9.2 and 11.2.
    """
    pixels = image[0].mul(255).round_().clamp_(0, 255).to(torch.uint8)
    height, width, _ = pixels.shape
    scanlines = torch.empty(height, 1 + 3 * width, dtype=torch.uint8)
    scanlines[:, 0] = PNG_FILTER_UP
    scanlines[0, 1:] = pixels[0].flatten()
    torch.sub(pixels[1:].flatten(1), pixels[:-1].flatten(1), out=scanlines[1:, 1:])  # modulo 256
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits a sample, RGB, not interlaced
    data = isal_zlib.compress(scanlines.numpy(), DEFLATE_LEVEL)
    return PNG_SIGNATURE + _png_chunk(b"IHDR", header) + _png_chunk(b"IDAT", data) + _png_chunk(b"IEND", b"")


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", isal_zlib.crc32(data, isal_zlib.crc32(kind)))


class StagedFiles:
    """Files that are written under temporary names first, and appear together under their own when they are `publish`ed.

    Each is flushed to disk before it is renamed, and they are renamed in the order in which they were added, after the
    last one's predecessor was removed: where the last one is there, all are, and they belong together. What was not
    published is removed at the end of the context.

    Raises:
        OutputDirNotWritable: from each method, where the file system refuses.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._staged: list[tuple[Path, Path]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        for temporary, _ in self._staged:
            temporary.unlink(missing_ok=True)

    def add(self, final: Path, data: bytes) -> None:
        temporary = _temporary_name(self._folder)
        with _reported(self._folder), temporary.open("xb") as file:
            self._staged.append((temporary, final))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def publish(self) -> None:
        with _reported(self._folder):
            self._staged[-1][1].unlink(missing_ok=True)
            for temporary, final in self._staged:
                temporary.replace(final)
            _flush_folder(self._folder)
        self._staged.clear()


def _temporary_name(folder: Path) -> Path:
    return folder / f".latent-encoder-{secrets.token_hex(8)}.tmp"


def _flush_folder(folder: Path) -> None:
    """Make the renames themselves survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _reported(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise OutputDirNotWritable(f"Cannot write to output directory: {folder} ({exc.strerror})") from exc
