"""The process that runs the inputs through the real service, and reports the outcome of each."""

from __future__ import annotations

import faulthandler
import logging
import os
import shutil
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from config import Settings
from errors import ErrorCode, MessageUnusable, RequestError
from fuzz.cases import TINY_VAE, Case, Corpus, make_case
from fuzz.pickles import EXECUTED
from fuzz.records import PHOTO
from latent_encoder.kafka.records import Incoming, dead_letter, read_request, response_record, sender_of
from latent_encoder.outputs.latent_files import read_latent_file
from latent_encoder.requests import parse_request
from latent_encoder.telemetry.logs import configure_logging, log_failure
from models import EncodeRequest, ErrorResponse, Response, ResponseMessage, SuccessResponse
from service import LatentEncoder, utc_now

SUCCESS = "success"
OUTPUT = "out"  # in the working folder

# Allowed outcomes of each kind of input. A record may have any error except in the encode.
_VAE = {SUCCESS, ErrorCode.VAE_MODEL_INVALID, ErrorCode.ENCODING_FAILED}
_IMAGE = {SUCCESS, ErrorCode.IMAGE_INVALID, ErrorCode.SCALING_FAILED}
_RECORD = {SUCCESS, *ErrorCode} - {ErrorCode.ENCODING_FAILED, ErrorCode.RESPONSE_REFUSED}
EXPECTED = {"png": _IMAGE, "jpeg": _IMAGE, "safetensors": _VAE, "pickle": _VAE, "json": _RECORD}


class Folders(NamedTuple):
    """The folders and files of a run."""

    root: Path

    @property
    def corpus(self) -> Path:
        return self.root / "corpus"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def inputs(self) -> Path:
        """The folder of the current image."""
        return self.root / "inputs"

    @property
    def work(self) -> Path:
        """The working folder of the process, so that every new file in it is written by the process."""
        return self.root / "work"

    @property
    def log(self) -> Path:
        """The standard error of the process."""
        return self.root / "stderr.log"


@dataclass(frozen=True)
class Result:
    """The outcome of one input. `peak` is the largest resident memory during it, in bytes; `faults` should be empty."""

    number: int
    kind: str
    mutation: str
    response: str
    seconds: float
    peak: int
    faults: tuple[str, ...]


def run(connection: Connection, root: Path, settings: Settings, seed: int) -> None:
    """Send the resident memory after loading, in bytes, and then for each number that comes the result of its input."""
    folders = Folders(root)
    with folders.log.open("ab") as log:
        os.dup2(log.fileno(), 2)
    faulthandler.enable()
    os.chdir(folders.work)
    configure_logging("WARNING", "json")
    complaints = Complaints()
    encoder = LatentEncoder.set_up(settings)
    for name in (TINY_VAE, "pixel_space"):
        encoder.encode(parse_request({"image_path": PHOTO, "vae_model_name": name}, settings.request_defaults))
    shutil.rmtree(OUTPUT)
    fuzzer = Fuzzer(encoder, settings, folders, complaints)
    corpus = Corpus.read(folders.corpus)
    connection.send(peak_memory())
    while (number := connection.recv()) is not None:
        connection.send(fuzzer.result(make_case(corpus, seed, number)))


class Complaints(logging.Handler):
    """Log records that no damaged input may cause: tracebacks, errors, Python's warnings."""

    def __init__(self) -> None:
        super().__init__()
        self._said: list[str] = []
        logging.getLogger().addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.levelno >= logging.ERROR or record.name == "py.warnings":
            cause = f": {record.exc_info[1]!r}" if record.exc_info else ""
            self._said.append(f"logged by {record.name}: {record.getMessage().strip()}{cause}")

    def taken(self) -> list[str]:
        said, self._said = self._said, []
        return said


