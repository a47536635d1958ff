"""The breaker: if the machine is broken, the worker stops taking requests instead of failing them one after the other.

Failures that accuse the same part of the machine, of KAFKA_BREAKER_FAILURES requests in a row, open it. So does one call to
object storage that is out of reach after all repetitions, or that does not take the credentials any more. Then one request is
tried after each wait, and the waits double. A success closes it. Meanwhile no request is given up.
"""

from __future__ import annotations

import errno
from collections.abc import Collection

from config import Settings
from errors import EncodingFailed, OutputDirNotWritable, RequestError, VaeModelNotFound
from latent_encoder.access import place_of
from latent_encoder.kafka.decisions import backoff_s
from latent_encoder.kafka.jobs import Partition, RecordJob, State
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.telemetry.metrics import BREAKER_OPEN

log = get_logger("latent_encoder.kafka")

FRESH_WITHIN_S = 2.0
"""Time for a new request to come as the one to try. A partition that was paused takes up to a second to fetch again."""

BROKEN_VOLUME = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.ENODEV,
    errno.ENXIO,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EMFILE,
    errno.ENFILE,
}
"""Errors of a file system, or of the process, that no request causes: full, read-only, broken, or out of reach."""


def accused(error: RequestError, job: RecordJob, settings: Settings, vaes: Collection[str]) -> str | None:
    """Return the part of the machine that a failure accuses, or None if the request may be at fault.

    `vaes` are the names of the VAEs that have encoded in this process: one that cannot be found now was lost.
    """
    request = job.request
    if request is None:
        return None
    if error.storage_fault is not None:
        return f"object storage {error.storage_fault.name}"
    if isinstance(error, EncodingFailed):
        return "encoder"
    if isinstance(error, VaeModelNotFound) and request.vae_model_name in vaes:
        return "model folder"
    if isinstance(error, OutputDirNotWritable):
        ours = error.errno is not None and _below(request.output_dir, settings.output_dir)
        return f"output folder {request.output_dir}" if ours or error.errno in BROKEN_VOLUME else None
    return None


def _below(folder: str, root: str) -> bool:
    try:
        return place_of(folder).is_relative_to(place_of(root))
    except ValueError:  # no URL of a folder
        return False


class Breaker:
    """The failures in a row, and the request that is tried next. Times are seconds of the monotonic clock."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._failed: dict[str, set[tuple[Partition, int]]] = {}
        self._fault: str | None = None
        self._tries = 0
        self._try_at = 0.0
        BREAKER_OPEN.set(0)

    @property
    def fault(self) -> str | None:
        """The part of the machine that is broken; None if the breaker is closed."""
        return self._fault

    def failed(self, job: RecordJob, fault: str | None, now: float, *, certain: bool = False) -> None:
        """Take the failure of an attempt. A `certain` fault, which no request can cause, opens the breaker at once."""
        if self._fault is not None:
            self._tries += fault is not None
            self._try_at = now + (backoff_s(self._tries, self._settings) if fault is not None else 0)
        elif fault is not None:
            requests = self._failed.setdefault(fault, set())
            requests.add((job.partition, job.record.offset))
            needed = self._settings.kafka_breaker_failures
            if needed and (certain or len(requests) == needed):
                self._open(fault, now)

    def _open(self, fault: str, now: float) -> None:
        self._fault, self._tries = fault, 1
        self._try_at = now + backoff_s(1, self._settings)
        BREAKER_OPEN.set(1)
        log.error("breaker opened, no requests are taken until one succeeds", fault=fault)

    def succeeded(self) -> bool:
        """Take a success; return whether it closed the breaker."""
        self._failed.clear()
        if self._fault is None:
            return False
        log.info("breaker closed", fault=self._fault)
        self._fault = None
        BREAKER_OPEN.set(0)
        return True

    def takes(self, jobs: Collection[RecordJob], now: float) -> bool:
        """Return whether a new request may be taken, with these jobs in the worker."""
        return self._fault is None or (now >= self._try_at and not any(job.begun or _is_fresh(job) for job in jobs))

    def to_try(self, jobs: Collection[RecordJob], now: float) -> list[RecordJob]:
        """Return the job to try while the breaker is open, if any: a fresh one, else the one with the fewest attempts."""
        if now < self._try_at or any(job.begun for job in jobs):
            return []
        fresh = [job for job in jobs if _is_fresh(job)]
        waiting = [job for job in jobs if job.state is State.WAITING] if now >= self._try_at + FRESH_WITHIN_S else []
        return sorted(fresh or waiting, key=lambda job: job.attempts)[:1]


def _is_fresh(job: RecordJob) -> bool:
    return job.state is State.WAITING and not job.attempts
