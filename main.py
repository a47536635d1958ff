"""The command line: parses, wires and exits.

Exit status: 0 success, 1 an error response, a worker that is not alive or an installation that does not work, 2 wrong usage or
a setting that cannot be used, 3 the service cannot start or cannot go on, or its response cannot be written, 130 interrupted
(143 by SIGTERM).
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # While the modules below are imported, Ctrl-C just ends the process: there is nothing to tidy up, nor to show.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, NoReturn

import click
import cloup

from config import REQUEST_SETTINGS, Settings, SettingsError, origins_of, usable_settings
from errors import ErrorCode, KafkaFailed, SetupError, one_line
from latent_encoder.access import log_missing_limits
from latent_encoder.cli.options import CONTEXT, EPILOG, all_options
from latent_encoder.cli.parsing import (
    EXIT_ERROR_RESPONSE,
    EXIT_INTERRUPTED,
    EXIT_SERVICE_FAILED,
    EXIT_WRONG_USAGE,
    Command,
    fail,
    refuse_options_of_other_modes,
)
from latent_encoder.exits import end_at_once
from latent_encoder.kafka.replay import Replay, Selection
from latent_encoder.standalone import run as standalone
from latent_encoder.standalone.inputs import UnusableInputs
from latent_encoder.standalone.run import OutputFailed
from latent_encoder.standalone.selection import ImageSelection, RunOptions
from latent_encoder.telemetry.logs import LogStyle, configure_logging, get_logger, log_style
from latent_encoder.terminal import STDOUT, complain, complain_at_once, encodable, stdout_on_stderr

REPLAY_OPTIONS = ("error_codes", "since", "limit", "dry_run")


@cloup.command(cls=Command, epilog=EPILOG, context_settings=CONTEXT)
@all_options
@click.pass_context
def main(ctx: click.Context, /, **given: Any) -> None:
    """Encode images to the latents that a diffusion model works on, with ComfyUI's own nodes.

    \b
    standalone  encodes images; a JSON response for each
    kafka       answers requests from a topic until SIGTERM
    dlq-replay  sends dead letters back to their topic
    health      asks the worker on this machine how it is
    inspect     shows what latent files hold
    doctor      says what of the installation works

    Results go to standard output, logs to standard error.
    Exit status: 0 success, 1 error response or a worker that is not alive, 2 wrong usage, 3 the
    service cannot start or go on, 130 interrupted.

    \b
    Examples:
      python main.py --image_path photo.jpg --preview
      python main.py --image_path a.png b.png 'c/*.png' --recursive folder
      python main.py --input-list requests.jsonl --workers 2
      python main.py --mode kafka --kafka-bootstrap-servers localhost:9092
      python main.py --mode dlq-replay --error-code IMAGE_NOT_FOUND --dry-run
      python main.py --mode health
      python main.py --mode inspect output/latent_photo_1.pt --html
      python main.py --mode doctor
    """  # noqa: D301  # click needs the character that \b stands for
    settings, faults = settings_of(given)
    if faults and settings.mode != "doctor":
        raise click.UsageError(f"A setting cannot be used. {'; '.join(faults)}")
    refuse_options_of_other_modes(ctx, settings)
    style = log_style(settings, **{name: given[name] for name in ("quiet", "verbose", "debug")})
    configure_logging(*style)
    match settings.mode:
        case "kafka":
            serve(settings)
        case "dlq-replay":
            replay(settings, **{name: given[name] for name in REPLAY_OPTIONS})
        case "health":
            show_health(settings)
        case "inspect":
            show_latents(settings, given)
        case "doctor":
            examine(settings, faults, given)
        case _:
            encode_images(settings, given, style)


def settings_of(given: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """The settings with what the command line says, as far as they can be used, and what is wrong with the others."""
    settings, faults = usable_settings({name: value for name, value in given.items() if name not in REQUEST_SETTINGS})
    if settings.mode != "standalone":  # where they are not those of a request, which answers for them
        settings, faults = usable_settings(given)
    return settings, faults


def encode_images(settings: Settings, given: Mapping[str, Any], style: LogStyle) -> NoReturn:
    """Standalone mode."""
    selection = ImageSelection((*given["image_path"], *given["paths"]), given["recursive"], given["input_list"])
    if not selection.paths and selection.input_list is None:
        raise click.UsageError("Standalone mode needs --image_path FILE, or --input-list FILE.")
    if selection.paths and selection.input_list is not None:
        raise click.UsageError("Images come from --image_path or from --input-list, not from both.")
    fields = {name: given[name] for name in ("request_id", *REQUEST_SETTINGS)}
    options = RunOptions(**{name: given[name] for name in ("force", "fail_fast", "workers", "quiet")})
    try:
        sys.exit(standalone.run(settings, selection, fields, options, style))
    except UnusableInputs as exc:
        fail(str(exc), EXIT_WRONG_USAGE)
    except SetupError as exc:
        fail(str(exc), EXIT_SERVICE_FAILED)
    except OutputFailed as exc:
        complain(f"Error: {exc}")
        end_at_once(EXIT_SERVICE_FAILED)


def show_latents(settings: Settings, given: Mapping[str, Any]) -> NoReturn:
    """Inspect mode: what latent files hold."""
    if not given["paths"]:
        raise click.UsageError("Inspect mode needs latent files: python main.py --mode inspect FILE")
    from latent_encoder import inspection  # here, because torch comes with it

    try:
        status = inspection.run(settings, given["paths"], html=given["html"], as_json=given["as_json"], echo=click.echo)
    except OSError as exc:
        fail(f"Cannot write to standard output ({exc.strerror}).", EXIT_SERVICE_FAILED)
    sys.exit(status)


def examine(settings: Settings, faults: Sequence[str], given: Mapping[str, Any]) -> NoReturn:
    """Doctor mode: what of the installation works, even where settings cannot be used; nothing else on standard output."""
    from latent_encoder import doctor

    encoding = sys.stdout.encoding
    try:
        # ComfyUI prints while it is loaded, in the middle of what is told.
        with os.fdopen(os.dup(STDOUT), "w", encoding=encoding) as stdout, stdout_on_stderr():
            status = doctor.run(
                settings,
                origins_of(given),
                faults=faults,
                as_json=given["as_json"],
                echo=lambda text: click.echo(encodable(text, encoding), file=stdout),
            )
    except OSError as exc:
        fail(f"Cannot write the report to standard output ({exc.strerror}).", EXIT_SERVICE_FAILED)
    sys.exit(status)


def serve(settings: Settings) -> NoReturn:
    """Kafka mode, until a signal ends it: the first SIGTERM or SIGINT after the work in hand, the second at once."""
    # Imported here, so that --help and wrong usage do not wait for torch.
    from kafka_handler import KafkaHandler
    from latent_encoder.telemetry import tracing
    from latent_encoder.telemetry.http_server import http_server
    from service import ready_encoder

    log_missing_limits(settings)
    try:
        handler = KafkaHandler(settings)
        stop_on_signals(handler.stop)
        with http_server(settings, handler.health), stdout_on_stderr(), tracing.exported():
            # In a thread that ends, and OpenMP's threads with it: see stages.py.
            with handler.health.busy("start"), ThreadPoolExecutor(max_workers=1) as thread:
                encoder = thread.submit(ready_encoder, settings).result()
            finished = handler.run(encoder)
    except SettingsError as exc:
        raise click.UsageError(f"A setting cannot be used. {exc}") from exc
    except (SetupError, KafkaFailed) as exc:
        complain(f"Error: {exc} What was not answered is not committed.")
        finished = False
    except Exception:
        get_logger("latent_encoder").exception("stopped by an unexpected error, please report it; nothing was lost")
        finished = False
    logging.shutdown()
    # An encode that nobody waits for any more cannot be interrupted: Python's own way out would wait for it, or crash.
    end_at_once(0 if finished else EXIT_SERVICE_FAILED)


def replay(
    settings: Settings, *, error_codes: Sequence[ErrorCode], since: datetime | None, limit: int | None, dry_run: bool
) -> NoReturn:
    """Send dead letters back, with a line for each on standard output and the tally on standard error."""
    run = Replay(settings, Selection(frozenset(error_codes), since, limit), dry_run, report=click.echo)
    try:
        run.run()
    except SettingsError as exc:
        raise click.UsageError(f"A setting cannot be used. {exc}") from exc
    except KafkaFailed as exc:
        fail(f"{exc} So far: {run.tally}.", EXIT_SERVICE_FAILED)
    except OSError as exc:
        fail(f"Cannot write to standard output ({exc.strerror}). So far: {run.tally}.", EXIT_SERVICE_FAILED)
    except KeyboardInterrupt:
        fail(f"Interrupted. So far: {run.tally}.", EXIT_INTERRUPTED)
    complain(f"Dead letters: {run.tally}.")
    sys.exit(EXIT_ERROR_RESPONSE if run.tally.refused else 0)


def show_health(settings: Settings) -> NoReturn:
    """Print what the worker on this machine says of itself."""
    from latent_encoder.telemetry.http_server import ask

    if not settings.http_port:
        raise click.UsageError("HTTP_PORT=0: a worker without an HTTP port cannot be asked.")
    try:
        answer, alive = ask(settings)
    except (OSError, ValueError) as exc:
        fail(f"No worker answers on HTTP_PORT={settings.http_port}: {one_line(exc)}.", EXIT_ERROR_RESPONSE)
    try:
        click.echo(json.dumps(answer, indent=2))
    except OSError as exc:
        fail(f"Cannot write to standard output ({exc.strerror}).", EXIT_SERVICE_FAILED)
    sys.exit(0 if alive else EXIT_ERROR_RESPONSE)


def stop_on_signals(stop: Callable[[], None]) -> None:
    """Call `stop` on the first SIGTERM or SIGINT; end the process on the second."""
    signals: list[int] = []

    def on_signal(number: int, _: object) -> None:
        signals.append(number)
        if len(signals) == 1:
            stop()
        else:
            complain_at_once("Error: Stopped at once by a second signal; what was not answered is delivered again.\n")
            end_at_once(128 + number)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
