"""The stages of an encode side by side: while one request is encoded, the next is prepared and the last is written."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch

from latent_encoder.outputs.encoded import Encoded, Prepared
from latent_encoder.telemetry import tracing
from latent_encoder.telemetry.health import Health
from latent_encoder.vae.encoders import give_back_freed_memory
from models import EncodeRequest, SuccessResponse
from service import LatentEncoder

if TYPE_CHECKING:
    from opentelemetry.trace import Span

ENCODE = 1  # the number of that stage


class Work(Protocol):
    """What goes through the stages: a request, and what its owner and the stages tell each other about it."""

    encoding: bool
    """Set here: whether the encode has begun."""
    redelivered: bool
    """Set here: whether it was answered from the files of an earlier answer."""

    @property
    def request(self) -> EncodeRequest | None: ...

    @property
    def span(self) -> Span | None:
        """Of OpenTelemetry, where that is installed."""

    @property
    def dropped(self) -> bool:
        """Whether nobody wants it any more."""


W = TypeVar("W", bound=Work)


class Stages(Generic[W]):
    """Three threads in a row: prepare, encode, write. Requests leave them in the order in which they came."""

    def __init__(
        self,
        encoder: LatentEncoder,
        report: Callable[[W, SuccessResponse | BaseException], None],
        health: Health,
        *,
        reuse: bool = True,
    ) -> None:
        """`report` is called with the outcome of each job, from one of the threads; not for one that was dropped.

        With `reuse`, a request whose files are there, whole and matching, is answered from them.
        """
        self._encoder = encoder
        self._reuse = reuse
        self._report = report
        self._health = health
        self._torch_threads = torch.get_num_threads()
        self._limited = threading.Barrier(3)
        self._inboxes: list[SimpleQueue[tuple[W, Any] | None]] = [SimpleQueue() for _ in range(3)]
        self.threads = [
            threading.Thread(target=self._run, args=(stage, n), name=stage.__name__.strip("_"), daemon=True)
            for n, stage in enumerate((self._prepare, self._encode, self._write))
        ]
        for thread in self.threads:
            thread.start()

    def submit(self, job: W) -> None:
        """Begin a job that has a request."""
        self._inboxes[0].put((job, job.request))

    def close(self) -> None:
        """End the threads when they have finished what they have; nobody waits for them here."""
        self._inboxes[0].put(None)

    def _run(self, stage: Callable[[W, Any], Any], n: int) -> None:
        # Each thread has a pool of OpenMP's. Where all of them are more than the CPUs, GNU's OpenMP lets threads sleep at each
        # of an encode's many meeting points, and it takes twice as long: so only the encode has more than one.
        if n != ENCODE:
            set_torch_threads(1)
        self._limited.wait()
        if n == ENCODE:  # the last to say so, since that is what holds for threads to come
            set_torch_threads(self._torch_threads)
        while (ended := self._step(stage, n)) is not None:
            if ended:
                give_back_freed_memory()  # large tensors, each of another size, leave holes that the C library would keep
        for inbox in self._inboxes[n + 1 : n + 2]:
            inbox.put(None)

    def _step(self, stage: Callable[[W, Any], Any], n: int) -> bool | None:
        """One job. Whether it ended here, rather than go on to the next stage; None when there are no more.

        A function of its own, so that nothing keeps the job's tensors while the thread waits for the next.
        """
        item = self._inboxes[n].get()
        if item is None:
            return None
        job, value = item
        if job.dropped:
            return True
        try:
            with self._health.busy(self.threads[n].name), tracing.within(job.span):
                result = stage(job, value)
        except BaseException as exc:  # `sys.exit` in foreign code would end the thread, and nothing would be answered any more
            # Not kept in a variable: with its traceback, which holds this frame, it would keep the job's tensors alive.
            self._report(job, exc)
        else:
            if not isinstance(result, SuccessResponse):
                self._inboxes[n + 1].put((job, result))
                return False
            self._report(job, result)
        return True

    def _prepare(self, job: W, request: Any) -> Prepared | SuccessResponse:
        """A request that comes again and whose files are whole needs no work."""
        stored = self._encoder.stored_response(request) if self._reuse else None
        job.redelivered = stored is not None
        return stored or self._encoder.prepare(request)

    def _encode(self, job: W, prepared: Prepared) -> Encoded:
        job.encoding = True
        return self._encoder.encode_prepared(prepared)

    def _write(self, _: W, encoded: Encoded) -> SuccessResponse:
        return self._encoder.write(encoded)


def set_torch_threads(count: int) -> None:
    """How many threads torch uses for what the calling thread asks of it."""
    torch.get_num_threads()  # takes over what holds for the process, which would come later otherwise, and displace it
    torch.set_num_threads(count)
