"""The judgement of images, in processes apart: a limit on time and memory that holds for every file, also a hostile one.

A thread cannot be interrupted in a decoder. A process can be killed: then the image is refused, and the next one gets a new
process. A process is used again, because starting one takes 0.1 s.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO

from config import PROJECT_DIR
from errors import EncodingFailed
from latent_encoder.exits import on_exit
from latent_encoder.images.faults import ImageDamage, ImageFault
from latent_encoder.images.judge import READY, VERDICT, Question, Verdict, receive_into, received
from latent_encoder.images.png import HEADER_END, MOST_KEPT

MOST_PROCESSES = 4
"""Judgements at a time. More would only wait for CPUs: a judgement is all computing."""

START_S = 60.0
"""Seconds for a process to start, which takes 0.1 s on an idle machine."""

END_S = 5.0
"""Seconds for a process to be gone after its socket has closed. It is killed then."""

LONGEST_VERDICT = 64 * 1024
"""Bytes. A verdict has less than 1000; more would come from a decoder that the image has taken over."""

LARGEST_COPY = 2 * MOST_KEPT
"""Bytes of a copy beyond those of the file. A whole one has the rows, and less than a thousandth of that for their blocks."""

LAST_LOOK_S = 0.01
"""Seconds to take a verdict that lies there after the deadline."""

COPY_S = 10.0
"""Seconds for a copy to come after its verdict. The largest one, 60 MB, takes 0.05 s on an idle machine."""

CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGSYS, signal.SIGTRAP}
"""Signals that a process causes itself."""

PASSED_ON = ("PATH", "HOME", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "LANG", "TZ")
"""Variables that a process needs to start. No secret is among them."""

KEPT_BYTES = 32 * 1024 * 1024
"""Free memory that a process keeps for its next image. A PNG of 3 megapixels needs 17 MB, and a fifth less CPU with them."""

OF_PROCESS = {
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": str(KEPT_BYTES),  # of glibc; others ignore it
    "MALLOC_MMAP_THRESHOLD_": str(KEPT_BYTES),
}
"""Further variables of a process."""

MODULE = "latent_encoder.images.judge"


Meanwhile = Callable[[], object]
"""Work that this process does while the other one judges."""


class _EndedError(Exception):
    """The process is gone, and the image is not known to be the reason."""


def _started(connection: socket.socket) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603  # no input: it is this Python and our module
        [sys.executable, "-m", MODULE],
        cwd=str(PROJECT_DIR),
        stdin=connection.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in PASSED_ON if name in os.environ} | OF_PROCESS,
        start_new_session=True,  # Ctrl-C in a terminal is for the parent alone
    )


class Judge:
    """A process that judges one image at a time."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, ExitStack() as on_failure:
            on_failure.enter_context(ours)
            self._process = _started(theirs)
            on_failure.pop_all()
        self._socket = ours
        self._is_ready = False

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """False if the process has ended."""
        return self._process.poll() is None

    def verdict(self, data: bytes, question: Question, meanwhile: Meanwhile) -> tuple[Verdict, bytes]:
        """Return the verdict on an image file, and the copy of a whole one that LoadImage gets in its place, if there is one.

        Raises:
            ImageFault: the image took too long, or crashed the decoder. The process is gone then.
            EncodingFailed: the process did not start in time.
            _EndedError: it is gone for another reason.
        """
        try:
            self._wait_until_ready()
            return self._asked(data, question, meanwhile)
        except TimeoutError as exc:
            self.end()
            raise _too_slow(question.seconds) from exc
        except (EOFError, OSError) as exc:
            raise self._fault_of_the_end(question.seconds) from exc

    def _wait_until_ready(self) -> None:
        if self._is_ready:
            return
        self._socket.settimeout(START_S)
        try:
            received(self._socket, len(READY))
        except TimeoutError as exc:
            self.end()
            raise EncodingFailed(f"Cannot judge images: their process did not start within {START_S:g} s") from exc
        self._is_ready = True

    def _asked(self, data: bytes, question: Question, meanwhile: Meanwhile) -> tuple[Verdict, bytes]:
        deadline = time.monotonic() + question.seconds
        self._socket.settimeout(question.seconds)
        self._socket.sendall(question.packed())
        self._socket.sendall(data)
        meanwhile()
        size, copy_size = VERDICT.unpack(self._by(deadline, VERDICT.size))
        if size > LONGEST_VERDICT or copy_size > len(data) + LARGEST_COPY:
            raise _taken_over()
        try:
            verdict = Verdict.unpacked(self._by(deadline, size))
        except (ValueError, TypeError) as exc:
            raise _taken_over() from exc
        copy = self._copy(copy_size)
        if not data.startswith(copy[:HEADER_END]):
            raise _taken_over()
        return verdict, copy

    def _copy(self, size: int) -> bytes:
        """Return the bytes of a copy, which are in memory only once."""
        file = BytesIO(bytes(size))
        with file.getbuffer() as view:
            receive_into(self._socket, view, time.monotonic() + COPY_S)
        return file.getvalue()

    def _by(self, deadline: float, size: int) -> bytearray:
        """Return bytes that come before the deadline, or that lie there: this process may have been stopped meanwhile."""
        self._socket.settimeout(max(deadline - time.monotonic(), LAST_LOOK_S))
        return received(self._socket, size)

    def _fault_of_the_end(self, seconds: float) -> Exception:
        """Return the error for a process that has closed its socket."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        status = self.end()
        if -status in CRASHES:
            return ImageFault(f"crashes the decoder ({signal.Signals(-status).name}); save it anew with another program")
        if -status == signal.SIGALRM:
            return _too_slow(seconds)
        if status < 0:
            name = signal.Signals(-status).name
            return _EndedError(f"was ended by {name}; memory may have run out, see the system's log")
        shown = f'cd {PROJECT_DIR} && {sys.executable} -c "import {MODULE}"'
        return _EndedError(f"ended with status {status}; `{shown}` shows why")

    def end(self) -> int:
        """End the process, and return its exit status, negative for a signal.

        This may run in a signal handler, within another call of it. Only a wait with a limit cannot block there.
        """
        self._socket.close()
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        return self._process.returncode or -signal.SIGKILL

    def forget(self) -> None:
        """Close the socket of a process that belongs to another one: this one was forked from it."""
        self._socket.close()
        self._process.returncode = 0


def _taken_over() -> ImageFault:
    return ImageFault("makes the decoder respond with nonsense; save it anew with another program")


def _too_slow(seconds: float) -> ImageFault:
    return ImageFault(f"takes longer to check than IMAGE_TIMEOUT_S={seconds:g} s; make it smaller, or raise the limit")


class Judges:
    """The processes that judge images. Each thread that judges has one meanwhile."""

    def __init__(self) -> None:
        self._renew()
        os.register_at_fork(after_in_child=self._forget)

    def _renew(self) -> None:
        self._lock = threading.RLock()  # a signal handler that ends this process closes the others
        self._free = threading.BoundedSemaphore(MOST_PROCESSES)
        self._idle: list[Judge] = []
        self._all: set[Judge] = set()
        self._ends_with_us = False

    def judge(self, data: bytes, max_pixels: int, seconds: float, meanwhile: Meanwhile = lambda: None) -> bytes:
        """Return the bytes that LoadImage gets for a JPEG or PNG that is whole: the file, or a copy with the same pixels.

        `meanwhile` is called while the process works, once or twice.

        Raises:
            ImageDamage: it is damaged.
            ImageFault: it must not be decoded: it is hostile, too large, or of a kind that ComfyUI cannot load.
            EncodingFailed: no process can judge it.
        """
        question = Question(len(data), max_pixels, seconds)
        try:
            verdict, copy = self._verdict(data, question, meanwhile)
        except _EndedError:
            try:
                verdict, copy = self._verdict(data, question, meanwhile)  # somebody killed the first process
            except _EndedError as exc:
                raise EncodingFailed(f"Cannot judge images, twice: their process {exc}") from exc
        match verdict.outcome:
            case "whole":
                return copy or data
            case "damaged":
                raise ImageDamage(verdict.words)
            case "no memory":
                raise ImageFault("takes more memory to check than other images of MAX_IMAGE_PIXELS; save it anew")
            case "broken":
                raise EncodingFailed(f"Cannot judge images: {verdict.words}; run ./setup_comfyui.sh, which installs packages")
        raise ImageFault(verdict.words)

    def start(self) -> None:
        """Start a process, so that the first image does not wait for it. If that fails, the first image reports it."""
        with self._lock, suppress(EncodingFailed):
            if not self._idle:
                self._idle.append(self._new())

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            for judge in tuple(self._all):
                judge.end()
            self._idle.clear()
            self._all.clear()

    def _verdict(self, data: bytes, question: Question, meanwhile: Meanwhile) -> tuple[Verdict, bytes]:
        with self._borrowed() as judge:
            return judge.verdict(data, question, meanwhile)

    @contextmanager
    def _borrowed(self) -> Iterator[Judge]:
        with self._free:
            judge = self._taken()
            try:
                yield judge
            except BaseException:  # also an interrupt: a verdict may still come, and would be taken for the next one's
                judge.end()
                raise
            finally:
                self._given_back(judge)

    def _taken(self) -> Judge:
        with self._lock:
            while self._idle:
                judge = self._idle.pop()
                if judge.is_alive:
                    return judge
                self._all.discard(judge)
                judge.end()
            return self._new()

    def _given_back(self, judge: Judge) -> None:
        with self._lock:
            if judge.is_alive and judge in self._all:
                self._idle.append(judge)
            else:
                self._all.discard(judge)

    def _new(self) -> Judge:
        try:
            judge = Judge()
        except OSError as exc:
            raise EncodingFailed(f"Cannot judge images: no process can be started ({exc.strerror or exc})") from exc
        self._all.add(judge)
        if not self._ends_with_us:
            self._ends_with_us = True
            on_exit(self.close)
        return judge

    def _forget(self) -> None:
        """Start anew in a process that was forked: the processes are its parent's."""
        for judge in self._all:
            judge.forget()
        self._renew()


JUDGES = Judges()
"""The processes of this process."""
