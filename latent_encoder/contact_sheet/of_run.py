"""The contact sheet of a standalone run: takes its outcomes one by one."""

from __future__ import annotations

from pathlib import Path

from config import Settings
from errors import RequestError
from latent_encoder.contact_sheet.sheet import ContactSheet
from latent_encoder.standalone.ordering import Outcome
from latent_encoder.terminal import complain
from models import ErrorResponse


class RunSheet:
    """The collector of a run's outcomes. It never ends the run: a sheet that cannot be written is reported at the end."""

    def __init__(self, settings: Settings, place: Path, *, workers: int) -> None:
        """With more than one worker, this process has no ComfyUI of its own, and needs its colours only.

        Raises:
            SheetRefused: the sheet cannot be written to that place.
        """
        settings = settings if workers == 1 else settings.model_copy(update={"device": "cpu"})
        self._place = place
        self._sheet = ContactSheet(settings, place, _warn, beside_encodes=workers == 1)
        self._total: int | None = None

    def expect(self, total: int | None) -> None:
        """Take the number of images of the run; None if it is not known."""
        self._total = total
        self._sheet.expect(total or 0)

    def add(self, outcome: Outcome) -> None:
        """Add the outcome of one image."""
        response = outcome.response
        if isinstance(response, ErrorResponse):
            name = outcome.image_path or f"request {response.request_id}"
            self._sheet.add_failure(name, response.error_code, response.error_message)
        else:
            self._sheet.add_latent(Path(response.latent_file_path), outcome.image_path)

    def write(self, *, interrupted: bool) -> bool:
        """Write the sheet of the outcomes so far, and return whether that worked; if not, a line reports it."""
        try:
            self._sheet.write(self._unfinished(interrupted=interrupted))
        except RequestError as exc:
            complain(f"Error: {self._place}: no contact sheet was written. {exc}")
            return False
        return True

    def _unfinished(self, *, interrupted: bool) -> str | None:
        """Return a sentence about the images that are missing; None if none is."""
        if self._total is None:
            return "The run was interrupted: more images may be missing in this sheet." if interrupted else None
        left = self._total - self._sheet.count
        return f"The run ended early: {left} of {self._total} images are not in this sheet." if left else None


def _warn(text: str) -> None:
    complain(f"Warning: {text}")
