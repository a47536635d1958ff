"""The command line: parses, wires and exits.

Exit status: 0 success, 1 an error response, 2 wrong usage or a setting that cannot be used, 3 the service cannot start or
its response cannot be written, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, NoReturn, get_args

import click

from config import VERSION, Settings, SettingsError, load_settings
from errors import InvalidRequest, SetupError
from logs import configure_logging
from models import EncodeRequest, ErrorResponse, Response, SuccessResponse, UpscaleMethod, request_id_of

STDOUT, STDERR = 1, 2  # file descriptors

EXIT_ERROR_RESPONSE = 1
EXIT_SERVICE_FAILED = 3
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

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
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "max_content_width": 100,
    },
)
@click.option("--mode", type=choice_of("mode"), help="standalone encodes one image (default); kafka serves a topic.")
@click.option("--image-path", metavar="FILE", help="JPEG or PNG to encode. Required in standalone mode.")
@click.option("--vae-model-name", metavar="NAME", help="VAE file in the model folders.")
@click.option("--upscale-method", metavar="METHOD", help=f"One of {', '.join(get_args(UpscaleMethod))}.")
@click.option("--megapixels", type=float, metavar="N", help="Size to scale to, 0.01 to 16; one is 1024 x 1024 pixels.")
@click.option("--output-dir", metavar="DIR", help="Folder for the three files; made if absent.")
@click.option("--request-id", metavar="ID", help="Part of the files' names; a new UUID if absent.")
@click.option("--model-dir", metavar="DIR", help="Folder searched first for VAE files.")
@click.option("--comfyui-path", metavar="DIR", help="ComfyUI tree to run instead of ./comfyui.")
@click.option("--device", type=choice_of("device"), help="Where to run.")
@click.option("--vae-precision", type=choice_of("vae_precision"), help="Precision of the VAE.")
@click.option("--kafka-bootstrap-servers", metavar="HOST:PORT,…", help="Kafka brokers.")
@click.option("--request-topic", "kafka_request_topic", metavar="TOPIC", help="Topic of the requests.")
@click.option("--response-topic", "kafka_response_topic", metavar="TOPIC", help="Topic of the answers.")
@click.option("--consumer-group", "kafka_consumer_group", metavar="GROUP", help="Consumer group of the service.")
@click.option("--log-level", metavar="LEVEL", help="DEBUG, INFO, WARNING or ERROR.")
@click.option("--log-format", type=click.Choice(["json", "text"]), help="How standard error is written.")
@click.version_option(VERSION, prog_name="latent-encoder")
def main(image_path: str | None, request_id: str | None, **options: Any) -> None:
    r"""Encode an image to the latent that a diffusion model works on, with ComfyUI's own nodes.

    Standalone mode prints the response as one JSON document on standard output; logs go to standard error.
    Exit status: 0 success, 1 error response, 2 wrong usage, 3 the service cannot start, 130 interrupted.

    \b
    Example:
      python main.py --image_path photo.jpg --vae_model_name tiny_qwen_vae.safetensors
    """
    request_options = {name: options.pop(name) for name in REQUEST_OPTIONS}
    try:
        settings = load_settings(options)
    except SettingsError as exc:
        raise click.UsageError(f"A setting cannot be used. {exc}") from exc
    configure_logging(settings.log_level, settings.log_format)
    if settings.mode == "kafka":
        raise click.UsageError("Kafka mode is not part of this release yet; use --mode standalone.")
    if image_path is None:
        raise click.UsageError("Standalone mode needs --image_path FILE.")
    try:
        response = standalone(settings, {"image_path": image_path, "request_id": request_id, **request_options})
    except SetupError as exc:
        fail(str(exc), EXIT_SERVICE_FAILED)
    except KeyboardInterrupt:
        fail("Interrupted before the files were written.", EXIT_INTERRUPTED)
    try:
        click.echo(response.model_dump_json(indent=2))
    except OSError as exc:
        fail(f"Cannot write the response to standard output ({exc.strerror}).", EXIT_SERVICE_FAILED)
    sys.exit(0 if isinstance(response, SuccessResponse) else EXIT_ERROR_RESPONSE)


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
    from service import LatentEncoder

    with stdout_on_stderr():
        return LatentEncoder.set_up(settings).answer(request)


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
