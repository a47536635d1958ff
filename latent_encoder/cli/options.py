"""The options of the command line, in the groups that `--help` shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import click
import cloup
from cloup.constraints import mutually_exclusive

from config import VERSION, Settings
from errors import ErrorCode
from latent_encoder.cli.completion import PROG_NAME, SHELLS, Commands, OneOf, files, folders, normalised, script, vae_names
from latent_encoder.cli.parsing import MODES, Choice, FilePath, Group, ManyValues, ModeArgument, OptionalPage
from latent_encoder.kafka.places import Places
from models import Alpha, FileFormat, Fit, UpscaleMethod

METHODS, FORMATS, FITS, ALPHAS = map(get_args, (UpscaleMethod, FileFormat, Fit, Alpha))
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

NOT_BOTH = mutually_exclusive.rephrased(error="--quiet does not go with --verbose or --debug.")

MOMENT = click.DateTime(["%Y-%m-%dT%H:%M:%S%z"])

MIN_RATE = 0.001
"""Dead letters a second: one in 17 minutes. A lower one is probably a mistake, and zero would never end."""

CONTEXT = cloup.Context.settings(
    help_option_names=["-h", "--help"],
    token_normalize_func=normalised,
    max_content_width=100,
    formatter_settings=cloup.HelpFormatter.settings(
        theme=cloup.HelpTheme(
            heading=cloup.Style(bold=True), invoked_command=cloup.Style(bold=True), col1=cloup.Style(fg=cloup.Color.cyan)
        )
    ),
)

EPILOG = """
Defaults come from environment variables or from a file named .env, and there are more settings than options:
docs/configuration.md lists them. Options win over the environment, the environment over .env.
"""


def choice_of(field: str) -> Choice:
    """Return the choice of the values that a setting takes."""
    return Choice(get_args(Settings.model_fields[field].annotation))


def places(text: str) -> Places:
    """Return the places of dead letters that a word names."""
    try:
        return Places.of(text)
    except ValueError as exc:
        raise click.BadParameter(f"{text!r}: {exc}.") from exc


def show_completion(ctx: click.Context, _param: click.Parameter, shell: str | None) -> None:
    """Print the script for the shell, and end."""
    if shell is not None and not ctx.resilient_parsing:
        click.echo(script(ctx.command, shell), nl=False)
        ctx.exit()


MODE = Group("Mode")
IMAGES = Group("Images", "standalone")
COMPARISON = Group("Comparison", "compare")
REQUEST = Group("One request", "standalone", "dlq-replay")
MANY = Group("Many images", "standalone")
PLACE = Group("Where files go", "standalone", "kafka", "inspect", "doctor")
RESULTS = Group("Results", "standalone", "kafka", "doctor", "compare")
MODELS = Group("Models and device", "standalone", "kafka", "inspect", "doctor", "compare")
KAFKA = Group("Kafka", "kafka", "dlq-replay", "doctor")
HEALTH = Group("Health and metrics", "kafka", "health", "doctor")
DEAD_LETTERS = Group("Dead letters", "dlq-replay")
PAGE = Group("Pages", "standalone", "inspect")
REPORT = Group("Reports", "standalone", "inspect", "doctor", "compare")
OUTPUT = Group("Output and logs")

OPTIONS: tuple[Callable[[Any], Any], ...] = (
    cloup.argument(
        "paths",
        cls=ModeArgument,
        modes=("standalone", "inspect", "compare"),
        nargs=-1,
        type=FilePath(),
        metavar="[PATH]...",
        shell_complete=Commands(MODES),
        help="Images, as with --image-path; in inspect mode, latent files.",
    ),
    MODE.option(
        "--mode",
        type=choice_of("mode"),
        metavar="MODE",
        help="See above; standalone is the default. The first word may name the mode instead.",
    ),
    IMAGES.option(
        "--image-path",
        "-i",
        cls=ManyValues,
        type=FilePath(),
        metavar="PATH...",
        shell_complete=files,
        help="JPEGs or PNGs to encode: files, folders and quoted patterns such as 'a/*.png'.",
    ),
    IMAGES.option("--recursive", is_flag=True, help="Take images in subfolders too."),
    IMAGES.option(
        "--input-list",
        type=FilePath(),
        metavar="FILE",
        shell_complete=files,
        help="Requests, one JSON object a line; - is standard input.",
    ),
    REQUEST.option(
        "--request-id",
        metavar="ID",
        help="Id for the request of one image, part of the names of its files; by default the same "
        "for the same image and options. In a replay, only dead "
        "letters of the request with this id.",
    ),
    MANY.option(
        "--name",
        metavar="PATTERN",
        help="Names of the output files, made of {stem}, {id}, {index} and {folder}; by default '{stem}_{id}'.",
    ),
    MANY.option("--force", is_flag=True, help="Encode images that have complete files already too."),
    MANY.option("--fail-fast", is_flag=True, help="Stop at the first image that fails."),
    MANY.option(
        "--workers",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        metavar="N",
        help="Processes that share the images.",
    ),
    PLACE.option(
        "--output-dir",
        "-o",
        type=FilePath(),
        metavar="DIR",
        shell_complete=folders,
        help="Folder for the files; created if missing.",
    ),
    RESULTS.option("--latent-format", metavar="FORMAT", shell_complete=OneOf(FORMATS), help=f"One of {', '.join(FORMATS)}."),
    RESULTS.option("--upscale-method", metavar="METHOD", shell_complete=OneOf(METHODS), help=f"One of {', '.join(METHODS)}."),
    RESULTS.option("--megapixels", type=float, metavar="N", help="Size to scale to, 0.01 to 16; one is 1024 x 1024 pixels."),
    RESULTS.option(
        "--fit", metavar="FIT", shell_complete=OneOf(FITS), help="crop (default), or exact: sizes with nothing to crop."
    ),
    RESULTS.option(
        "--alpha",
        metavar="COLOUR",
        shell_complete=OneOf(ALPHAS),
        help="drop (default): encode the colours under transparency; or black, white, grey: lay the image over that colour.",
    ),
    RESULTS.option("--preview", is_flag=True, default=None, help="Write a preview of the latent, beside the scaled image."),
    RESULTS.option(
        "--roundtrip", is_flag=True, default=None, help="Decode the latent, write that image, and measure its difference."
    ),
    MODELS.option("--vae-model-name", metavar="NAME", shell_complete=vae_names, help="VAE file in the model folders."),
    MODELS.option(
        "--model-dir",
        type=FilePath(),
        metavar="DIR",
        shell_complete=folders,
        help="Folder that is searched first for VAE files.",
    ),
    MODELS.option(
        "--comfyui-path",
        type=FilePath(),
        metavar="DIR",
        shell_complete=folders,
        help="ComfyUI tree to run instead of ./comfyui.",
    ),
    MODELS.option("--device", type=choice_of("device"), help="Device to run on."),
    MODELS.option("--vae-precision", type=choice_of("vae_precision"), help="Precision of the VAE."),
    KAFKA.option("--kafka-bootstrap-servers", metavar="HOST:PORT,…", help="Kafka brokers."),
    KAFKA.option("--request-topic", "kafka_request_topic", metavar="TOPIC", help="Topic of the requests."),
    KAFKA.option("--response-topic", "kafka_response_topic", metavar="TOPIC", help="Topic of the responses."),
    KAFKA.option("--dlq-topic", "kafka_dlq_topic", metavar="TOPIC", help="Topic of the dead letters."),
    KAFKA.option("--consumer-group", "kafka_consumer_group", metavar="GROUP", help="Consumer group of the service."),
    HEALTH.option("--http-port", metavar="PORT", help="Port of health and metrics; 0 turns it off."),
    DEAD_LETTERS.option(
        "--error-code",
        "error_codes",
        type=Choice(ErrorCode),
        metavar="CODE",
        multiple=True,
        help="Only dead letters with this code; may be given several times.",
    ),
    DEAD_LETTERS.option(
        "--since", type=MOMENT, metavar="TIME", help="Only dead letters written at 2026-11-23T12:00:00Z or later."
    ),
    DEAD_LETTERS.option("--until", type=MOMENT, metavar="TIME", help="Only dead letters written before that time."),
    DEAD_LETTERS.option(
        "--dead-letter",
        "places",
        type=places,
        metavar="PLACE",
        multiple=True,
        help="Only those at PARTITION, PARTITION/OFFSET or PARTITION/FIRST-LAST; may be given several times.",
    ),
    DEAD_LETTERS.option("--again", is_flag=True, help="Send dead letters that a replay has sent before too."),
    DEAD_LETTERS.option("--limit", type=click.IntRange(min=1), metavar="N", help="The most dead letters to send."),
    DEAD_LETTERS.option(
        "--rate", type=click.FloatRange(min=MIN_RATE), metavar="N", help="The most dead letters to send in a second."
    ),
    DEAD_LETTERS.option(
        "--dry-run", is_flag=True, help="Send nothing; list the chosen dead letters, and those that were sent before."
    ),
    COMPARISON.option(
        "--comfyui",
        "other_tree",
        type=FilePath(),
        metavar="DIR",
        shell_complete=folders,
        help="Measure the encoder of this ComfyUI tree too.",
    ),
    PAGE.option(
        "--html",
        cls=OptionalPage,
        metavar="[FILE.html]",
        shell_complete=files,
        help="Write a contact sheet: one page with all images and their latents. In inspect mode without FILE.html: a page "
        "for each latent.",
    ),
    REPORT.option("--json", "as_json", is_flag=True, help="Print JSON instead of text, on a terminal too."),
    OUTPUT.option("--quiet", "-q", is_flag=True, help="Errors only: no progress bar, no summary, no warnings."),
    OUTPUT.option("--verbose", "-v", is_flag=True, help="Log each step, as text."),
    OUTPUT.option("--debug", is_flag=True, help="Log everything, with tracebacks."),
    OUTPUT.option("--log-level", metavar="LEVEL", shell_complete=OneOf(LEVELS), help=f"One of {', '.join(LEVELS)}."),
    OUTPUT.option("--log-format", type=choice_of("log_format"), help="Format of the log on standard error."),
    cloup.option(
        "--completion",
        type=Choice(SHELLS),
        is_eager=True,
        expose_value=False,
        callback=show_completion,
        help='Print completion for a shell, as in eval "$(python main.py --completion bash)".',
    ),
    cloup.version_option(VERSION, prog_name=PROG_NAME),
    cloup.constraint(NOT_BOTH, ["quiet", "verbose"]),
    cloup.constraint(NOT_BOTH, ["quiet", "debug"]),
)


def all_options(function: Callable[..., None]) -> Callable[..., None]:
    """Declare the options, in the order above."""
    for declare in reversed(OPTIONS):
        function = declare(function)
    return function
