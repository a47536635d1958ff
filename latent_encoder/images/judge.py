"""The process that judges images: `python -m latent_encoder.images.judge`, started and used by `judging.py`.

It decodes bytes from anybody, so it may be killed at any moment: it has no other task, no secrets and no files. It imports
neither torch nor ComfyUI. Standard input is a socket to its parent; it ends when the parent closes it or dies.
"""

from __future__ import annotations

import json
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Self

from latent_encoder.images.faults import ImageDamage, ImageFault
from latent_encoder.images.jpeg import check_jpeg
from latent_encoder.images.jpeg_markers import FIRST_BYTES as JPEG_SIGNATURE
from latent_encoder.images.jpeg_structure import ADVICE
from latent_encoder.images.png import check_png
from latent_encoder.images.png_chunks import SIGNATURE as PNG_SIGNATURE
from latent_encoder.images.png_copy import parts_of_copy

READY = b"\1"
"""Sent once, when everything is imported."""

QUESTION = struct.Struct(">QQd")
"""The fields of `Question`."""
VERDICT = struct.Struct(">IQ")
"""Precedes a verdict: its number of bytes, and that of the copy which follows it."""

GRACE_S = 2.0
"""Seconds beyond its limit after which the process ends itself. Before that the parent kills it, if there is still one."""

BYTES_PER_PIXEL = 16
"""Memory for decoding, of MAX_IMAGE_PIXELS: 8 for the coefficients of a JPEG with four colours, 4 to 8 for its pixels."""
COPIES = 2
"""The bytes of the file, and a copy while its header is replaced."""
SPARE_BYTES = 128 * 1024 * 1024
"""Memory for tables of decoders, and for modules that are imported at first use."""

Outcome = Literal["whole", "damaged", "refused", "no memory", "broken"]


class Question(NamedTuple):
    """The header of a request: number of bytes that follow, MAX_IMAGE_PIXELS, and the seconds allowed."""

    size: int
    max_pixels: int
    seconds: float

    def packed(self) -> bytes:
        return QUESTION.pack(*self)

    @classmethod
    def unpacked(cls, data: bytearray) -> Self:
        return cls(*QUESTION.unpack(data))


@dataclass(frozen=True)
class Verdict:
    """The outcome of a judgement: `broken` means that this installation cannot judge."""

    outcome: Outcome
    words: str = ""
    """The fault, in words for the sender."""

    def packed(self, copy_size: int = 0) -> bytes:
        content = json.dumps(asdict(self)).encode()
        return VERDICT.pack(len(content), copy_size) + content

    @classmethod
    def unpacked(cls, content: bytearray) -> Self:
        return cls(**json.loads(content))


def is_judged(data: bytes) -> bool:
    """Return whether the file begins like a JPEG or a PNG. Others are refused without a judgement."""
    return data.startswith((JPEG_SIGNATURE, PNG_SIGNATURE)) and len(data) > len(JPEG_SIGNATURE)


Parts = Sequence[bytes | bytearray | memoryview]
"""A file in parts; none if there is no file."""


def check_image(data: bytearray, max_pixels: int) -> Parts:
    """Check a JPEG or PNG file. Return the copy that LoadImage gets in its place. The buffer may be changed.

    Raises:
        ImageDamage: the file is damaged.
        ImageFault: it must not be decoded, or cannot be.
    """
    if data.startswith(PNG_SIGNATURE):
        return parts_of_copy(data, check_png(data, max_pixels))
    check_jpeg(data, max_pixels)
    return ()


def main() -> None:
    """Judge image after image until the parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the parent, which finishes its requests
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _be_the_first_to_go()
    connection = socket.socket(fileno=0)
    missing = _missing_package()
    loaded = _address_space()
    with suppress(ConnectionError, EOFError):
        connection.sendall(READY)
        while True:
            question = Question.unpacked(received(connection, QUESTION.size))
            _respond(connection, *((Verdict("broken", missing), ()) if missing else _judged(connection, question, loaded)))


def _be_the_first_to_go() -> None:
    """Let Linux end this process before the others of the container if memory runs out."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _missing_package() -> str:
    """Import the decoder before the first image comes; return the error, if there is one."""
    try:
        import simplejpeg  # noqa: F401
    except ImportError as exc:
        return str(exc)
    return ""


def _judged(connection: socket.socket, question: Question, loaded: int) -> tuple[Verdict, Parts]:
    """Return the verdict on the file that comes, and the copy for LoadImage."""
    try:
        _limit_memory(loaded + COPIES * question.size + BYTES_PER_PIXEL * question.max_pixels + SPARE_BYTES)
        data = received(connection, question.size)
        with _limited_time(question.seconds + GRACE_S):
            return Verdict("whole"), check_image(data, question.max_pixels)
    except ImageDamage as exc:
        return Verdict("damaged", str(exc)), ()
    except ImageFault as exc:
        return Verdict("refused", str(exc)), ()
    except MemoryError:
        return Verdict("no memory"), ()
    except Exception as exc:  # whatever a decoder makes of bytes from anybody, the next image is judged
        return Verdict("refused", f"is damaged: it cannot be decoded ({type(exc).__name__}); {ADVICE}"), ()


def _respond(connection: socket.socket, verdict: Verdict, copy: Parts) -> None:
    connection.sendall(verdict.packed(sum(map(len, copy))))
    for part in copy:
        connection.sendall(part)


@contextmanager
def _limited_time(seconds: float) -> Iterator[None]:
    """End this process if the context takes longer."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def received(connection: socket.socket, size: int) -> bytearray:
    """Return that number of bytes from a socket. Raise as `receive_into`."""
    data = bytearray(size)
    with memoryview(data) as view:  # a buffer with a view cannot change its size
        receive_into(connection, view)
    return data


def receive_into(connection: socket.socket, view: memoryview, deadline: float | None = None) -> None:
    """Fill a buffer with bytes from a socket. A deadline is a time of `time.monotonic`.

    Raises:
        EOFError: the other side is gone.
        OSError: of the socket, for example its time-out, or TimeoutError at the deadline.
    """
    place = 0
    while place < len(view):
        if deadline is not None:
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            connection.settimeout(left)
        count = connection.recv_into(view[place:])
        if not count:
            raise EOFError
        place += count


def _address_space() -> int:
    """Return the address space in use, in bytes; 0 if the system does not tell."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return 0


def _limit_memory(size: int) -> None:
    if sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))


if __name__ == "__main__":
    main()
