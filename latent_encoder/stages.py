"""The stages of an encode side by side: while one request is encoded, the next are prepared and the last is written.

A request with URLs has two stages more, which only wait for storage: its image is fetched before it is prepared, and its files
are published after they were made. Many requests may be in these, because they need no CPU and hold no pixels.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, Protocol, TypeVar

import torch

from errors import RequestCrashesWorker
from latent_encoder.access import place_of
from latent_encoder.cpus import WAITING
from latent_encoder.outputs.drawing import Drawn, Undrawn, draw
from latent_encoder.outputs.encoded import Encoded, Prepared
from latent_encoder.outputs.fetched import Fetched
from latent_encoder.outputs.names import OutputFiles
from latent_encoder.storage.locations import ObjectPath
from latent_encoder.telemetry import tracing
from latent_encoder.telemetry.health import Health
from latent_encoder.torch_threads import set_torch_threads
from latent_encoder.vae.freed_memory import give_back_freed_memory
from models import EncodeRequest, SuccessResponse
from service import LatentEncoder

if TYPE_CHECKING:
    from opentelemetry.trace import Span


class Job(Protocol):
    """A unit of work for the stages: a request, and the facts that the stages and the job's owner exchange about it."""

    encoding: bool
    """The encode has begun. Set by the stages."""
    redelivered: bool
    """The response was made from the files of an earlier one. Set by the stages."""
    held: BinaryIO | None
    """An open file that keeps the files of the response, for the owner to close. Set by the stages for a Kafka record."""

    @property
    def request(self) -> EncodeRequest | None: ...

    @property
    def origin(self) -> str | None:
        """Identity of the Kafka record: topic id, partition and offset. None outside of Kafka."""

    @property
    def span(self) -> Span | None:
        """OpenTelemetry's span of the request, if OpenTelemetry is installed."""

    @property
    def dropped(self) -> bool:
        """The owner no longer wants a result."""

    @property
    def condemned(self) -> bool:
        """The request may get a stored response and no encode, because it crashed too many workers."""


J = TypeVar("J", bound=Job)


