"""Calls to storage, watched: each attempt is counted and timed, and is a span of the request's trace.

Metrics have no bucket, no key and no server as a label, because these have no bound. Spans name them, without a query.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Never, TypeVar, get_args
from urllib.parse import urlsplit

from errors import AccessDenied, ImageInvalid, ImageNotFound
from latent_encoder.masking import masked
from latent_encoder.storage.locations import WEB_PORTS
from latent_encoder.telemetry import tracing
from latent_encoder.telemetry.metrics import STORAGE_BYTES, STORAGE_CALLS, STORAGE_RETRIES, STORAGE_SECONDS

if TYPE_CHECKING:
    from opentelemetry.trace import Span

Operation = Literal["get", "head", "put", "delete", "list"]
Outcome = Literal["ok", "absent", "refused", "conflict", "too_large", "unusable", "unavailable", "failed"]
"""`failed` is an error that this service does not expect, or a stop in the middle of the call."""
Reason = Literal["throttled", "server_error", "timeout", "connection"]
Direction = Literal["in", "out"]

EXPECTED: tuple[Outcome, ...] = ("ok", "absent", "conflict")
"""Outcomes that are no error in a trace: a look at a name that is free, and a condition that does not hold."""

METHODS: dict[Operation, str] = {"get": "GET", "head": "HEAD", "put": "PUT", "delete": "DELETE", "list": "GET"}
OF_S3: dict[Operation, str] = {
    "get": "GetObject",
    "head": "HeadObject",
    "put": "PutObject",
    "delete": "DeleteObject",
    "list": "ListObjectsV2",
}

R = TypeVar("R")


class CallFailed(Exception):
    """A call that failed."""

    outcome: ClassVar[Outcome]


@dataclass
class Attempt:
    """One attempt of a call, and the bytes of bodies that it moved."""

    operation: Operation
    place: str
    received: int = 0
    sent: int = 0

    @property
    def storage(self) -> str:
        """The scheme of the place: `s3`, `gs`, `az`, `https` or `http`."""
        return self.place.partition("://")[0]


_current: ContextVar[Attempt | None] = ContextVar("attempt", default=None)


@contextmanager
def watched(operation: Operation, place: str, repetition: int = 0) -> Iterator[None]:
    """Watch the block as one attempt of a call. `place` is a URL without its query."""
    attempt = Attempt(operation, place)
    begin_counting(attempt.storage)
    token = _current.set(attempt)
    began = time.perf_counter()
    outcome: Outcome = "ok"
    try:
        with tracing.call(f"{attempt.storage} {operation}", lambda: _attributes(attempt, repetition)) as span:
            try:
                yield
            except BaseException as exc:
                outcome = _outcome_of(exc)
                _note_failure(span, outcome, exc)
                raise
            finally:
                _note_bytes(span, attempt)
    finally:
        _current.reset(token)
        STORAGE_SECONDS.labels(attempt.storage, operation).observe(time.perf_counter() - began)
        STORAGE_CALLS.labels(attempt.storage, operation, outcome).inc()


def received(size: int) -> None:
    """Count bytes of an object or an image that the current attempt read."""
    if (attempt := _current.get()) is not None:
        attempt.received += size


def sent(size: int) -> None:
    """Count bytes of an object that the current attempt hands over to be written."""
    if (attempt := _current.get()) is not None:
        attempt.sent += size


def count_retry(place: str, reason: Reason) -> None:
    """Count an attempt that is made again."""
    STORAGE_RETRIES.labels(place.partition("://")[0], reason).inc()


@cache
def begin_counting(storage: str) -> None:
    """Let the counters of a storage begin at zero, so that Prometheus sees the first failure as growth.

    A storage that is not used has no series.
    """
    for operation in ("get",) if storage in WEB_PORTS else METHODS:
        STORAGE_SECONDS.labels(storage, operation)
        for outcome in get_args(Outcome):
            STORAGE_CALLS.labels(storage, operation, outcome)
    for reason in get_args(Reason):
        STORAGE_RETRIES.labels(storage, reason)
    for direction in get_args(Direction):
        STORAGE_BYTES.labels(storage, direction)


class CallThreads(ThreadPoolExecutor):
    """Threads for calls side by side. Each call has the trace of the thread that asked for it."""

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        """Begin a call.

        Raises:
            RuntimeError: no thread can be started. The call is not under way, and will not be made later.
        """
        call = _Call(partial(copy_context().run, fn, *args, **kwargs))
        try:
            return super().submit(call)
        except RuntimeError:  # the call is in the executor's queue nevertheless
            call.withdraw()
            raise


class _Call(Generic[R]):
    """A call that can be withdrawn."""

    def __init__(self, call: Callable[[], R]) -> None:
        self._call = call
        self._lock = threading.Lock()

    def __call__(self) -> R:
        with self._lock:
            return self._call()

    def withdraw(self) -> None:
        """Let the call not begin any more; if it has begun, wait for its end."""
        with self._lock:
            self._call = _withdrawn


def _withdrawn() -> Never:
    raise CancelledError


def _outcome_of(exc: BaseException) -> Outcome:
    match exc:
        case CallFailed():
            return exc.outcome
        case ImageNotFound():
            return "absent"
        case AccessDenied():
            return "refused"
        case ImageInvalid():
            return "unusable"
    return "failed"


def _attributes(attempt: Attempt, repetition: int) -> dict[str, str | int]:
    """Return the attributes of a span by OpenTelemetry's conventions for HTTP and for S3."""
    found: dict[str, str | int] = {"http.request.method": METHODS[attempt.operation], "url.full": attempt.place}
    if repetition:
        found["http.request.resend_count"] = repetition
    if attempt.storage in WEB_PORTS:
        url = urlsplit(attempt.place)
        found |= {"server.address": url.hostname or "", "server.port": url.port or WEB_PORTS[attempt.storage]}
    elif attempt.storage == "s3":
        bucket, _, key = attempt.place.removeprefix("s3://").partition("/")
        found |= {"rpc.system": "aws-api", "rpc.service": "S3", "rpc.method": OF_S3[attempt.operation]}
        found |= {"aws.s3.bucket": bucket, "aws.s3.key": key}
    return found


def _note_bytes(span: Span | None, attempt: Attempt) -> None:
    for direction, name, size in (("in", "response", attempt.received), ("out", "request", attempt.sent)):
        if size:
            STORAGE_BYTES.labels(attempt.storage, direction).inc(size)
            if span is not None:
                span.set_attribute(f"http.{name}.body.size", size)


def _note_failure(span: Span | None, outcome: Outcome, exc: BaseException) -> None:
    if span is None:
        return
    span.set_attribute("error.type", outcome)
    if outcome not in EXPECTED:
        tracing.fail(span, masked(str(exc)))
