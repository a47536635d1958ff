"""The files that a request gets under the settings, and the stored ones that are as good."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from config import Settings
from latent_encoder.outputs.metadata import of_tiles
from latent_encoder.outputs.names import OutputFiles
from latent_encoder.outputs.stored_responses import StoredFiles


@dataclass(frozen=True)
class Wanted:
    """The part of the settings that decides about files."""

    preview: bool
    roundtrip: bool
    tiles: bool
    """A latent may be encoded in tiles."""

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(settings.preview, settings.roundtrip, settings.oom_policy == "tile")

    def files(self, files: OutputFiles) -> frozenset[Path]:
        """Return the files that a request gets, except the metadata."""
        optional = {files.preview: self.preview, files.roundtrip: self.roundtrip}
        return frozenset({files.latent, files.scaled_image, *(path for path, wanted in optional.items() if wanted)})

    def latent_of(self, stored: StoredFiles, *expected: str) -> bool:
        """Return whether stored files have one of the expected fingerprints.

        A latent that was encoded in tiles is one only if OOM_POLICY still allows tiles.
        """
        tiles = map(of_tiles, expected) if self.tiles else ()
        return stored.metadata.fingerprint in (*expected, *tiles)

    def answered_by(self, stored: StoredFiles, expected: str) -> bool:
        """Return whether stored files have the expected fingerprint, and are all that are asked for now."""
        return self.latent_of(stored, expected) and self.files(stored.files) <= stored.whole
