"""Standalone mode: a response on standard output for each image, with a progress bar on standard error."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

from tqdm import tqdm

from config import Settings
from errors import LatentEncoderError, in_utf8
from latent_encoder.access import AllowedFolders
from latent_encoder.exits import EXIT_ERROR_RESPONSE, end_by_signal, stop_on_signals
from latent_encoder.standalone.folders import shown_counts
from latent_encoder.standalone.inputs import ImageSelection, Inputs, inputs_of
from latent_encoder.standalone.ordering import Batch, Engine, Outcome, Report
from latent_encoder.telemetry.logs import LogStyle, get_logger
from latent_encoder.terminal import complain, complain_at_once, stdout_on_stderr
from models import ErrorResponse

ALPHA_REMEDY = "--alpha black, white or grey lays the image over that colour"
HIDING = "transparency, whose hidden colours are encoded"
BAR = "{n_fmt}/{total_fmt}{postfix} |{bar}| {rate_fmt}, {remaining} left"

log = get_logger("latent_encoder")


class OutputFailed(LatentEncoderError):
    """Standard output takes no more responses."""


@dataclass(frozen=True)
class RunOptions:
    """The options of a run that are not fields of its requests."""

    force: bool = False
    """Encode images that already have complete, matching output files too."""
    fail_fast: bool = False
    """End the run at the first failure."""
    workers: int = 1
    """The number of processes that share the images."""
    quiet: bool = False
    """Show neither progress bar nor summary."""


@dataclass
class RunTally:
    """The counts of images of a run so far."""

    started: float = field(default_factory=time.monotonic)
    encoded: int = 0
    stored: int = 0
    hiding: int = 0
    """Images with transparency, of which the colours under it were encoded, now or before."""
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        if isinstance(outcome.response, ErrorResponse):
            self.failed[outcome.response.error_code] += 1
            return
        self.hiding += "alpha_dropped" in outcome.response.metadata.image_notes
        if outcome.stored:
            self.stored += 1
        else:
            self.encoded += 1

    @property
    def failures(self) -> int:
        return self.failed.total()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def __str__(self) -> str:
        codes = f" ({', '.join(f'{code}: {count}' for code, count in self.failed.most_common())})" if self.failed else ""
        counts = f"{self.encoded} encoded, {self.stored} done before, {self.failures} failed{codes}"
        speed = f", {60 * self.encoded / self.seconds:.3g} a minute" if self.encoded else ""
        hiding = f"; {self.hiding} with {HIDING} (see --alpha)" if self.hiding else ""
        return f"{counts}, in {timedelta(seconds=round(self.seconds))}{speed}{hiding}"


class Run:
    """One run of standalone mode. The first signal ends it after the encodes that have begun, the second at once."""

    def __init__(self, settings: Settings, inputs: Inputs, options: RunOptions, log_style: LogStyle) -> None:
        self._settings = settings
        self._log_style = log_style
        self._inputs = inputs
        self._options = options
        self._tally = RunTally()
        self._stopped_by: int | None = None
        self._batch = Batch(inputs.items, self._make_engine)

    def run(self, stdout: int) -> int:
        """Write a response for each image to the file descriptor `stdout`, and return the exit status.

        Raises:
            SetupError: the service cannot start.
            OutputFailed: a response cannot be written.
        """
        for folder, reason in self._inputs.unreadable.items():
            log.error("folder cannot be read, its images are left out", folder=in_utf8(folder), reason=reason)
        with self._stopping_on_signals(), self._bar() as bar:
            for outcome in self._batch.outcomes():
                self._tally.add(outcome)
                self._write(outcome, stdout, bar)
                bar.set_postfix_str(f"{self._tally.failures} failed", refresh=False)
                bar.update()
                if self._tally.failures and self._options.fail_fast:
                    self._batch.stop()
        self._summarize()
        if self._stopped_by is not None:
            _end_interrupted(self._stopped_by, "Interrupted; the same command goes on from here.")
        return EXIT_ERROR_RESPONSE if self._tally.failures or self._inputs.unreadable else 0

    def _make_engine(self, report: Report) -> Engine:
        # Imported here, so that --help and wrong usage do not wait for torch.
        from latent_encoder.standalone.engines import InProcess
        from latent_encoder.standalone.worker_processes import Processes

        reuse, count = not self._options.force, self._options.workers
        if count == 1 or self._inputs.single:
            return InProcess(self._settings, report, reuse=reuse)
        return Processes(self._settings, report, reuse=reuse, count=count, log_style=self._log_style)

    def _bar(self) -> tqdm[NoReturn]:
        """Return the progress bar on standard error. It is shown on a terminal, unless the run is quiet or of one image."""
        hidden = self._options.quiet or self._inputs.single
        disable = True if hidden else None  # None: tqdm disables it if standard error is no terminal
        return tqdm(total=self._inputs.total, unit="image", bar_format=BAR, dynamic_ncols=True, disable=disable)

    def _write(self, outcome: Outcome, stdout: int, bar: tqdm[NoReturn]) -> None:
        text = json.dumps(_document(outcome, self._inputs), indent=2 if self._inputs.single else None, ensure_ascii=False)
        try:
            with bar.external_write_mode(file=sys.stderr) if os.isatty(stdout) else nullcontext():  # both on one terminal
                _write_all(stdout, f"{text}\n".encode())
        except OSError as exc:
            raise OutputFailed(f"Cannot write the response to standard output ({exc.strerror}).") from exc

    def _summarize(self) -> None:
        if self._options.quiet:
            return
        if self._inputs.single:
            self._warn_of_hidden_colours()
        elif self._log_style.log_format == "json":
            counts = {"encoded": self._tally.encoded, "stored": self._tally.stored, "failed": self._tally.failures}
            counts["alpha_dropped"] = self._tally.hiding
            log.info(
                "run ended",
                **counts,
                left_out=dict(self._inputs.left_out),
                seconds=round(self._tally.seconds, 1),
                interrupted=self._stopped_by is not None,
            )
        else:
            left_out = shown_counts(self._inputs.left_out)
            complain(f"{self._tally}{left_out and '; '}{left_out}.")

    def _warn_of_hidden_colours(self) -> None:
        """Report, if the only image has transparency, that an invisible background is part of the latent."""
        if not self._tally.hiding:
            return
        if self._log_style.log_format == "json":
            log.warning("image has transparency, and its hidden colours are encoded", remedy=ALPHA_REMEDY)
        else:
            complain(f"Warning: The image has {HIDING}, as in ComfyUI. {ALPHA_REMEDY}.")

    @contextmanager
    def _stopping_on_signals(self) -> Iterator[None]:
        """Let the first SIGINT or SIGTERM stop the run and the second end the process. With one image, the first ends it."""
        restore_handlers = stop_on_signals(self._abort if self._inputs.single else self._stop, self._abort)
        try:
            yield
        finally:
            restore_handlers()

    def _stop(self, number: int) -> None:
        self._stopped_by = number
        self._batch.stop()
        if sys.stderr.isatty():
            complain_at_once("\nStopping after the images in flight; Ctrl-C again stops at once.\n")

    def _abort(self, number: int) -> NoReturn:
        self._batch.abort()
        _end_interrupted(number, "Interrupted.")


def run(
    settings: Settings, selection: ImageSelection, fields: Mapping[str, Any], options: RunOptions, log_style: LogStyle
) -> int:
    """Encode the selected images, and return the exit status.

    Args:
        settings: the settings in force; they have the defaults of the requests.
        selection: the command line's choice of images.
        fields: the request's fields that the command line gives; None for each that it leaves out.
        options: the other options of the run.
        log_style: the style of the worker processes' logs.

    Raises:
        UnusableInputs: there is nothing to encode, or the inputs cannot be read.
        SetupError: the service cannot start.
        OutputFailed: a response cannot be written.
    """
    outputs = AllowedFolders("ALLOWED_OUTPUT_DIRS", settings.allowed_output_dirs)
    inputs = inputs_of(selection, fields, settings.request_defaults, outputs)
    with stdout_on_stderr() as stdout:
        return Run(settings, inputs, options, log_style).run(stdout)


def _document(outcome: Outcome, inputs: Inputs) -> dict[str, Any]:
    """Return the fields of the response, first the image in a run over many, last the correlation id of a request with one."""
    fields = outcome.response.model_dump(mode="json")
    if not inputs.single:
        fields = {"image_path": outcome.image_path and in_utf8(outcome.image_path), **fields}
    return fields if outcome.correlation_id is None else {**fields, "correlation_id": outcome.correlation_id}


def _write_all(descriptor: int, data: bytes) -> None:
    """Write without a buffer: after a failed write, Python would try to flush a buffer again."""
    while data:
        data = data[os.write(descriptor, data) :]


def _end_interrupted(number: int, message: str) -> NoReturn:
    complain_at_once(f"Error: {message}\n")
    end_by_signal(number)
