"""The fuzzing process, watched from outside: its time, its memory, and its end."""

from __future__ import annotations

import multiprocessing
import signal
import time
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import psutil
from PIL import PngImagePlugin

from config import Settings
from fuzz.cases import Corpus, make_case
from fuzz.process import Folders, Result, run

POLL_S = 0.05
START_S = 300.0

MIB = 1024 * 1024

BYTES_PER_PIXEL = 128  # 4 of Pillow, 12 each for the floats of LoadImage and the scaling node, and these several times over
LARGEST_VAE = 160 * MIB  # the SD-style VAE in bfloat16
COPIES_OF_VAE = 3  # once as in its file, and once in float32, which is twice as large


@dataclass(frozen=True)
class Limits:
    """The limits of an input. `loaded` is the process's memory before the first one; memory is in bytes."""

    seconds: float
    loaded: int
    memory: int


class Watched:
    """A process that runs `fuzz.process.run`, started again after an input that ends it or exceeds a limit."""

    def __init__(self, folders: Folders, settings: Settings, seed: int, patience: float) -> None:
        self._folders, self._settings, self._seed = folders, settings, seed
        self._patience = patience
        self._context = multiprocessing.get_context("spawn")
        self._start()
        loaded = self._wait(START_S, None)
        if not isinstance(loaded, int):
            raise RuntimeError(f"The service did not start: {loaded}\n{folders.log.read_text()[-2000:]}")  # noqa: TRY004
        self.limits = Limits(patience, loaded, loaded + extra_memory(settings))

    def _start(self) -> None:
        self._connection, other = self._context.Pipe()
        self._process = self._context.Process(
            target=run, args=(other, self._folders.root, self._settings, self._seed), daemon=True
        )
        self._process.start()
        other.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def _stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def result(self, number: int) -> Result:
        """Return the result of that input."""
        start = time.monotonic()
        self._connection.send(number)
        result = self._wait(self._patience, self.limits.memory)
        if isinstance(result, Result):
            too_much = (self._too_much(result.peak),) if result.peak > self.limits.memory else ()
            return replace(result, faults=result.faults + too_much)
        peak = self._memory()
        self._stop()
        self._start()
        self._wait(START_S, None)
        case = make_case(Corpus.read(self._folders.corpus), self._seed, number)
        return Result(number, case.kind, case.mutation, "none", time.monotonic() - start, peak, (str(result),))

    def _wait(self, seconds: float, memory: int | None) -> object:
        """Return the object that the process sends, or a text with the reason why it sent none."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._connection.poll(min(POLL_S, left)):
                try:
                    return self._connection.recv()
                except EOFError:
                    self._process.join()
                    return f"the process ended: {_end(self._process.exitcode)}"
            if memory is not None and self._memory() > memory:
                return self._too_much(self._memory())
        return f"no response within {seconds:g} s"

    def _too_much(self, memory: int) -> str:
        return f"{memory // MIB} MiB of memory, more than the limit of {self.limits.memory // MIB}"

    def _memory(self) -> int:
        try:
            return int(psutil.Process(self._process.pid).memory_info().rss)
        except psutil.NoSuchProcess:
            return 0


def _end(status: int | None) -> str:
    return signal.Signals(-status).name if status is not None and status < 0 else f"status {status}"


def extra_memory(settings: Settings) -> int:
    """Return the memory that an input may take, in bytes: an image's, and a VAE's, because freed memory may stay allocated."""
    image = BYTES_PER_PIXEL * settings.max_image_pixels + PngImagePlugin.MAX_TEXT_MEMORY
    return image + COPIES_OF_VAE * LARGEST_VAE
