"""The file of a contact sheet: checked before the work begins, so that no run ends without its sheet for a known reason."""

from __future__ import annotations

import os
from pathlib import Path

from config import Settings
from errors import LatentEncoderError, RequestError
from latent_encoder.access import AllowedFolders
from latent_encoder.outputs.files import prepare_output_folder
from latent_encoder.outputs.recognition import is_own_file

ENDING = ".html"

EXPECTED_BYTES = 1_000_000
"""Free space that a sheet needs at least: a sheet of thirty images has about this size."""


class SheetRefused(LatentEncoderError):
    """The contact sheet cannot be written there; the text names the file and the reason."""


def check_place(place: Path, settings: Settings) -> None:
    """Create the folder of the sheet if it is missing, and check that the sheet can be written.

    Raises:
        SheetRefused: it cannot be written, or would replace a file that is no sheet of this service.
    """
    if place.suffix != ENDING or place.is_dir():
        raise SheetRefused(f"--html {place}: the contact sheet is a file whose name ends in {ENDING}.")
    if os.path.lexists(place) and not is_own_file(place.parent, place.name, lambda _: False):
        raise SheetRefused(f"--html {place}: the file is there and is no contact sheet; move it, or choose another name.")
    try:
        allowed = AllowedFolders("ALLOWED_OUTPUT_DIRS", settings.allowed_output_dirs)
        prepare_output_folder(place.parent, allowed, EXPECTED_BYTES)
    except RequestError as exc:
        raise SheetRefused(f"--html {place}: no contact sheet can be written there. {exc}") from exc
