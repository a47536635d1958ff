"""The stages of an encode side by side: while one request is encoded, the next is prepared and the last is written."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from kafka_lanes import Job
from models import SuccessResponse
from service import Encoded, LatentEncoder, Prepared

Inbox = SimpleQueue[tuple[Job, Any] | None]
Report = Callable[[Job, SuccessResponse | Exception], None]


class Stages:
    """Three threads in a row: prepare, encode, write. Requests leave them in the order in which they came."""

    def __init__(self, encoder: LatentEncoder, report: Report) -> None:
        """`report` is called with the outcome of each job, from one of the threads; not for one that was dropped."""
        self._encoder = encoder
        self._report = report
        self._inboxes: list[Inbox] = [SimpleQueue() for _ in range(3)]
        for n, stage in enumerate((self._prepare, self._encode, self._write)):
            threading.Thread(target=self._run, args=(stage, n), name=stage.__name__.strip("_"), daemon=True).start()

    def submit(self, job: Job) -> None:
        """Begin a job that has a request."""
        self._inboxes[0].put((job, job.request))

    def close(self) -> None:
        """End the threads, each when it has finished what it is at; nobody waits for them."""
        for inbox in self._inboxes:
            inbox.put(None)

    def _run(self, stage: Callable[[Job, Any], Any], n: int) -> None:
        while self._step(stage, n):
            pass

    def _step(self, stage: Callable[[Job, Any], Any], n: int) -> bool:
        """One job. A function of its own, so that nothing keeps the job's tensors while the thread waits for the next."""
        item = self._inboxes[n].get()
        if item is None:
            return False
        job, value = item
        if job.dropped:
            return True
        try:
            result = stage(job, value)
        except Exception as exc:
            result = exc
        if isinstance(result, SuccessResponse | Exception):
            self._report(job, result)
        else:
            self._inboxes[n + 1].put((job, result))
        return True

    def _prepare(self, _: Job, request: Any) -> Prepared | SuccessResponse:
        """A request that comes again and whose files are whole needs no work."""
        return self._encoder.stored_answer(request) or self._encoder.prepare(request)

    def _encode(self, job: Job, prepared: Prepared) -> Encoded:
        job.encoding = True
        return self._encoder.encode_prepared(prepared)

    def _write(self, _: Job, encoded: Encoded) -> SuccessResponse:
        return self._encoder.write(encoded)
