"""The engine of a run in this process: its stages prepare, encode and write at the same time."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import BinaryIO

from config import Settings
from errors import UnexpectedError, as_request_error
from latent_encoder.cpus import WAITING, prepare_threads
from latent_encoder.outputs.files import end_writers
from latent_encoder.stages import Stages
from latent_encoder.standalone.ordering import Outcome, Report
from latent_encoder.telemetry.health import Health
from latent_encoder.telemetry.logs import get_logger, log_failure
from models import EncodeRequest, ErrorResponse, SuccessResponse
from service import LatentEncoder

log = get_logger("latent_encoder")

OTHER_STAGES = 2
"""Requests in the stages behind the preparation, one in each."""


def capacity(settings: Settings) -> int:
    """Return the count of requests that keep all stages of one process busy."""
    return prepare_threads(settings) + OTHER_STAGES


@dataclass(eq=False)
class ImageJob:
    """The request for one image, on its way through the stages."""

    number: int
    request: EncodeRequest
    stopping: threading.Event
    encoding: bool = False
    redelivered: bool = False
    held: BinaryIO | None = None
    span: None = None
    origin: None = None
    condemned: bool = False

    @property
    def dropped(self) -> bool:
        """The run is stopping, and the encode has not begun."""
        return self.stopping.is_set() and not self.encoding


class InProcess:
    """The stages of this process: while one image is encoded, the next are prepared and the last is written."""

    def __init__(self, settings: Settings, report: Report, *, reuse: bool, log_failures: bool = True) -> None:
        """With `reuse`, an image whose output files are complete and match is not encoded.

        Without `log_failures`, only failures that may be faults of ours are logged.
        """
        self.capacity = capacity(settings)
        self.capacity_for_urls = self.capacity + WAITING
        self._settings = settings
        self._report = report
        self._reuse = reuse
        self._log_failures = log_failures
        self._stopping = threading.Event()

    def start(self) -> None:
        encoder = LatentEncoder.set_up(self._settings)
        self._stages = Stages[ImageJob](encoder, self._finished, Health(self._settings.encode_timeout_s), reuse=self._reuse)

    def submit(self, number: int, request: EncodeRequest) -> None:
        self._stages.submit(ImageJob(number, request, self._stopping))

    def drop_unstarted(self) -> None:
        self._stopping.set()

    def finish(self) -> None:
        self._stages.close()
        for thread in self._stages.threads:
            thread.join()

    def abort(self) -> None:
        end_writers()

    def _finished(self, job: ImageJob, result: SuccessResponse | BaseException) -> None:
        request_id, about = job.request.request_id, (job.request.image_path, job.request.correlation_id)
        if isinstance(result, SuccessResponse):
            event = "request answered from its files" if job.redelivered else "request encoded"
            log.info(
                event, request_id=result.request_id, latent=result.latent_file_path, **result.metadata.timings_ms.model_dump()
            )
            self._report(job.number, Outcome(result, *about, job.redelivered))
        else:
            error = as_request_error(result)
            if self._log_failures or isinstance(error, UnexpectedError):
                log_failure(error, image=job.request.image_path, request_id=request_id)
            response = ErrorResponse.of(error, request_id, datetime.now(UTC))
            self._report(job.number, Outcome(response, *about))
