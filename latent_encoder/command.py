"""The command line: parses, wires and exits. `latent_encoder/exits.py` has the exit statuses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import click
import cloup

from config import REQUEST_SETTINGS, Settings, usable_settings
from latent_encoder import modes
from latent_encoder.cli.options import CONTEXT, EPILOG, all_options
from latent_encoder.cli.parsing import Command, fail, refuse_options_of_other_modes
from latent_encoder.exits import EXIT_WRONG_USAGE
from latent_encoder.setting_names import warn_of_variables
from latent_encoder.telemetry.logs import LogStyle, configure_logging, log_style
from latent_encoder.torch_caches import limit_torch_caches


@cloup.command(cls=Command, epilog=EPILOG, context_settings=CONTEXT)
@all_options
@click.pass_context
def main(ctx: click.Context, /, **given: Any) -> None:
    """Encode images to the latents that a diffusion model works on, with ComfyUI's own nodes.

    \b
    standalone  encodes images; a line for each, or JSON in a pipe
    kafka       responds to requests from a topic until SIGTERM
    dlq-replay  sends dead letters back to their topic, each once
    health      shows the health of the worker on this machine
    inspect     shows the content of latent files
    doctor      checks the installation
    compare     measures ComfyUI's own encoder and the service's on an image

    The first word may be one of these in place of --mode. A file of such a name is given as ./doctor.

    Results go to standard output, logs to standard error.
    Exit status: 0 success, 1 error response or a worker that is not alive, 2 wrong usage or a
    mistake about the whole run, 3 the service cannot start or go on, 130 interrupted.

    \b
    Examples:
      python main.py -i photo.jpg --preview
      python main.py -i a.png b.png 'c/*.png' --recursive folder -o latents
      python main.py --input-list requests.jsonl --workers 2
      python main.py kafka --kafka-bootstrap-servers localhost:9092
      python main.py dlq-replay --error-code IMAGE_NOT_FOUND --dry-run
      python main.py health
      python main.py photos --roundtrip --html sheet.html
      python main.py inspect output/latent_photo_1.pt --html
      python main.py doctor
      python main.py compare photo.jpg
    """  # noqa: D301  # click needs the character that \b stands for
    settings, faults = settings_of(given)
    if faults and settings.mode != "doctor":
        refuse_settings(settings, faults)
    refuse_options_of_other_modes(ctx, settings)
    style = log_style(settings, **{name: given[name] for name in ("quiet", "verbose", "debug")})
    configure_logging(*style)
    limit_torch_caches()
    sys.exit(run(settings, faults, given, style))


def settings_of(given: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """Return the settings and a list of faults; a setting that cannot be used keeps its default."""
    settings, faults = usable_settings({name: value for name, value in given.items() if name not in REQUEST_SETTINGS})
    if settings.mode != "standalone":  # there, the fields of a request are its own, and a fault of one is an error response
        settings, faults = usable_settings(given)
    return settings, faults


def refuse_settings(settings: Settings, faults: Sequence[str]) -> NoReturn:
    """End the process because settings cannot be used; in standalone mode with one line."""
    reason = f"A setting cannot be used. {'; '.join(faults)}"
    if settings.mode == "standalone":
        fail(reason, EXIT_WRONG_USAGE)
    raise click.UsageError(reason)


def run(settings: Settings, faults: Sequence[str], given: Mapping[str, Any], style: LogStyle) -> int:
    """Run the mode that the settings name, and return its exit status."""
    if settings.mode in ("standalone", "kafka", "dlq-replay"):  # the doctor reports them itself; the others use few settings
        warn_of_variables()
    runs: dict[str, Callable[[], int]] = {
        "standalone": lambda: modes.encode_images(settings, given, style),
        "kafka": lambda: modes.serve(settings),
        "dlq-replay": lambda: modes.replay(settings, given),
        "health": lambda: modes.show_health(settings),
        "inspect": lambda: modes.show_latents(settings, given),
        "doctor": lambda: modes.examine(settings, faults, given),
        "compare": lambda: modes.compare(settings, given, style),
    }
    return runs[settings.mode]()
