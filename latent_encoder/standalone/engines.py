"""What encodes the images of a run: the stages of this process, or several processes that share them."""

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
from errors import EncodingFailed, SetupError, as_request_error
from latent_encoder.exits import end_at_once
from latent_encoder.outputs.files import WRITING
from latent_encoder.stages import Stages
from latent_encoder.standalone.ordering import Outcome, Report
from latent_encoder.telemetry.health import Health
from latent_encoder.telemetry.logs import LogStyle, configure_logging, get_logger
from models import EncodeRequest, ErrorResponse, SuccessResponse
from service import LatentEncoder, log_failure, usable_cpus

log = get_logger("latent_encoder")

HELD = 3  # requests of one process: one in each stage
DROP = signal.SIGUSR1
END_S = 10  # seconds for a worker to write the last bytes of a file, and to end


@dataclass(eq=False)
class Task:
    """A request on its way through the stages."""

    number: int
    request: EncodeRequest
    stopping: threading.Event
    encoding: bool = False
    redelivered: bool = False
    span: None = None

    @property
    def dropped(self) -> bool:
        return self.stopping.is_set() and not self.encoding


class InProcess:
    """The stages of this process: while one image is encoded, the next is read and scaled and the last is written."""

    capacity = HELD

    def __init__(self, settings: Settings, report: Report, *, reuse: bool) -> None:
        """With `reuse`, an image whose files are there, whole and matching, is not encoded."""
        self._settings = settings
        self._report = report
        self._reuse = reuse
        self._stopping = threading.Event()

    def start(self) -> None:
        encoder = LatentEncoder.set_up(self._settings)
        self._stages = Stages[Task](encoder, self._finished, Health(self._settings.encode_timeout_s), reuse=self._reuse)

    def submit(self, number: int, request: EncodeRequest) -> None:
        self._stages.submit(Task(number, request, self._stopping))

    def drop_unstarted(self) -> None:
        self._stopping.set()

    def finish(self) -> None:
        self._stages.close()
        for thread in self._stages.threads:
            thread.join()

    def abort(self) -> None:
        WRITING.acquire()

    def _finished(self, task: Task, result: SuccessResponse | BaseException) -> None:
        request_id, correlation_id = task.request.request_id, task.request.correlation_id
        if isinstance(result, SuccessResponse):
            event = "request answered from its files" if task.redelivered else "request encoded"
            log.info(event, request_id=request_id, latent=result.latent_file_path, **result.metadata.timings_ms.model_dump())
            self._report(task.number, Outcome(result, correlation_id, task.redelivered))
        else:
            error = as_request_error(result)
            log_failure(error, image=task.request.image_path, request_id=request_id)
            response = ErrorResponse.of(error, request_id, datetime.now(UTC))
            self._report(task.number, Outcome(response, correlation_id))


@dataclass(frozen=True)
class Share:
    """What a process is told when it is made: it is number `place` of `count`."""

    settings: Settings
    reuse: bool
    place: int
    count: int
    log_style: LogStyle


@dataclass(eq=False)
class Worker:
    """One of the processes, with the requests that it has."""

    process: BaseProcess
    connection: Connection
    requests: dict[int, EncodeRequest] = field(default_factory=dict)

    def send(self, message: tuple[int, EncodeRequest] | None) -> None:
        with suppress(BrokenPipeError):  # it died: whoever listens to it finds out and answers for what it had
            self.connection.send(message)


class Processes:
    """Processes with an `InProcess` each. They share the CPUs, and have a GPU each as far as there are any."""

    def __init__(self, settings: Settings, report: Report, *, reuse: bool, count: int, log_style: LogStyle) -> None:
        self.capacity = count * HELD
        self._report = report
        self._lock = threading.Lock()
        self._aborted = False
        self._workers: list[Worker] = []
        self._listeners: list[threading.Thread] = []
        self._shares = [Share(settings, reuse, place, count, log_style) for place in range(count)]

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
        """Hand on what a worker reports until it has finished. One that dies fails what it had."""
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
            error = EncodingFailed(f"The worker process that had {request.image_path} ended: {reason}.")
            response = ErrorResponse.of(error, request.request_id, datetime.now(UTC))
            self._report(number, Outcome(response, request.correlation_id))


def _spawn(share: Share) -> Worker:
    context = multiprocessing.get_context("spawn")  # a fork would inherit threads, and a GPU's state
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, share), name=f"worker-{share.place + 1}", daemon=True)
    process.start()
    theirs.close()  # so that its end is seen when the process ends
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
    """What a worker process does: it says that it is ready (None) or why not, then takes requests and reports outcomes.

    SIGUSR1 means that it forgets what it has not begun, SIGTERM that it ends now. Ctrl-C is for its parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging(*share.log_style, beside_bar=True)
    sending = threading.Lock()

    def send(message: object) -> None:
        with sending:
            connection.send(message)

    engine = InProcess(_settings_of(share), lambda *outcome: send(outcome), reuse=share.reuse)
    signal.signal(DROP, lambda *_: engine.drop_unstarted())
    signal.signal(signal.SIGTERM, lambda *_: _end_now(engine))
    try:
        try:
            engine.start()
        except SetupError as exc:
            send(str(exc))
            return
        send(None)
        while message := connection.recv():
            engine.submit(*message)
        engine.finish()
        send(None)
    except (EOFError, ConnectionError):
        _end_now(engine)  # the parent is gone


def _end_now(engine: InProcess) -> NoReturn:
    engine.abort()
    end_at_once(128 + signal.SIGTERM)


def _settings_of(share: Share) -> Settings:
    """The settings for that process: with its part of the CPUs. Of several GPUs it sees one alone from now on."""
    if (gpus := torch.cuda.device_count()) > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[share.place % gpus]
    threads = share.settings.torch_num_threads or max(1, usable_cpus() // share.count)
    return share.settings.model_copy(update={"torch_num_threads": threads})