class Fuzzer:
    """Runs inputs one after the other, and checks the files that each left."""

    def __init__(self, encoder: LatentEncoder, settings: Settings, folders: Folders, complaints: Complaints) -> None:
        self._encoder = encoder
        self._settings = settings
        self._folders = folders
        self._complaints = complaints
        self._own_files = self._files()

    def result(self, case: Case) -> Result:
        judge = self._with_record if case.kind == "json" else self._with_vae if case.is_vae else self._with_image
        log_size = self._folders.log.stat().st_size
        forget_peak()
        start = time.monotonic()
        try:
            said, faults = judge(case)
        except Exception:
            said, faults = "exception", [traceback.format_exc()]
        seconds, peak = time.monotonic() - start, peak_memory()
        if said not in EXPECTED[case.kind] and not faults:
            faults.append(f"the response is {said}")
        faults += self._complaints.taken()
        if "Traceback" in self._log_from(log_size):
            faults.append("a traceback on standard error")
        if Path(EXECUTED).exists():
            faults.append("code in the file was executed")
        self._clean_up()
        return Result(case.number, case.kind, case.mutation, said, seconds, peak, tuple(faults))

    def _with_image(self, case: Case) -> tuple[str, list[str]]:
        path = self._folders.inputs / f"image{case.suffix}"
        path.write_bytes(case.data)
        return self._judged({**case.fields, "image_path": str(path)})

    def _with_vae(self, case: Case) -> tuple[str, list[str]]:
        name = f"damaged{case.suffix}"
        path = self._folders.models / "vae" / name
        path.unlink(missing_ok=True)  # the new file gets a new inode, so that the cache does not take it for the old one
        with path.open("wb") as file:
            file.write(case.data)
            file.truncate(len(case.data) + case.hole)
        try:
            return self._judged({"image_path": PHOTO, "vae_model_name": name})
        finally:
            path.unlink()

    def _with_record(self, case: Case) -> tuple[str, list[str]]:
        """Treat a record as Kafka mode does, without a broker."""
        record = Incoming("requests", 0, case.number, None, None, case.data, ())
        sender = sender_of(record, self._settings.kafka_max_message_bytes)
        try:
            request = self._kept_inside(read_request(record, self._settings))
        except RequestError as exc:
            log_failure(exc, request_id=sender.request_id, attempt=0, **record.place)
            if sender.request_id is not None:
                self._message(record, ErrorResponse.of(exc, sender.request_id, utc_now()), sender.correlation_id)
            if isinstance(exc, MessageUnusable):
                dead_letter(record, exc, 0, self._settings)
            return exc.code, self._left_behind(())
        response, faults = self._responded(request)
        self._message(record, response, request.correlation_id)
        return _said(response), faults

    def _kept_inside(self, request: EncodeRequest) -> EncodeRequest:
        """Return the request with an output folder of this run, and with a size of at most 1 megapixel to save time."""
        folder = Path(request.output_dir).resolve()
        output_dir = request.output_dir if folder.is_relative_to(self._folders.work) else OUTPUT
        return request.model_copy(update={"output_dir": output_dir, "megapixels": min(request.megapixels, 1.0)})

    def _message(self, record: Incoming, response: Response, correlation_id: str | None) -> None:
        message = ResponseMessage.of(response, correlation_id, utc_now())
        made = response_record(record, message, self._settings.kafka_response_topic)
        assert made.value is not None
        assert ResponseMessage.model_validate_json(made.value) == message

    def _judged(self, fields: dict[str, object]) -> tuple[str, list[str]]:
        response, faults = self._responded(parse_request(fields, self._settings.request_defaults))
        return _said(response), faults

    def _responded(self, request: EncodeRequest) -> tuple[Response, list[str]]:
        """Return the service's response, and the faults of the files that belong to it."""
        response = self._encoder.respond(request)
        if isinstance(response, ErrorResponse):
            return response, self._left_behind(())
        expected = (response.latent_file_path, response.scaled_image_path, f"{response.latent_file_path}.json")
        return response, self._left_behind(expected) + self._not_whole(request, response)

    def _left_behind(self, expected: tuple[str, ...]) -> list[str]:
        """Return a fault if files are left over or missing."""
        found, wanted = self._files() - self._own_files, {Path(path).resolve() for path in expected}
        return [f"files that should not be there, or are missing: {found ^ wanted}"] if found != wanted else []

    def _not_whole(self, request: EncodeRequest, response: SuccessResponse) -> list[str]:
        """Return the differences between the files and the response."""
        latent, _ = read_latent_file(Path(response.latent_file_path))
        with Image.open(response.scaled_image_path) as image:
            image.load()
            size = (image.height, image.width, 3)
        faults = []
        if tuple(latent.shape) != response.latent_shape or not latent.isfinite().all():
            faults.append(f"the latent differs from the response: {list(latent.shape)}")
        if size != response.metadata.scaled_image_shape:
            faults.append(f"the scaled image differs from the response: {size}")
        if self._encoder.stored_response(request) != response:
            faults.append("the files do not have the checksums of the response")
        return faults

    def _files(self) -> set[Path]:
        return {path.resolve() for path in self._folders.work.rglob("*") if path.is_file()}

    def _clean_up(self) -> None:
        for entry in self._folders.work.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry not in self._own_files:
                entry.unlink()

    def _log_from(self, place: int) -> str:
        with self._folders.log.open("rb") as log:
            log.seek(place)
            return log.read().decode(errors="replace")


def _said(response: Response) -> str:
    return SUCCESS if isinstance(response, SuccessResponse) else response.error_code


def forget_peak() -> None:
    """Let the kernel measure the peak from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the largest resident memory since `forget_peak`, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
