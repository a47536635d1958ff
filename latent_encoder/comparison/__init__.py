"""`--mode compare`: encodes an image with ComfyUI's own encoder and with the service's, here and now, and shows both.

Each side is a process of its own, which prepares the image by the same nodes, encodes it several times and ends. So a side's
memory is its own, and two ComfyUI trees can be compared. One side runs at a time.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from config import Settings
from errors import RequestError, SetupError
from latent_encoder.comparison.report import Comparison, as_json, as_text
from latent_encoder.comparison.sides import Result, Side, measured
from latent_encoder.exits import EXIT_ERROR_RESPONSE
from latent_encoder.requests import parse_request
from latent_encoder.telemetry.logs import LogStyle
from latent_encoder.terminal import complain
from models import EncodeRequest

OURS = "Latent Encoder"
COMFYUI = "ComfyUI"


@dataclass(frozen=True)
class View:
    """The ways of a comparison to the person or the program that asked for it."""

    show: Callable[[Comparison], None]
    progress: Callable[[str], None]
    """Takes a line about the side that is measured next."""


def shown_by(echo: Callable[[str], None], comparison: Comparison, *, as_document: bool) -> None:
    """Show a comparison as a line of JSON or as a table."""
    echo(as_json(comparison) if as_document else as_text(comparison, shutil.get_terminal_size().columns))


def run(settings: Settings, paths: Sequence[str], other_tree: Path | None, log_style: LogStyle, view: View) -> int:
    """Compare both encoders on each image.

    Args:
        settings: the settings in force, `without_outputs`.
        paths: the images.
        other_tree: a ComfyUI tree whose own encoder is measured too.
        log_style: the style of the log of the processes.
        view: takes the comparison of each image, and the progress.

    Returns:
        The exit status: 0, or 1 if an image cannot be encoded on a side.

    Raises:
        InvalidRequest: a field of the settings cannot be used for a request.
        SetupError: ComfyUI cannot be loaded.
    """
    sides = sides_of(settings, other_tree)
    fine = True
    with tempfile.TemporaryDirectory(prefix="latent-encoder-compare-") as folder:
        for path in paths:
            request = parse_request({"image_path": path, "output_dir": folder}, settings.request_defaults)
            try:
                found = compared(request, sides, log_style, view.progress)
            except RequestError as exc:
                complain(f"Error: {exc}")
                fine = False
                continue
            view.show(found)
            for result in found.results:
                if result.error:
                    complain(f"Error: {result.side.name}: {result.error}")
                    fine = False
    return 0 if fine else EXIT_ERROR_RESPONSE


def without_outputs(settings: Settings) -> Settings:
    """Return the settings for a comparison: it writes nothing, so no limits on output folders apply, and decodes nothing."""
    changes = {"output_dir": tempfile.gettempdir(), "allowed_output_dirs": None, "preview": False, "roundtrip": False}
    return settings.model_copy(update=changes)


def sides_of(settings: Settings, other_tree: Path | None) -> list[Side]:
    """Return ComfyUI's own encoder in the service's tree, the service's, and ComfyUI's own in another tree if there is one."""
    stock = settings.model_copy(update={"encoder": "stock"})
    sides = [Side(COMFYUI, stock), Side(OURS, settings)]
    if other_tree is not None:
        sides.append(Side(f"{COMFYUI} in {other_tree}", stock.model_copy(update={"comfyui_path": other_tree})))
    return sides


def compared(
    request: EncodeRequest, sides: Sequence[Side], log_style: LogStyle, progress: Callable[[str], None]
) -> Comparison:
    """Return the results of all sides for one image. The service's is measured first, because it checks the image.

    If another side fails, the reason is in the place of its latent: ComfyUI's own encoder may need more memory than there is.

    Raises:
        RequestError: the image or the VAE cannot be used.
        SetupError: ComfyUI cannot be loaded.
    """
    results: dict[str, Result] = {}
    for side in sorted(sides, key=lambda side: side.name != OURS):
        progress(f"{request.image_path}: {side.name} …")
        try:
            results[side.name] = measured(side, request, log_style)
        except (RequestError, SetupError) as exc:
            if side.name == OURS:
                raise
            results[side.name] = Result(side, error=str(exc))
    return Comparison(request, [results[side.name] for side in sides])
