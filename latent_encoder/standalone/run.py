"""Standalone mode: the outcome of each image on standard output, with the progress on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from config import Settings
from errors import LatentEncoderError, in_utf8
from latent_encoder.access import AllowedFolders
from latent_encoder.exits import EXIT_ERROR_RESPONSE, end_by_signal, stop_on_signals
from latent_encoder.importing import explained_imports
from latent_encoder.installer.sources import version_of
from latent_encoder.standalone import last_words
from latent_encoder.standalone.display import Display, display_for
from latent_encoder.standalone.folders import shown_counts
from latent_encoder.standalone.inputs import ImageSelection, Inputs, inputs_of
from latent_encoder.standalone.ordering import Batch, Engine, Outcome, Report
from latent_encoder.standalone.progress import Progress
from latent_encoder.standalone.tally import HIDING, RunTally
from latent_encoder.telemetry.logs import LogStyle, get_logger
from latent_encoder.terminal import ERASE_LINE, complain, complain_at_once, encodable, is_dumb, stdout_on_stderr

ALPHA_REMEDY = "--alpha black, white or grey lays the image over that colour"

log = get_logger("latent_encoder")


class OutputFailed(LatentEncoderError):
    """Standard output takes no more responses."""


class Sheet(Protocol):
    """A page that collects the outcomes of a run."""

    def expect(self, total: int | None) -> None:
        """Take the number of images of the run; None if it is not known."""

    def add(self, outcome: Outcome) -> None:
        """Add the outcome of one image."""

    def write(self, *, interrupted: bool) -> bool:
        """Write the page with the outcomes so far, and return whether that worked; if not, a line reports it."""


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
    """Show neither progress nor summary."""
    as_json: bool = False
    """Write JSON even if standard output is a terminal."""
    sheet: Sheet | None = None
    """The contact sheet to write."""


class Run:
    """One run of standalone mode. The first signal ends it after the encodes that have begun, the second at once."""

    def __init__(  # noqa: PLR0913  # all that a run consists of
        self,
        settings: Settings,
        selection: ImageSelection,
        inputs: Inputs,
        options: RunOptions,
        log_style: LogStyle,
        *,
        progress: Progress,
        display: Display,
    ) -> None:
        self._settings = settings
        self._selection = selection
        self._log_style = log_style
        self._inputs = inputs
        self._options = options
        self._progress = progress
        self._display = display
        self._tally = RunTally()
        self._stopped_by: int | None = None
        self._sheet_failed = False
        self._batch = Batch(inputs.items, self._make_engine, self._ready)

    def run(self, stdout: int) -> int:
        """Write the outcome of each image to the file descriptor `stdout`, and return the exit status.

        Raises:
            SetupError: the service cannot start.
            OutputFailed: an outcome cannot be written.
        """
        for folder, reason in self._inputs.unreadable.items():
            log.error("folder cannot be read, its images are left out", folder=in_utf8(folder), reason=reason)
        with self._stopping_on_signals():
            with self._sheet_at_the_end(), self._progress:
                for outcome in self._batch.outcomes():
                    self._tally.add(outcome)
                    self._write(stdout, self._display.outcome(outcome))
                    if self._options.sheet is not None:
                        self._options.sheet.add(outcome)
                    self._progress.advance(self._tally.failures)
                    if self._tally.failures and self._options.fail_fast:
                        self._batch.stop()
            self._end(stdout)
        if self._stopped_by is not None:
            _end_interrupted(self._stopped_by, self._last_words)
        return EXIT_ERROR_RESPONSE if self._tally.failures or self._inputs.unreadable or self._sheet_failed else 0

    @contextmanager
    def _sheet_at_the_end(self) -> Iterator[None]:
        """Write the contact sheet, if there is one, of all outcomes inside, even if the run ends early."""
        sheet = self._options.sheet
        if sheet is not None:
            sheet.expect(self._inputs.total)
        try:
            yield
        finally:
            self._sheet_failed = sheet is not None and not sheet.write(interrupted=self._stopped_by is not None)

    def _make_engine(self, report: Report) -> Engine:
        # Imported here, so that --help and wrong usage do not wait for torch.
        with explained_imports():
            from latent_encoder.standalone.engines import InProcess
            from latent_encoder.standalone.worker_processes import Processes

        reuse, count = not self._options.force, self._options.workers
        if count == 1 or self._inputs.single:
            return InProcess(self._settings, report, reuse=reuse, log_failures=self._log_failures)
        return Processes(
            self._settings,
            report,
            reuse=reuse,
            count=count,
            log_style=self._log_style,
            log_failures=self._log_failures,
        )

    @property
    def _log_failures(self) -> bool:
        """Failed images are logged, unless a terminal shows them to the same person."""
        return not (self._display.for_people and self._log_style.watched and sys.stderr.isatty())

    def _ready(self) -> None:
        """Show that images are encoded from now on."""
        if self._inputs.single:
            self._progress.wait_for(f"encoding {os.path.basename(self._selection.paths[0])}")  # noqa: PTH119  # any text
        else:
            self._progress.count(self._inputs.total)

    def _write(self, stdout: int, text: str) -> None:
        try:
            with self._progress.erased() if os.isatty(stdout) else nullcontext():  # both on one terminal
                _write_all(stdout, self._display.encoded(text))
        except OSError as exc:
            raise OutputFailed(f"Cannot write the response to standard output ({exc.strerror}).") from exc

    @property
    def _left(self) -> int | None:
        """The number of images without an outcome; None if it is not known."""
        return None if self._inputs.total is None else self._inputs.total - self._tally.done

    @property
    def _last_words(self) -> str:
        return last_words.interrupted(self._selection, self._left, self._inputs.total, force=self._options.force)

    def _end(self, stdout: int) -> None:
        """Report the end of the run, in words or as an event."""
        if self._options.quiet:
            return
        if self._inputs.single:
            self._warn_of_hidden_colours()
            return
        left_out = shown_counts(self._inputs.left_out)
        summary = f"{self._tally}{left_out and '; '}{left_out}."
        self._write(stdout, self._display.end(summary))
        if self._log_style.log_format == "json":
            self._log_end()
        elif not (self._display.for_people and sys.stderr.isatty()):
            complain(summary)
        if self._options.fail_fast and self._tally.failures and self._stopped_by is None:
            complain(last_words.stopped_by_failure(self._left, self._inputs.total))

    def _log_end(self) -> None:
        counts = {"encoded": self._tally.encoded, "stored": self._tally.stored, "failed": self._tally.failures}
        counts["alpha_dropped"] = self._tally.hiding
        log.info(
            "run ended",
            **counts,
            left=self._left,
            left_out=dict(self._inputs.left_out),
            seconds=round(self._tally.seconds, 1),
            interrupted=self._stopped_by is not None,
        )

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
            complain_at_once(f"{_new_line()}Stopping after the images in flight; Ctrl-C again stops at once.\n")

    def _abort(self, number: int) -> NoReturn:
        self._batch.abort()
        _end_interrupted(number, "Interrupted." if self._inputs.single else self._last_words)


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
    outputs = AllowedFolders.of_outputs(settings)
    with Progress(quiet=options.quiet) as progress, stdout_on_stderr() as stdout:
        loading = f"loading ComfyUI {version_of(settings.comfyui_path) or ''}".rstrip()
        listing = selection.folders_in_buckets
        progress.wait_for(f"listing {listing[0]}" if listing else loading)
        inputs = inputs_of(selection, fields, settings.request_defaults, outputs, AllowedFolders.of_inputs(settings))
        if listing:
            progress.wait_for(loading)
        display = display_for(stdout, inputs, as_json=options.as_json)
        return Run(settings, selection, inputs, options, log_style, progress=progress, display=display).run(stdout)


def _write_all(descriptor: int, data: bytes) -> None:
    """Write without a buffer: after a failed write, Python would try to flush a buffer again."""
    while data:
        data = data[os.write(descriptor, data) :]


def _new_line() -> str:
    """Return the characters that begin a new line on a terminal whose last line may have a bar."""
    if not sys.stderr.isatty():
        return ""
    return "\n" if is_dumb() else ERASE_LINE


def _end_interrupted(number: int, message: str) -> NoReturn:
    complain_at_once(f"{_new_line()}Error: {encodable(message, sys.stderr.encoding)}\n")
    end_by_signal(number)
