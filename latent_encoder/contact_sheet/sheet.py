"""The sheet while it grows: latents and failures are added one by one, and written as one page at the end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path

from PIL import Image

from config import Settings
from errors import LatentUnreadable, in_utf8, one_line
from latent_encoder.access import AllowedFolders
from latent_encoder.contact_sheet.entries import Entry, Failure, entry_of, shown
from latent_encoder.contact_sheet.page import page_parts
from latent_encoder.contact_sheet.place import SheetRefused
from latent_encoder.contact_sheet.thumbnails import Stored, ThumbnailStore, share_of, thumbnail
from latent_encoder.geometry import Size
from latent_encoder.images.pillow import quiet_pillow
from latent_encoder.inspection.copies import Copies
from latent_encoder.inspection.findings import Inspection, inspect_latent
from latent_encoder.inspection.images import ImageName, Painter, fitting_crop
from latent_encoder.outputs.files import StagedFiles
from latent_encoder.outputs.folder import open_output_folder
from latent_encoder.outputs.png import eight_bits
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder")


class ContactSheet:
    """A contact sheet. Thumbnails go to a temporary file beside it, so memory does not grow with their number."""

    def __init__(self, settings: Settings, place: Path, warn: Callable[[str], None], *, beside_encodes: bool = False) -> None:
        """Begin a sheet for a place that was checked. With `beside_encodes`, other threads of this process may use ComfyUI.

        Raises:
            SheetRefused: thumbnails cannot be stored there.
        """
        self._allowed = AllowedFolders("ALLOWED_OUTPUT_DIRS", settings.allowed_output_dirs)
        self._place = place
        self._warn = warn
        self._painter = Painter(settings, warn, beside_encodes=beside_encodes)
        try:
            self._store = ThumbnailStore(place.parent)
        except OSError as exc:
            raise SheetRefused(f"--html {place}: thumbnails cannot be stored beside it ({one_line(exc)}).") from exc
        self._full = False
        self._expected = 0
        self._entries: list[Entry] = []
        self._failures: list[Failure] = []

    @property
    def count(self) -> int:
        """The number of latents and failures so far."""
        return len(self._entries) + len(self._failures)

    def expect(self, images: int) -> None:
        """Choose the size of thumbnails for that many images. Without it, the images so far decide."""
        self._expected = images

    def add_latent(self, copies: Copies, image_path: str | None = None) -> Inspection | None:
        """Add the latent in a file, and return the findings; None if it cannot be read as a latent, which is a failure."""
        with copies:
            try:
                inspection = inspect_latent(copies)
            except LatentUnreadable as exc:
                self.add_failure(image_path or str(copies.files.latent), "unreadable latent", str(exc))
                return None
            self._entries.append(entry_of(inspection, image_path, self._thumbnails(inspection)))
            return inspection

    def add_failure(self, name: str, code: str, reason: str) -> None:
        """Add an image without a latent, or a latent that cannot be read."""
        self._failures.append(Failure(shown(name), code, shown(reason)))

    def write(self, unfinished: str | None = None) -> None:
        """Write the page so that it appears complete or not at all. Nothing is written if nothing was added.

        Raises:
            AccessDenied, OutputDirNotWritable: it cannot be written.
        """
        with self._store:
            if not self.count:
                return
            parts = page_parts(self._entries, self._failures, self._store, title="Contact sheet", unfinished=unfinished)
            with open_output_folder(self._place.parent, self._allowed) as folder, StagedFiles(folder) as staged:
                staged.add_parts(self._place.name, parts)
                staged.publish()
        log.info(
            "contact sheet written", file=in_utf8(str(self._place)), latents=len(self._entries), failed=len(self._failures)
        )

    def _thumbnails(self, inspection: Inspection) -> dict[str, Stored]:
        """Return the places of the thumbnails of a latent. An image that cannot be shown is left out."""
        most_bytes = share_of(max(self._expected, self.count + 1))
        found = {}
        try:
            for name, image in self._images(inspection).items():
                if image is not None and (data := thumbnail(image, most_bytes)) is not None:
                    found[name] = self._store.add(data)
        except OSError as exc:
            if not self._full:
                self._warn(f"Thumbnails are missing in the contact sheet {self._place}: {one_line(exc)}.")
            self._full = True
        return found

    def _images(self, inspection: Inspection) -> dict[str, Image.Image | None]:
        latent = self._painter.image(inspection)
        compared = inspection.metadata is None or inspection.metadata.roundtrip is not None
        return {
            "scaled_image": self._covered(inspection),
            "latent": None if latent is None else Image.fromarray(eight_bits(latent).numpy()),
            "roundtrip": self._opened(inspection, "roundtrip") if compared else None,
        }

    def _covered(self, inspection: Inspection) -> Image.Image | None:
        """Return the part of the scaled image that the latent covers; None if it belongs to another latent."""
        scaled = self._opened(inspection, "scaled_image")
        crop = fitting_crop(inspection, Size(*scaled.size)) if scaled is not None else None
        return scaled.crop(crop) if scaled is not None and crop is not None else None

    def _opened(self, inspection: Inspection, name: ImageName) -> Image.Image | None:
        data = self._painter.whole(inspection, name)
        if data is None:
            return None
        with suppress(OSError), quiet_pillow(), Image.open(BytesIO(data), formats=("PNG", "JPEG")) as image:
            return image.convert("RGB")
        return None
