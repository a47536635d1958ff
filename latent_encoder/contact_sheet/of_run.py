"""The contact sheet of a standalone run: takes its outcomes one by one."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from config import Settings
from errors import RequestError, one_line
from latent_encoder.access import place_of
from latent_encoder.contact_sheet.place import check_place
from latent_encoder.standalone.ordering import Outcome
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.terminal import complain
from models import ErrorResponse

if TYPE_CHECKING:
    from latent_encoder.contact_sheet.sheet import ContactSheet
    from latent_encoder.inspection.copies import Copies

log = get_logger("latent_encoder")


class RunSheet:
    """The collector of a run's outcomes. It never ends the run: a sheet that cannot be written is reported at the end."""

    def __init__(self, settings: Settings, place: Path, *, workers: int) -> None:
        """With more than one worker, this process has no ComfyUI of its own, and needs its colours only.

        Raises:
            SheetRefused: the sheet cannot be written to that place.
        """
        check_place(place, settings)
        self._settings = settings if workers == 1 else settings.model_copy(update={"device": "cpu"})
        self._beside_encodes = workers == 1
        self._place = place
        self._sheet: ContactSheet
        self._total: int | None = None
        self._waiting: deque[tuple[str, str | None, Copies]] = deque()
        """Latents that are fetched, in order, each with the names of its outcome and of its image."""

    def expect(self, total: int | None) -> None:
        """Begin the sheet of that number of images; None if it is not known.

        Raises:
            SheetRefused: thumbnails cannot be stored beside the sheet.
        """
        from latent_encoder.contact_sheet.sheet import ContactSheet  # torch, which takes seconds to import

        self._sheet = ContactSheet(self._settings, self._place, _warn, beside_encodes=self._beside_encodes)
        self._total = total
        self._sheet.expect(total or 0)

    def add(self, outcome: Outcome) -> None:
        """Add the outcome of one image. Whatever happens, the run goes on."""
        response = outcome.response
        name = outcome.image_path or f"request {response.request_id}"
        if isinstance(response, ErrorResponse):
            self._sheet.add_failure(name, response.error_code, response.error_message)
            return
        from latent_encoder.inspection.copies import AHEAD, Copies, Reading

        copies = Copies(place_of(response.latent_file_path), Reading.of(self._settings))
        copies.fetch_ahead()
        self._waiting.append((name, outcome.image_path, copies))
        while self._waiting and (len(self._waiting) > AHEAD or self._waiting[0][2].is_ready):
            self._show(*self._waiting.popleft())

    def _show(self, name: str, image_path: str | None, copies: Copies) -> None:
        try:
            self._sheet.add_latent(copies, image_path)
        except Exception as exc:
            reason = f"{type(exc).__name__}: {one_line(exc)}"
            log.warning("latent is missing in the contact sheet", latent=str(copies.files.latent), reason=reason)
            self._sheet.add_failure(name, "not shown", f"The image was encoded, but cannot be shown here ({reason}).")

    def write(self, *, interrupted: bool) -> bool:
        """Write the sheet of the outcomes so far, and return whether that worked; if not, a line reports it."""
        while self._waiting:
            self._show(*self._waiting.popleft())
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
