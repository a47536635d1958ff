"""The modes of the command line: each function runs one and returns the exit status.

Each imports its own modules inside, because torch takes seconds to import: `--help`, wrong usage and the other modes do not
wait for them.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from config import REQUEST_SETTINGS, Settings, SettingsError, origins_of
from errors import KafkaFailed, LatentEncoderError, RequestError, SetupError, one_line, outside_cause
from latent_encoder.access import AllowedFolders, log_missing_limits
from latent_encoder.cli.parsing import NO_FILE, fail
from latent_encoder.exits import (
    EXIT_ERROR_RESPONSE,
    EXIT_INTERRUPTED,
    EXIT_SERVICE_FAILED,
    EXIT_WRONG_USAGE,
    SIGNAL_BASE,
    end_at_once,
    end_by_signal,
    stop_on_signals,
    wait_heeding_signals,
)
from latent_encoder.importing import explained_imports, require_packages
from latent_encoder.masking import masked
from latent_encoder.requests import request_id_of
from latent_encoder.storage.locations import is_url
from latent_encoder.storage.locations import shown as without_query
from latent_encoder.telemetry.logs import LogStyle, get_logger, log_stray_exceptions
from latent_encoder.terminal import STDOUT, complain, complain_at_once, encodable, show_progress, stdout_on_stderr
from models import ErrorResponse

if TYPE_CHECKING:
    from latent_encoder.contact_sheet.of_run import RunSheet
    from latent_encoder.kafka.replay import Selection
    from latent_encoder.standalone.inputs import ImageSelection

log = get_logger("latent_encoder")


def encode_images(settings: Settings, given: Mapping[str, Any], style: LogStyle) -> int:
    """Run standalone mode. `given` are the command line's options, None for each that it leaves out."""
    _require_packages("standalone")
    with _imports_explained():
        from latent_encoder.contact_sheet.place import SheetRefused
        from latent_encoder.standalone import run as standalone
        from latent_encoder.standalone.early_checks import check_run
        from latent_encoder.standalone.inputs import UnusableInputs

    selection = _selected_images(given)
    fields = {name: given[name] for name in ("request_id", *REQUEST_SETTINGS)}
    names = ("force", "fail_fast", "workers", "quiet", "as_json")
    try:
        options = standalone.RunOptions(**{name: given[name] for name in names}, sheet=_sheet_of_run(settings, given))
        selection = selection.with_folders_marked(AllowedFolders.of_inputs(settings))
        check_run(settings, selection, fields)
        return standalone.run(settings, selection, fields, options, style)
    except RequestError as exc:
        _refuse_run(exc, selection, fields, as_json=given["as_json"])
    except (SheetRefused, UnusableInputs) as exc:
        fail(str(exc), EXIT_WRONG_USAGE)
    except SetupError as exc:
        fail(str(exc), EXIT_SERVICE_FAILED)
    except standalone.OutputFailed as exc:
        complain(f"Error: {exc}")
        end_at_once(EXIT_SERVICE_FAILED)


def _sheet_of_run(settings: Settings, given: Mapping[str, Any]) -> RunSheet | None:
    """Return the contact sheet that `--html FILE` asks for.

    Raises:
        SheetRefused: it cannot be written there.
    """
    if given["html"] is None:
        return None
    if given["html"] == NO_FILE:
        raise click.UsageError("--html needs the name of the contact sheet, which ends in .html: --html sheet.html")
    from latent_encoder.contact_sheet.of_run import RunSheet

    return RunSheet(settings, _place_of_sheet(given["html"]), workers=given["workers"])


def _refuse_run(error: RequestError, selection: ImageSelection, fields: Mapping[str, Any], *, as_json: bool) -> NoReturn:
    """End a run that cannot succeed. A program that waits for the response to a single image gets that too."""
    if selection.single and (as_json or not sys.stdout.isatty()):
        response = ErrorResponse.of(error, request_id_of(fields), datetime.now(UTC))
        try:
            click.echo(json.dumps(response.model_dump(mode="json"), indent=2, ensure_ascii=False).encode())
        except OSError as exc:
            fail(f"Cannot write the response to standard output ({exc.strerror}).", EXIT_SERVICE_FAILED)
    fail(str(error), EXIT_WRONG_USAGE)


def _require_packages(mode: str) -> None:
    """End the process if this Python lacks a package that the mode needs."""
    try:
        require_packages(mode)
    except SetupError as exc:
        fail(str(exc), EXIT_SERVICE_FAILED)


@contextmanager
def _imports_explained() -> Iterator[None]:
    """End the process with an explanation if an import inside fails."""
    try:
        with explained_imports():
            yield
    except SetupError as exc:
        fail(str(exc), EXIT_SERVICE_FAILED)


def _place_of_sheet(html: str) -> Path:
    if is_url(html):
        raise click.UsageError(f"--html {without_query(html)}: the contact sheet is a file on this machine.")
    return Path(html)


