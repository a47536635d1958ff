"""Standalone mode: the images that the command line names, each answered on standard output, with a progress bar beside it."""

from __future__ import annotations

import json
import os
import signal
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
from errors import LatentEncoderError
from latent_encoder.cli.parsing import EXIT_ERROR_RESPONSE
from latent_encoder.exits import end_at_once
from latent_encoder.standalone.inputs import Inputs, inputs_of
from latent_encoder.standalone.ordering import Batch, Engine, Outcome, Report
from latent_encoder.standalone.selection import ImageSelection, RunOptions
from latent_encoder.telemetry.logs import LogStyle, get_logger
from latent_encoder.terminal import complain, complain_at_once, stdout_on_stderr
from models import ErrorResponse

BAR = "{n_fmt}/{total_fmt}{postfix} |{bar}| {rate_fmt}, {remaining} left"

log = get_logger("latent_encoder")


class OutputFailed(LatentEncoderError):
    """Standard output takes no response any more."""


@dataclass
class Tally:
    """What became of the images so far."""

    started: float = field(default_factory=time.monotonic)
    encoded: int = 0
    stored: int = 0
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        if isinstance(outcome.response, ErrorResponse):
            self.failed[outcome.response.error_code] += 1
        elif outcome.stored:
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
        return f"{counts}, in {timedelta(seconds=round(self.seconds))}{speed}"


class Run:
    """One run of standalone mode. Signals stop it: the first after the images in hand, the second at once."""

    def __init__(self, settings: Settings, inputs: Inputs, options: RunOptions, log_style: LogStyle) -> None:
        self._settings = settings
        self._log_style = log_style
        self._inputs = inputs
        self._options = options
        self._tally = Tally()
        self._signals: list[int] = []
        self._batch = Batch(inputs.items, self._engine)

    def run(self, stdout: int) -> int:
        """Answer each image on the file descriptor `stdout`. Returns the exit status.

        Raises:
            SetupError: the service cannot start.
            OutputFailed: a response cannot be written.
        """
        with self._signals_stop_it(), self._bar() as bar:
            for outcome in self._batch.outcomes():
                self._tally.add(outcome)
                self._write(outcome, stdout, bar)
                bar.set_postfix_str(f"{self._tally.failures} failed", refresh=False)
                bar.update()
                if self._tally.failures and self._options.fail_fast:
                    self._batch.stop()
        self._summarize()
        if self._signals:
            _end_interrupted(self._signals[0], "Interrupted; the same command goes on from here.")
        return EXIT_ERROR_RESPONSE if self._tally.failures else 0

    def _engine(self, report: Report) -> Engine:
        # Imported here, so that --help and wrong usage do not wait for torch.
        from latent_encoder.standalone.engines import InProcess, Processes

        reuse, count = not self._options.force, self._options.workers
        if count == 1 or self._inputs.single:
            return InProcess(self._settings, report, reuse=reuse)
        return Processes(self._settings, report, reuse=reuse, count=count, log_style=self._log_style)

    def _bar(self) -> tqdm[NoReturn]:
        """A progress bar on standard error where that is a terminal, and where there is progress to be seen."""
        hidden = self._options.quiet or self._inputs.single
        shown = None  # where it is a terminal
        return tqdm(
            total=self._inputs.total, unit="image", bar_format=BAR, dynamic_ncols=True, disable=True if hidden else shown
        )

    def _write(self, outcome: Outcome, stdout: int, bar: tqdm[NoReturn]) -> None:
        text = json.dumps(_document(outcome), indent=2 if self._inputs.single else None, ensure_ascii=False)
        try:
            with bar.external_write_mode(file=sys.stderr) if os.isatty(stdout) else nullcontext():  # as both are one terminal
                _write_all(stdout, f"{text}\n".encode())
        except OSError as exc:
            raise OutputFailed(f"Cannot write the response to standard output ({exc.strerror}).") from exc

    def _summarize(self) -> None:
        if self._options.quiet or self._inputs.single:
            return
        if self._log_style.log_format == "json":
            counts = {"encoded": self._tally.encoded, "stored": self._tally.stored, "failed": self._tally.failures}
            log.info("run ended", **counts, seconds=round(self._tally.seconds, 1), interrupted=bool(self._signals))
        else:
            complain(f"{self._tally}.")

    @contextmanager
    def _signals_stop_it(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM lets the images whose encode has begun be finished; the second ends the process."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: object) -> None:
        self._signals.append(number)
        if len(self._signals) == 1 and not self._inputs.single:
            self._batch.stop()
            if sys.stderr.isatty():
                complain_at_once("\nStopping after the images in hand; Ctrl-C again stops at once.\n")
            return
        self._batch.abort()
        _end_interrupted(number, "Interrupted.")


def run(
    settings: Settings, selection: ImageSelection, fields: Mapping[str, Any], options: RunOptions, log_style: LogStyle
) -> int:
    """Encode the images that `selection` says; `fields` are the request's fields that the command line gives.

    Returns the exit status.

    Raises:
        UnusableInputs: there is nothing to encode.
        SetupError: the service cannot start.
        OutputFailed: a response cannot be written.
    """
    inputs = inputs_of(selection, fields, settings.request_defaults)
    with stdout_on_stderr() as stdout:
        return Run(settings, inputs, options, log_style).run(stdout)


def _document(outcome: Outcome) -> dict[str, Any]:
    """The response, with the correlation id of a request that has one."""
    fields = outcome.response.model_dump(mode="json")
    return fields if outcome.correlation_id is None else {**fields, "correlation_id": outcome.correlation_id}


def _write_all(descriptor: int, data: bytes) -> None:
    """Write without a buffer, which would be flushed once more after it could not be."""
    while data:
        data = data[os.write(descriptor, data) :]


def _end_interrupted(number: int, message: str) -> NoReturn:
    """End the process as shells expect of one that a signal ended."""
    complain_at_once(f"Error: {message}\n")
    end_at_once(128 + number)
