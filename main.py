"""The command line: parses, wires and exits.

Exit status: 0 success, 1 an error response or a worker that is not alive, 2 wrong usage or a setting that cannot be used, 3
the service cannot start or cannot go on, or its response cannot be written, 130 interrupted (143 by SIGTERM).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, NoReturn, TypeVar, get_args

import click

from access import log_missing_limits
from config import VERSION, Settings, SettingsError, load_settings
from dlq_replay import Replay, Selection
from errors import ErrorCode, InvalidRequest, KafkaFailed, SetupError, one_line
from logs import configure_logging, get_logger
from models import EncodeRequest, ErrorResponse, Response, SuccessResponse, UpscaleMethod, request_id_of

STDOUT, STDERR = 1, 2  # file descriptors

EXIT_ERROR_RESPONSE = 1
EXIT_SERVICE_FAILED = 3
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

Result = TypeVar("Result")

REPLAY_OPTIONS = ("error_codes", "since", "limit", "dry_run")
REQUEST_OPTIONS = ("vae_model_name", "upscale_method", "megapixels", "output_dir")

EPILOG = """
Defaults come from environment variables or from a file named .env, and there are a few settings more: README.md lists
them. Options win over the environment, the environment over .env.
"""


def choice_of(field: str) -> click.Choice[str]:
    """The values that a setting takes."""
    return click.Choice(get_args(Settings.model_fields[field].annotation))


@click.command(
    epilog=EPILOG,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # Option names with underscores too; error codes have theirs anyhow.
        "token_normalize_func": lambda token: token if token.isupper() else token.replace("_", "-"),
        "max_content_width": 100,
    },
)
@click.option("--mode", type=choice_of("mode"), help="See below; standalone is the default.")
@click.option("--image-path", metavar="FILE", help="JPEG or PNG to encode. Required in standalone mode.")
@click.option("--vae-model-name", metavar="NAME", help="VAE file in the model folders.")
@click.option("--upscale-method", metavar="METHOD", help=f"One of {', '.join(get_args(UpscaleMethod))}.")
@click.option("--megapixels", type=float, metavar="N", help="Size to scale to, 0.01 to 16; one is 1024 x 1024 pixels.")
@click.option("--output-dir", metavar="DIR", help="Folder for the three files; made if absent.")
@click.option("--preview", is_flag=True, default=None, help="Write a picture of the latent beside the scaled image.")
@click.option("--roundtrip", is_flag=True, default=None, help="Decode the latent, write the picture, measure how alike it is.")
@click.option("--request-id", metavar="ID", help="Part of the files' names; a new UUID if absent.")
@click.option("--model-dir", metavar="DIR", help="Folder searched first for VAE files.")
@click.option("--comfyui-path", metavar="DIR", help="ComfyUI tree to run instead of ./comfyui.")
@click.option("--device", type=choice_of("device"), help="Where to run.")
@click.option("--vae-precision", type=choice_of("vae_precision"), help="Precision of the VAE.")
@click.option("--kafka-bootstrap-servers", metavar="HOST:PORT,…", help="Kafka brokers.")
@click.option("--request-topic", "kafka_request_topic", metavar="TOPIC", help="Topic of the requests.")
@click.option("--response-topic", "kafka_response_topic", metavar="TOPIC", help="Topic of the answers.")
@click.option("--dlq-topic", "kafka_dlq_topic", metavar="TOPIC", help="Topic of the dead letters.")
@click.option("--consumer-group", "kafka_consumer_group", metavar="GROUP", help="Consumer group of the service.")
@click.option("--http-port", metavar="PORT", help="kafka, health: port of health and metrics; 0 turns it off.")
@click.option(
    "--error-code",
    "error_codes",
    type=click.Choice(ErrorCode),
    metavar="CODE",
    multiple=True,
    help="dlq-replay: only those with this code; may be given several times.",
)
@click.option(
    "--since",
    type=click.DateTime(["%Y-%m-%dT%H:%M:%S%z"]),
    metavar="TIME",
    help="dlq-replay: only those written at 2026-11-23T12:00:00Z or later.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="dlq-replay: at most so many.")
@click.option("--dry-run", is_flag=True, help="dlq-replay: send nothing, say what would be sent.")
@click.option("--log-level", metavar="LEVEL", help="DEBUG, INFO, WARNING or ERROR.")
@click.option("--log-format", type=click.Choice(["json", "text"]), help="How standard error is written.")
@click.version_option(VERSION, prog_name="latent-encoder")
def main(image_path: str | None, request_id: str | None, **options: Any) -> None:
    """Encode images to the latents that a diffusion model works on, with ComfyUI's own nodes.

    \b
    standalone  encodes one image; the response is one JSON document on standard output
    kafka       answers requests from a topic until SIGTERM or SIGINT
    dlq-replay  sends dead letters back to their topic; a line of JSON for each
    health      asks the worker on this machine how it is, and prints its answer as JSON

    Logs go to standard error.
    Exit status: 0 success, 1 error response or a worker that is not alive, 2 wrong usage, 3 the
    service cannot start or go on, 130 interrupted.

    \b
    Examples:
      python main.py --image_path photo.jpg --vae_model_name tiny_qwen_vae.safetensors
      python main.py --mode kafka --kafka-bootstrap-servers localhost:9092
      python main.py --mode dlq-replay --error-code OUTPUT_DIR_NOT_WRITABLE --dry-run
    """  # noqa: D301  # click needs the character that \b stands for
    request_options = {name: options.pop(name) for name in REQUEST_OPTIONS}
    replay_options = {name: options.pop(name) for name in REPLAY_OPTIONS}
    try:
        settings = load_settings(options)
        if settings.mode == "kafka":  # where they are what requests get that leave them out
            settings = load_settings({**options, **request_options})
    except SettingsError as exc:
        raise click.UsageError(f"A setting cannot be used. {exc}") from exc
    configure_logging(settings.log_level, settings.log_format)
    if settings.mode == "kafka":
        serve(settings)
    if settings.mode == "dlq-replay":
        replay(settings, **replay_options)
    if settings.mode == "health":
        show_health(settings)
    if image_path is None:
        raise click.UsageError("Standalone mode needs --image_path FILE.")
    try:
        response = standalone(settings, {"image_path": image_path, "request_id": request_id, **request_options})
    except SetupError as exc:
        fail(str(exc), EXIT_SERVICE_FAILED)
    except KeyboardInterrupt:
        click.echo("Error: Interrupted.", err=True)
        os._exit(EXIT_INTERRUPTED)  # an encode cannot be interrupted, and Python's own way out would wait for it
    try:
        click.echo(response.model_dump_json(indent=2))
    except OSError as exc:
        fail(f"Cannot write the response to standard output ({exc.strerror}).", EXIT_SERVICE_FAILED)
    sys.exit(0 if isinstance(response, SuccessResponse) else EXIT_ERROR_RESPONSE)


def serve(settings: Settings) -> NoReturn:
    """Kafka mode, until a signal ends it: the first SIGTERM or SIGINT after the work in hand, the second at once."""
    # Imported here, so that --help and wrong usage do not wait for torch.
    import tracing
    from http_server import http_server
    from kafka_handler import KafkaHandler
    from output_files import WRITING
    from service import ready_encoder

    log_missing_limits(settings)
    try:
        handler = KafkaHandler(settings)
        stop_on_signals(handler.stop)
        with http_server(settings, handler.health), stdout_on_stderr(), tracing.exported():
            with handler.health.busy("start"):
                # In a thread that ends, and OpenMP's threads with it: see stages.py.
                encoder = in_a_thread(lambda: ready_encoder(settings), WRITING)
            finished = handler.run(encoder)
    except SettingsError as exc:
        raise click.UsageError(f"A setting cannot be used. {exc}") from exc
    except (SetupError, KafkaFailed) as exc:
        click.echo(f"Error: {exc} What was not answered is not committed.", err=True)
        finished = False
    except Exception:
        get_logger("latent_encoder").exception("stopped by an unexpected error, please report it; nothing was lost")
        finished = False
    logging.shutdown()
    # An encode that nobody waits for any more cannot be interrupted: Python's own way out would wait for it, or crash.
    os._exit(0 if finished else EXIT_SERVICE_FAILED)


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
    except KeyboardInterrupt:
        fail(f"Interrupted. So far: {run.tally}.", EXIT_INTERRUPTED)
    click.echo(f"Dead letters: {run.tally}.", err=True)
    sys.exit(EXIT_ERROR_RESPONSE if run.tally.refused else 0)


def show_health(settings: Settings) -> NoReturn:
    """Print what the worker on this machine says of itself."""
    from http_server import ask

    if not settings.http_port:
        raise click.UsageError("HTTP_PORT=0: a worker without an HTTP port cannot be asked.")
    try:
        answer, alive = ask(settings)
    except (OSError, ValueError) as exc:
        fail(f"No worker answers on HTTP_PORT={settings.http_port}: {one_line(exc)}.", EXIT_ERROR_RESPONSE)
    click.echo(json.dumps(answer, indent=2))
    sys.exit(0 if alive else EXIT_ERROR_RESPONSE)


def stop_on_signals(stop: Callable[[], None]) -> None:
    """Call `stop` on the first SIGTERM or SIGINT; end the process on the second."""
    signals: list[int] = []

    def on_signal(number: int, _: object) -> None:
        signals.append(number)
        if len(signals) == 1:
            stop()
        else:
            os.write(STDERR, b"Error: Stopped at once by a second signal; what was not answered is delivered again.\n")
            os._exit(128 + number)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)


def fail(message: str, status: int) -> NoReturn:
    """End with one line on standard error."""
    click.echo(f"Error: {message}", err=True)
    sys.exit(status)


def standalone(settings: Settings, fields: Mapping[str, Any]) -> Response:
    """The answer to the one request that the command line makes.

    Raises:
        SetupError: the service cannot start.
    """
    try:
        request = EncodeRequest.from_fields(fields, settings.request_defaults)
    except InvalidRequest as exc:
        return ErrorResponse.of(exc, request_id_of(fields), datetime.now(UTC))
    # Imported here, so that --help and wrong usage do not wait for torch.
    from output_files import WRITING
    from service import LatentEncoder

    with stdout_on_stderr():
        return in_a_thread(lambda: LatentEncoder.set_up(settings).answer(request), WRITING)


def in_a_thread(call: Callable[[], Result], writing: threading.Lock) -> Result:
    """What `call` returns or raises. Ctrl-C ends the wait for it, but for files that are being written just then.

    Python raises KeyboardInterrupt in the main thread, wherever that is, and ComfyUI swallows it in many a bare `except:`.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=run, name="request", daemon=True).start()
    try:
        return future.result()
    except KeyboardInterrupt:
        writing.acquire()
        raise


@contextmanager
def stdout_on_stderr() -> Iterator[None]:
    """Send what is printed inside to standard error, so that standard output is the response alone.

    By file descriptor: custom node packages start child processes, pip among them, which print too.
    """
    sys.stdout.flush()
    saved = os.dup(STDOUT)
    os.dup2(STDERR, STDOUT)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, STDOUT)
        os.close(saved)


if __name__ == "__main__":
    main()
