"""Runs of the worker's three stages in one process over copies of a file: requests per second, and the work of each stage.

The stages are the product's own (`latent_encoder/stages.py`), without Kafka. `Observed` is the product's encoder with a clock
around each stage. The CPU time of a stage is that of its thread; the rest of the process's, and its child processes', is
"other".
"""

from __future__ import annotations

import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from errors import as_request_error
from latent_encoder.outputs.encoded import Encoded, Prepared
from latent_encoder.requests import parse_request
from latent_encoder.stages import Stages
from latent_encoder.standalone.engines import ImageJob
from latent_encoder.telemetry.health import Health
from models import EncodeRequest, SuccessResponse
from service import LatentEncoder

STAGES = ("prepare", "encode", "write")
WARM_UP = 3  # requests before a run that are not measured: the first of a process and of a size are slower
BEHIND = 2  # requests beyond those that are prepared: one is encoded, one is written
PATIENCE_S = 600.0  # for one request


class Observed(LatentEncoder):
    """The product's encoder, with the time of each stage: seconds, and seconds of its thread's CPU."""

    def __init__(self, *args: Any) -> None:
        """Take the arguments of `LatentEncoder`. Its settings have the VAE and the size of the requests."""
        super().__init__(*args)
        self._lock = threading.Lock()
        self.restart()

    def requests(self, file: Path, count: int, folder: Path) -> list[EncodeRequest]:
        """Return requests for one file."""
        given = {"image_path": str(file), "output_dir": str(folder)}
        return [parse_request({"request_id": f"r{n}", **given}, self._settings.request_defaults) for n in range(count)]

    def restart(self) -> None:
        """Forget all times so far."""
        self.wall_s: dict[str, float] = defaultdict(float)
        self.cpu_s: dict[str, float] = defaultdict(float)

    @contextmanager
    def _observed(self, stage: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            with self._lock:
                self.wall_s[stage] += time.perf_counter() - wall
                self.cpu_s[stage] += time.thread_time() - cpu

    def prepare(self, request: EncodeRequest, *more: Any) -> Prepared:
        with self._observed("prepare"):
            return super().prepare(request, *more)

    def encode_prepared(self, prepared: Prepared) -> Encoded:
        with self._observed("encode"):
            return super().encode_prepared(prepared)

    def write(self, encoded: Encoded) -> SuccessResponse:
        with self._observed("write"):
            return super().write(encoded)


@dataclass(frozen=True)
class StageRun:
    """The times of a run of one kind of file."""

    kind: str
    threads: int
    """Threads that prepare."""
    requests: int
    seconds: float
    wall_s: dict[str, float]
    """Seconds of each stage, those of several threads added up."""
    cpu_s: dict[str, float]
    """CPU seconds of each stage, and `other`."""

    @property
    def per_second(self) -> float:
        return self.requests / self.seconds

    def busy(self, stage: str) -> float:
        """Return the share of the time in which a stage's threads worked."""
        return self.wall_s[stage] / self.seconds / (self.threads if stage == "prepare" else 1)

    def cpu_ms(self, stage: str) -> float:
        """Return the milliseconds of CPU that a request takes in a stage."""
        return self.cpu_s[stage] / self.requests * 1000

    @property
    def limit(self) -> str:
        """The stage that was busy for the largest share."""
        return max(STAGES, key=self.busy)


@dataclass
class Sender:
    """A client that keeps the stages supplied, with as many requests under way as they can work on."""

    stages: Stages[ImageJob]
    room: threading.Semaphore
    failures: list[BaseException] = field(default_factory=list)

    def send(self, requests: list[EncodeRequest], under_way: int) -> None:
        """Send requests and wait until all have ended.

        Raises:
            RequestError: one failed.
        """
        for number, request in enumerate(requests):
            self._wait()
            self.stages.submit(ImageJob(number, request, threading.Event()))
        for _ in range(under_way):
            self._wait()
        self.room.release(under_way)
        if self.failures:
            raise as_request_error(self.failures[0])

    def _wait(self) -> None:
        if not self.room.acquire(timeout=PATIENCE_S):
            raise TimeoutError(f"A request took longer than {PATIENCE_S:.0f} s.")


def run_stages(encoder: Observed, kind: str, file: Path, requests: int, folder: Path) -> StageRun:
    """Let the stages work on `requests` requests for one file, and return their times. The output goes below `folder`.

    Raises:
        RequestError: a request failed.
    """
    under_way = encoder.prepare_threads + BEHIND
    room = threading.Semaphore(under_way)
    failures: list[BaseException] = []

    def ended(_: ImageJob, result: SuccessResponse | BaseException) -> None:
        if isinstance(result, BaseException):
            failures.append(result)
        room.release()

    stages = Stages[ImageJob](encoder, ended, Health(PATIENCE_S), reuse=False)
    sender = Sender(stages, room, failures)
    try:
        sender.send(encoder.requests(file, max(WARM_UP, under_way), folder), under_way)
        encoder.restart()
        start, cpu = time.perf_counter(), _cpu_s()
        sender.send(encoder.requests(file, requests, folder), under_way)
        seconds, used = time.perf_counter() - start, _cpu_s() - cpu
    finally:
        stages.close()
        for thread in stages.threads:
            thread.join(PATIENCE_S)
        shutil.rmtree(folder, ignore_errors=True)
    other = max(0.0, used - sum(encoder.cpu_s.values()))
    cpu_s = {**{stage: encoder.cpu_s[stage] for stage in STAGES}, "other": other}
    walls = {stage: encoder.wall_s[stage] for stage in STAGES}
    return StageRun(kind, encoder.prepare_threads, requests, seconds, walls, cpu_s)


def _cpu_s() -> float:
    """Return the CPU seconds so far of this process and of its child processes, those that ended included."""
    own = psutil.Process()
    times = [own.cpu_times(), *(child.cpu_times() for child in own.children(recursive=True))]
    ended = times[0].children_user + times[0].children_system
    return float(ended + sum(time_.user + time_.system for time_ in times))