def _selected_images(given: Mapping[str, Any]) -> ImageSelection:
    from latent_encoder.standalone.inputs import ImageSelection

    selection = ImageSelection((*given["image_path"], *given["paths"]), given["recursive"], given["input_list"], given["name"])
    if not selection.paths and selection.input_list is None:
        raise click.UsageError("Standalone mode needs --image_path FILE, or --input-list FILE.")
    if selection.paths and selection.input_list is not None:
        raise click.UsageError("Images come from --image_path or from --input-list, not from both.")
    return selection


def serve(settings: Settings) -> NoReturn:
    """Run Kafka mode until a signal: the first SIGTERM or SIGINT ends it after the work in flight, the second at once."""
    _require_packages("kafka")
    log_stray_exceptions()
    log_missing_limits(settings)
    try:
        finished = _served(settings)
    except SettingsError as exc:
        raise click.UsageError(f"A setting cannot be used. {exc}") from None
    except Exception as exc:
        complain(f"Error: {_reason(exc)} Requests without a response are not committed.")
        finished = False
    logging.shutdown()
    # Python's own way out would wait for an encode that nobody needs any more, or crash: an encode cannot be interrupted.
    end_at_once(0 if finished else EXIT_SERVICE_FAILED)


def _reason(exc: Exception) -> str:
    """Return the reason why the service ends, as sentences. The traceback of an error that may be ours goes to the log."""
    if isinstance(exc, LatentEncoderError):
        return str(exc)
    if cause := outside_cause(exc):
        log.debug("the service ends", exc_info=exc)
        return f"The service cannot go on: {cause.removesuffix('.')}."
    log.error("stopped by an unexpected error", exc_info=exc)
    return f"Unexpected error, please report it with the log: {type(exc).__name__}: {one_line(exc).removesuffix('.')}."


def _served(settings: Settings) -> bool:
    """Respond to requests until a signal. Return whether all work in flight was finished."""
    with _imports_explained():
        from kafka_handler import KafkaHandler
        from latent_encoder.start_event import log_start
        from latent_encoder.telemetry import tracing
        from latent_encoder.telemetry.http_server import http_server
        from service import ready_encoder

    handler = KafkaHandler(settings)
    stop_on_signals(lambda _: handler.stop(), _end_kafka_mode)
    with http_server(settings, handler.health), stdout_on_stderr(), tracing.exported():
        # In a thread that ends, and OpenMP's threads with it: see stages.py.
        with handler.health.busy("start"), ThreadPoolExecutor(max_workers=1) as thread:
            starting = thread.submit(ready_encoder, settings)
            wait_heeding_signals(lambda seconds: wait((starting,), seconds).done)
            encoder = starting.result()
        log_start(settings, encoder)
        return handler.run(encoder)


def _end_kafka_mode(number: int) -> NoReturn:
    complain_at_once("Error: Stopped at once by a second signal; requests without a response are delivered again.\n")
    end_by_signal(number)


def replay(settings: Settings, given: Mapping[str, Any]) -> int:
    """Send dead letters back, with a line for each on standard output and the counts on standard error.

    The first SIGTERM or SIGINT ends the replay after the letters under way, the second ends it at once.
    """
    _require_packages("dlq-replay")
    with _imports_explained():
        from latent_encoder.kafka.replay import Replay

    run = Replay(settings, _selected_letters(settings, given), given["dry_run"], report=click.echo, rate=given["rate"])
    signals: list[int] = []

    def on_first_signal(number: int) -> None:
        signals.append(number)
        run.stop()

    restore = stop_on_signals(on_first_signal, _end_replay)
    try:
        run.run()
    except SettingsError as exc:
        raise click.UsageError(f"A setting cannot be used. {exc}") from exc
    except KafkaFailed as exc:
        fail(f"{exc} So far: {run.tally}.", EXIT_SERVICE_FAILED)
    except OSError as exc:
        fail(f"Cannot write to standard output ({exc.strerror}). So far: {run.tally}.", EXIT_SERVICE_FAILED)
    finally:
        restore()
    if signals:
        fail(f"Interrupted. So far: {run.tally}.", SIGNAL_BASE + signals[0])
    complain(f"Dead letters: {run.tally}.")
    return EXIT_ERROR_RESPONSE if run.tally.refused else 0


def _selected_letters(settings: Settings, given: Mapping[str, Any]) -> Selection:
    from latent_encoder.kafka.replay import Selection

    for place in given["places"]:
        if place.topic not in (None, settings.kafka_dlq_topic):
            raise click.UsageError(f"--dead-letter names topic {place.topic}, not the topic {settings.kafka_dlq_topic}.")
    if None not in (given["since"], given["until"]) and given["since"] >= given["until"]:
        raise click.UsageError("--until must be later than --since.")
    names = ("since", "until", "request_id", "limit", "again")
    return Selection(frozenset(given["error_codes"]), places=given["places"], **{name: given[name] for name in names})


