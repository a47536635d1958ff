"""The stages of an encode side by side: while one request is encoded, the next are prepared and the last is written."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, Protocol, TypeVar

import torch

from errors import RequestCrashesWorker
from latent_encoder.access import place_of
from latent_encoder.outputs.drawing import Drawn, Undrawn, draw
from latent_encoder.outputs.encoded import Encoded, Prepared
from latent_encoder.outputs.names import OutputFiles
from latent_encoder.outputs.run_requests import may_have_files
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
    """A step of every job, with its queue and the threads that serve it."""

    def __init__(self, name: str, step: Callable[[J, Any], Any], threads: int = 1, torch_threads: int = 1) -> None:
        """`torch_threads` is the count of threads that torch uses in each of this stage's `threads`."""
        self.step = step
        self.torch_threads = torch_threads
        self.inbox: SimpleQueue[tuple[J, Any] | None] = SimpleQueue()
        self.names = [name] if threads == 1 else [f"{name}-{n}" for n in range(1, threads + 1)]
        self._running = threads
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let each thread end after the jobs that are in the queue."""
        for _ in self.names:
            self.inbox.put(None)

    def ended(self) -> bool:
        """Note that a thread ended; return whether it was the last."""
        with self._lock:
            self._running -= 1
            return self._running == 0


class Stages(Generic[J]):
    """Threads in three stages: prepare, encode, write. Jobs that are prepared side by side may overtake each other."""

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
        self._stages: list[Stage[J]] = [
            Stage("prepare", self._prepare, encoder.prepare_threads),
            Stage("encode", self._encode, torch_threads=torch.get_num_threads()),
            Stage("write", self._write),
        ]
        self.threads = [
            threading.Thread(target=self._run, args=(number, name), name=name, daemon=True)
            for number, stage in enumerate(self._stages)
            for name in stage.names
        ]
        self._limited = threading.Barrier(len(self.threads))
        for thread in self.threads:
            thread.start()

    def submit(self, job: J) -> None:
        """Begin a job that has a request."""
        self._stages[0].inbox.put((job, job.request))

    def close(self) -> None:
        """End the threads after their current work, without waiting for that."""
        self._stages[0].close()

    def _run(self, number: int, name: str) -> None:
        # Each thread has an OpenMP pool of its own. If the pools together have more threads than there are CPUs, GNU's OpenMP
        # lets threads sleep at each of an encode's many barriers, which doubles its time. So only the encode has several.
        stage = self._stages[number]
        if stage.torch_threads == 1:
            set_torch_threads(1)
        self._limited.wait()
        if stage.torch_threads > 1:  # set last: torch applies the latest value to threads created later
            set_torch_threads(stage.torch_threads)
        while (ended := self._step(number, name)) is not None:
            if ended:
                give_back_freed_memory()  # large tensors of varying sizes leave holes that the C library would keep
        if stage.ended():
            for following in self._stages[number + 1 : number + 2]:
                following.close()

    def _step(self, number: int, thread: str) -> bool | None:
        """Take one job through a stage.

        This is a function of its own so that no variable keeps the job's tensors while the thread waits for the next job.

        Returns:
            True if the job ended here, False if it went on to the next stage, None if there are no more jobs.
        """
        entry = self._stages[number].inbox.get()
        if entry is None:
            return None
        job, value = entry
        if job.dropped:
            return True
        try:
            with self._health.busy(thread), tracing.within(job.span):
                result = self._stages[number].step(job, value)
        except BaseException as exc:  # `sys.exit` in foreign code would end the thread, and with it every later response
            forget_variables(exc)
            self._report(job, exc)
            del entry, job, value  # the traceback keeps this frame, too
        else:
            if not isinstance(result, SuccessResponse):
                self._stages[number + 1].inbox.put((job, result))
                return False
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

    def _prepare(self, job: J, request: Any) -> Prepared | Undrawn | SuccessResponse:
        """Prepare the encode, or return the stored response of a request that came before, or its latent for more images."""
        request = self._encoder.settled(request)
        reuse = self._reuse and may_have_files(request)
        stored = self._encoder.stored_response(request, job.origin) if reuse else None
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
        undrawn = self._encoder.undrawn(request) if stored is None and reuse else None
        if undrawn is not None and self._encoder.renewed(undrawn.stored.files, undrawn.stored.metadata):
            return undrawn
        return stored or self._encoder.prepare(request, job.origin)

    def _encode(self, job: J, prepared: Prepared | Undrawn) -> Encoded | Drawn:
        job.encoding = True
        if isinstance(prepared, Undrawn):
            return draw(self._encoder.runtime, prepared)
        return self._encoder.encode_prepared(prepared)

    def _write(self, job: J, encoded: Encoded | Drawn) -> SuccessResponse:
        if isinstance(encoded, Drawn):
            response = self._encoder.add_images(encoded)
            job.redelivered = True
            return response
        return self._encoder.write(encoded)


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
