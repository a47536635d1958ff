"""The engine of a run in several processes: starting and feeding them, reporting their outcomes, and their own work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NoReturn

import torch

from config import Settings
from errors import EncodingFailed, SetupError
from latent_encoder.cpus import WAITING, prepare_threads
from latent_encoder.exits import end_by_signal, wait_heeding_signals
from latent_encoder.standalone.engines import InProcess, capacity
from latent_encoder.standalone.ordering import Outcome, Report
from latent_encoder.storage.locations import shown
from latent_encoder.telemetry.logs import LogStyle, configure_logging, get_logger
from latent_encoder.torch_threads import encode_threads
from models import EncodeRequest, ErrorResponse

log = get_logger("latent_encoder")

DROP = signal.SIGUSR1
"""Sent to a worker to make it forget the requests whose encode has not begun."""

END_S = 10
"""Seconds that a worker gets to write the rest of a file and to end. Both take less than one, except on a slow disk."""


@dataclass(frozen=True)
class Share:
    """The part of a run that one worker gets when it is made: it is number `place` of `count`."""

    settings: Settings
    reuse: bool
    place: int
    count: int
    log_style: LogStyle
    log_failures: bool


@dataclass(eq=False)
class Worker:
    """One of the processes, with the requests that it holds."""

    process: BaseProcess
    connection: Connection
    requests: dict[int, EncodeRequest] = field(default_factory=dict)

    def send(self, message: tuple[int, EncodeRequest] | None) -> None:
        with suppress(BrokenPipeError):  # it died: its listener notices, and reports errors for the requests that it held
            self.connection.send(message)


class Processes:
    """Worker processes with an `InProcess` each. They share the CPUs. Each has a GPU of its own, if there are enough."""

    def __init__(  # noqa: PLR0913  # the parts of a share
        self,
        settings: Settings,
        report: Report,
        *,
        reuse: bool,
        count: int,
        log_style: LogStyle,
        log_failures: bool,
    ) -> None:
        self.capacity = count * capacity(_with_prepare_threads(settings, count))
        self.capacity_for_urls = self.capacity + count * WAITING
        self._report = report
        self._lock = threading.Lock()
        self._aborted = False
        self._workers: list[Worker] = []
        self._listeners: list[threading.Thread] = []
        self._shares = [Share(settings, reuse, place, count, log_style, log_failures) for place in range(count)]

    def start(self) -> None:
        self._workers = [_spawn(share) for share in self._shares]
        try:
            for worker in self._workers:
                _await_ready(worker)
        except SetupError:
            self.abort()
            raise
        self._listeners = [threading.Thread(target=self._listen, args=(worker,), daemon=True) for worker in self._workers]
        for listener in self._listeners:
            listener.start()

    def submit(self, number: int, request: EncodeRequest) -> None:
        with self._lock:
            if not self._workers:
                raise SetupError("Every worker process has ended; with fewer --workers each has more memory.")
            worker = min(self._workers, key=lambda worker: len(worker.requests))
            worker.requests[number] = request
            worker.send((number, request))

    def drop_unstarted(self) -> None:
        for worker in self._workers:
            if (pid := worker.process.pid) is not None and worker.process.is_alive():
                os.kill(pid, DROP)

    def finish(self) -> None:
        with self._lock:
            for worker in self._workers:
                worker.send(None)
        for listener in self._listeners:
            listener.join()
        self._await_end()

    def abort(self) -> None:
        self._aborted = True
        for worker in self._workers:
            worker.process.terminate()
        self._await_end()

    def _await_end(self) -> None:
        for worker in self._workers:
            worker.process.join(timeout=END_S)

    def _listen(self, worker: Worker) -> None:
        """Report the outcomes of a worker until it has finished. If it dies, the requests that it held fail."""
        try:
            while message := worker.connection.recv():
                number, outcome = message
                with self._lock:
                    del worker.requests[number]
                self._report(number, outcome)
        except (EOFError, ConnectionError):
            if not self._aborted:
                self._bury(worker)

    def _bury(self, worker: Worker) -> None:
        reason = _why_it_ended(worker.process)
        log.error("worker process ended", worker=worker.process.name, reason=reason)
        with self._lock:
            self._workers = [other for other in self._workers if other is not worker]
        for number, request in worker.requests.items():
            error = EncodingFailed(f"The worker process that had {shown(request.image_path)} ended: {reason}.")
            response = ErrorResponse.of(error, request.request_id, datetime.now(UTC))
            self._report(number, Outcome(response, request.image_path, request.correlation_id))


def _spawn(share: Share) -> Worker:
    context = multiprocessing.get_context("spawn")  # a fork would inherit threads, and a GPU's state
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, share), name=f"worker-{share.place + 1}", daemon=True)
    process.start()
    theirs.close()  # otherwise this process would keep the pipe open, and the worker's death would not be noticed
    return Worker(process, ours)


def _await_ready(worker: Worker) -> None:
    try:
        problem = worker.connection.recv()
    except (EOFError, ConnectionError):
        problem = f"A worker process ended while it started: {_why_it_ended(worker.process)}."
    if problem is not None:
        raise SetupError(problem)


def _why_it_ended(process: BaseProcess) -> str:
    process.join()
    code = process.exitcode or 0
    if code == -signal.SIGKILL:
        return "it was killed, by the system for lack of memory as a rule; use fewer --workers or fewer megapixels"
    return f"it was ended by signal {-code}" if code < 0 else f"its exit status is {code}"


def work(connection: Connection, share: Share) -> None:
    """Run a worker process: send None when it is ready or the reason why it cannot start, then take requests.

    `DROP` makes it forget the requests whose encode has not begun, SIGTERM ends it at once. Ctrl-C is left to its parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging(*share.log_style, beside_bar=True)
    sending = threading.Lock()

    def send(message: object) -> None:
        with sending:
            connection.send(message)

    engine = InProcess(_settings_of(share), lambda *outcome: send(outcome), reuse=share.reuse, log_failures=share.log_failures)
    signal.signal(DROP, lambda *_: engine.drop_unstarted())
    signal.signal(signal.SIGTERM, lambda *_: _end_now(engine))
    try:
        try:
            engine.start()
        except SetupError as exc:
            send(str(exc))
            return
        send(None)
        while message := _received(connection):
            engine.submit(*message)
        engine.finish()
        send(None)
    except (EOFError, ConnectionError):
        _end_now(engine)  # the parent is gone


def _received(connection: Connection) -> tuple[int, EncodeRequest] | None:
    wait_heeding_signals(connection.poll)
    message: tuple[int, EncodeRequest] | None = connection.recv()
    return message


def _end_now(engine: InProcess) -> NoReturn:
    engine.abort()
    end_by_signal(signal.SIGTERM)


def _settings_of(share: Share) -> Settings:
    """Return the settings of a worker, with its part of the CPUs. If there are several GPUs, it sees only one from now on."""
    if (gpus := torch.cuda.device_count()) > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[share.place % gpus]
    threads = share.settings.torch_num_threads or max(1, encode_threads() // share.count)
    return _with_prepare_threads(share.settings, share.count).model_copy(update={"torch_num_threads": threads})


def _with_prepare_threads(settings: Settings, count: int) -> Settings:
    return settings.model_copy(update={"prepare_threads": prepare_threads(settings, count)})