def _end_replay(number: int) -> NoReturn:
    complain_at_once(
        "Error: Stopped at once by a second signal; the letters under way were sent and remembered, or neither.\n"
    )
    end_by_signal(number)


def show_health(settings: Settings) -> int:
    """Print the health that the worker on this machine reports."""
    with _imports_explained():
        from latent_encoder.telemetry.http_server import ask

    if not settings.http_port:
        raise click.UsageError("HTTP_PORT=0: a worker without an HTTP port cannot be asked.")
    try:
        health, alive = ask(settings)
    except (OSError, ValueError) as exc:
        fail(f"No worker responds on HTTP_PORT={settings.http_port}: {one_line(exc)}.", EXIT_ERROR_RESPONSE)
    try:
        click.echo(json.dumps(health, indent=2))
    except OSError as exc:
        fail(f"Cannot write to standard output ({exc.strerror}).", EXIT_SERVICE_FAILED)
    return 0 if alive else EXIT_ERROR_RESPONSE


def show_latents(settings: Settings, given: Mapping[str, Any]) -> int:
    """Run inspect mode: show the content of latent files."""
    if not given["paths"]:
        raise click.UsageError("Inspect mode needs latent files: python main.py inspect FILE")
    _require_packages("inspect")
    with _imports_explained():
        from latent_encoder import inspection
        from latent_encoder.storage.stores import require_packages_for

    paths, html, as_json = given["paths"], given["html"], given["as_json"]
    try:
        require_packages_for(*paths, settings.output_dir)
        if html:
            return _sheet_of_latents(settings, paths, _place_of_sheet(html), as_json=as_json)
        return inspection.run(settings, paths, html=html == NO_FILE, as_json=as_json, echo=click.echo)
    except SetupError as exc:
        fail(str(exc), EXIT_SERVICE_FAILED)
    except OSError as exc:
        fail(f"Cannot write to standard output ({exc.strerror}).", EXIT_SERVICE_FAILED)


def _sheet_of_latents(settings: Settings, paths: Sequence[str], place: Path, *, as_json: bool) -> int:
    from latent_encoder.contact_sheet import of_latents
    from latent_encoder.contact_sheet.place import SheetRefused

    try:
        return of_latents.run(settings, paths, place, as_json=as_json, echo=click.echo)
    except SheetRefused as exc:
        fail(str(exc), EXIT_WRONG_USAGE)


def compare(settings: Settings, given: Mapping[str, Any], style: LogStyle) -> int:
    """Run compare mode: JSON if it is asked for or standard output is no terminal, else a table."""
    if not given["paths"]:
        raise click.UsageError("Compare mode needs an image: python main.py compare FILE")
    _require_packages("compare")
    with _imports_explained():
        from latent_encoder import comparison
        from latent_encoder.standalone.early_checks import check_run
        from latent_encoder.standalone.inputs import ImageSelection

    settings = comparison.without_outputs(settings)
    as_document = given["as_json"] or not sys.stdout.isatty()
    watched = sys.stderr.isatty() and not given["quiet"]
    other_tree = None if given["other_tree"] is None else Path(given["other_tree"])

    def echo(text: str) -> None:
        click.echo(encodable(text, sys.stdout.encoding))

    view = comparison.View(
        show=lambda found: comparison.shown_by(echo, found, as_document=as_document),
        progress=complain if watched else lambda _: None,
    )
    try:
        check_run(settings, ImageSelection(tuple(given["paths"])), {})
        return comparison.run(settings, given["paths"], other_tree, style, view)
    except RequestError as exc:
        fail(str(exc), EXIT_WRONG_USAGE)
    except SetupError as exc:
        fail(str(exc), EXIT_SERVICE_FAILED)
    except KeyboardInterrupt:
        fail("Interrupted.", EXIT_INTERRUPTED)
    except OSError as exc:
        fail(f"Cannot write to standard output ({exc.strerror}).", EXIT_SERVICE_FAILED)


def examine(settings: Settings, faults: Sequence[str], given: Mapping[str, Any]) -> int:
    """Run doctor mode, even if settings cannot be used (`faults`). Nothing but the report goes to standard output."""
    from latent_encoder import doctor
    from latent_encoder.doctor import report
    from latent_encoder.doctor.check import Installation

    encoding = sys.stdout.encoding
    try:
        # ComfyUI prints while it is loaded, in the middle of the report.
        with os.fdopen(os.dup(STDOUT), "w", encoding=encoding) as stdout, stdout_on_stderr():
            groups = doctor.examine(Installation(settings, origins_of(given), faults), show_progress)
            text = report.as_json(groups) if given["as_json"] else report.as_text(groups, verbose=given["verbose"])
            click.echo(encodable(masked(text), encoding), file=stdout)
            return doctor.exit_status(groups)
    except OSError as exc:
        fail(f"Cannot write the report to standard output ({exc.strerror}).", EXIT_SERVICE_FAILED)