class Stage(Generic[J]):
    """A step of jobs, with its queue and the threads that serve it."""

    def __init__(self, name: str, step: Callable[[J, Any], Any], threads: int = 1, torch_threads: int | None = 1) -> None:
        """`torch_threads` is the count of threads that torch uses in each of this stage's `threads`.

        None stands for a step that only waits and never calls torch. Its threads are started when they are needed.
        """
        self.name = name
        self.step = step
        self.torch_threads = torch_threads
        self.inbox: SimpleQueue[tuple[J, Any] | None] = SimpleQueue()
        self.names = [name] if threads == 1 else [f"{name}-{n}" for n in range(1, threads + 1)]
        self.following: Stage[J] | None = None
        self.started = False
        self._closed = False
        self._running = 0
        self._lock = threading.Lock()

    @property
    def waits(self) -> bool:
        return self.torch_threads is None

    def start(self, run: Callable[[Stage[J], str], None]) -> list[threading.Thread]:
        """Start the threads, each of which calls `run`, unless they run or the stage is closed; return the new ones.

        If the system has no room for all of a stage that waits, fewer serve it.

        Raises:
            RuntimeError: it has room for none.
        """
        new: list[threading.Thread] = []
        with self._lock:
            if self.started or self._closed:
                return new
            for name in self.names:
                thread = threading.Thread(target=run, args=(self, name), name=name, daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    if not self.waits or not new:
                        raise
                    break
                new.append(thread)
                self._running += 1
            self.started = True
        return new

    def close(self) -> None:
        """Let each thread end after the jobs that are in the queue, and then those of the stages that follow."""
        with self._lock:
            self._closed = True
            for _ in range(self._running):
                self.inbox.put(None)
        if not self.started and self.following is not None:
            self.following.close()

    def ended(self) -> bool:
        """Note that a thread ended; return whether it was the last."""
        with self._lock:
            self._running -= 1
            return self._running == 0


class Stages(Generic[J]):
    """Threads in stages. Jobs that are prepared side by side may overtake each other, and so may those that wait."""

    def __init__(
        self,
        encoder: LatentEncoder,
        report: Callable[[J, SuccessResponse | BaseException], None],
        health: Health,
        *,
        reuse: bool = True,
    ) -> None:
        """`report` is called with the result of each job, from one of the threads, unless the job was dropped.

        With `reuse`, a request whose output files are complete and match gets its response from them.
        """
        self._encoder = encoder
        self._reuse = reuse
        self._report = report
        self._health = health
        self._fetching = Stage[J]("fetch", self._fetch, WAITING, torch_threads=None)
        self._preparing = Stage[J]("prepare", self._prepare, encoder.prepare_threads)
        stages = [
            self._fetching,
            self._preparing,
            Stage[J]("encode", self._encode, torch_threads=torch.get_num_threads()),
            Stage[J]("write", self._write),
            Stage[J]("publish", self._publish, WAITING, torch_threads=None),
        ]
        for stage, following in pairwise(stages):
            stage.following = following
        self._room = threading.Semaphore(encoder.most_prepared)
        """The jobs whose pixels may be in memory: those from the preparation until their files are made."""
        self.threads: list[threading.Thread] = []
        self._limited = threading.Barrier(sum(len(stage.names) for stage in stages if not stage.waits))
        for stage in stages:
            if not stage.waits:
                self._start(stage)

    def submit(self, job: J) -> None:
        """Begin a job that has a request."""
        has_urls = job.request is not None and job.request.has_urls
        self._put(self._fetching if has_urls else self._preparing, job, job.request)

    def close(self) -> None:
        """End the threads after their current work, without waiting for that."""
        self._fetching.close()

    def _put(self, stage: Stage[J], job: J, value: Any) -> bool:
        """Hand a job to a stage. If no thread can be started for it, report that, and return False."""
        try:
            self._start(stage)
        except RuntimeError as exc:
            self._report(job, exc)
            return False
        stage.inbox.put((job, value))
        return True

    def _start(self, stage: Stage[J]) -> None:
        """Start the threads of a stage, unless they run."""
        new = stage.start(self._run)
        self.threads += new
        self._health.needs(new)

    def _run(self, stage: Stage[J], name: str) -> None:
        if stage.torch_threads is not None:
            self._limit_torch(stage.torch_threads)
        while True:
            if stage is self._preparing:
                self._room.acquire()
            ended = self._step(stage, name)
            if ended is None:
                break
            if not stage.waits and (ended or stage.name == "write"):
                self._room.release()
            if ended:
                give_back_freed_memory()  # large tensors of varying sizes leave holes that the C library would keep
        if stage.ended() and stage.following is not None:
            stage.following.close()

    def _limit_torch(self, threads: int) -> None:
        """Set the count of threads that torch uses in this thread, when every thread that calls torch does so."""
        # Each thread has an OpenMP pool of its own. If the pools together have more threads than there are CPUs, GNU's OpenMP
        # lets threads sleep at each of an encode's many barriers, which doubles its time. So only the encode has several.
        if threads == 1:
            set_torch_threads(1)
        self._limited.wait()
        if threads > 1:  # set last: torch applies the latest value to threads created later
            set_torch_threads(threads)

    def _step(self, stage: Stage[J], thread: str) -> bool | None:
        """Take one job through a stage.

        This is a function of its own so that no variable keeps the job's tensors while the thread waits for the next job.

        Returns:
            True if the job ended here, False if it went on to the next stage, None if there are no more jobs.
        """
        entry = stage.inbox.get()
        if entry is None:
            return None
        job, value = entry
        if job.dropped:
            return True
        try:
            with self._health.busy(thread), tracing.within(job.span):
                result = stage.step(job, value)
        except BaseException as exc:  # `sys.exit` in foreign code would end the thread, and with it every later response
            forget_variables(exc)
            self._report(job, exc)
            del entry, job, value  # the traceback keeps this frame, too
        else:
            if stage.following is not None and not isinstance(result, SuccessResponse):
                return not self._put(stage.following, job, result)
            self._hold(job, result)
            self._report(job, result)
        return True

    def _hold(self, job: J, response: SuccessResponse) -> None:
        """Keep the files of a record's response until the job ends, which may be long after, if the broker is away."""
        if job.origin is None:
            return
        job.held = self._encoder.hold(response)
        if job.dropped and job.held is not None:  # meanwhile, in the owner's thread
            job.held.close()

    def _fetch(self, _: J, request: EncodeRequest) -> Fetched:
        """Find the id of a request's files, and read ahead everything that is behind a URL."""
        return self._encoder.fetch(self._encoder.settled(request), reuse=self._reuse)

    def _prepare(self, job: J, given: EncodeRequest | Fetched) -> Prepared | Undrawn | SuccessResponse:
        """Prepare the encode, or return the stored response of a request that came before, or its latent for more images."""
        fetched = given if isinstance(given, Fetched) else self._fetch(job, given)
        request = fetched.request
        stored = self._encoder.stored_response(request, job.origin, fetched) if self._reuse else None
        if stored is not None and not self._encoder.renewed(
            OutputFiles.of(place_of(stored.latent_file_path)), stored.metadata
        ):
            stored = None
        if stored is None and job.condemned:
            raise RequestCrashesWorker(
                "Every worker that began this request died or hung before it ended. Look for the cause in the workers' logs: "
                "most often memory runs out. Ask for fewer megapixels or give the workers more memory."
            )
        job.redelivered = stored is not None
        undrawn = self._encoder.undrawn(request, fetched) if stored is None and self._reuse else None
        if undrawn is not None and self._encoder.renewed(undrawn.stored.files, undrawn.stored.metadata):
            return undrawn
        return stored or self._encoder.prepare(request, job.origin, fetched)

    def _encode(self, job: J, prepared: Prepared | Undrawn) -> Encoded | Drawn:
        job.encoding = True
        if isinstance(prepared, Undrawn):
            return draw(self._encoder.runtime, prepared)
        return self._encoder.encode_prepared(prepared)

    def _write(self, job: J, encoded: Encoded | Drawn) -> SuccessResponse | Callable[[], SuccessResponse]:
        """Write the files. If their place is a bucket, make them and return the call that publishes them."""
        if isinstance(encoded, Encoded):
            return self._encoder.write_later(encoded) or self._encoder.write(encoded)
        add = partial(self._add_images, job, encoded)
        return add if isinstance(encoded.undrawn.stored.files.folder, ObjectPath) else add()

    def _add_images(self, job: J, drawn: Drawn) -> SuccessResponse:
        response = self._encoder.add_images(drawn)
        job.redelivered = True
        return response

    def _publish(self, _: J, publish: Callable[[], SuccessResponse]) -> SuccessResponse:
        return publish()


def forget_variables(exc: BaseException) -> None:
    """Clear the variables of the functions that an exception, its causes and its contexts ended; not those that still run.

    Their tracebacks keep the functions' frames. The owner of a job keeps its exception until the response is published, which
    may take minutes. Meanwhile a VAE that the cache drops, and the tensors of the image, would stay in memory.
    """
    waiting: list[BaseException | None] = [exc]
    seen: set[int] = set()
    while waiting:
        current = waiting.pop()
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            traceback.clear_frames(current.__traceback__)
            waiting += [current.__cause__, current.__context__]
