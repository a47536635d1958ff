"""A request with the facts that are elsewhere: its earlier files, and the bytes of its image."""

from __future__ import annotations

from dataclasses import dataclass

from latent_encoder.images.source import ImageFile
from latent_encoder.outputs.bucket import CALLS
from latent_encoder.outputs.stored_responses import Found
from latent_encoder.storage.locations import ObjectPath, is_url
from models import EncodeRequest


@dataclass(frozen=True)
class Fetched:
    """A request, the earlier files of its names, and its image. Each is read once, when it is asked for or by `read_ahead`."""

    request: EncodeRequest
    found: Found
    image: ImageFile

    def read_ahead(self, *, reuse: bool) -> None:
        """Read now from storage all that the preparation will ask for, side by side. Files on disk are left to it.

        With `reuse`, the request may get a stored response.

        Raises:
            AccessDenied: the folder is none of those that are allowed.
            OutputDirNotWritable: the bucket of the files cannot be read.
        """
        reading = CALLS.submit(self.image.read_ahead) if is_url(self.image.path) else None
        try:
            if isinstance(self.found.files.folder, ObjectPath):
                self._look_up(reuse=reuse)
        finally:
            if reading is not None:
                reading.result()

    def _look_up(self, *, reuse: bool) -> None:
        stored = self.found.stored if reuse else None
        if stored is None or not (stored.complete and stored.are_of(self.request)):
            _ = self.found.owners
