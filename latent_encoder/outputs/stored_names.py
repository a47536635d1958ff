"""The names in an output folder of a bucket, by one listing at the beginning of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from latent_encoder.access import AllowedFolders
from latent_encoder.outputs.names import OutputFiles
from latent_encoder.storage.listing import Listing
from latent_encoder.storage.locations import ObjectPath
from latent_encoder.storage.packed import NameDigests
from latent_encoder.storage.retrying import Unavailable
from latent_encoder.storage.stores import NotThere, Refused, Unusable
from latent_encoder.telemetry.logs import get_logger
from models import IMAGE_FILES

log = get_logger("latent_encoder")

BEGINNINGS = ("latent_", *(f"{name}_" for name in IMAGE_FILES))
"""The beginnings of the names of our files."""


@dataclass(frozen=True)
class StoredNames:
    """The names of files that may be ours in an output folder, and of those that the run has given to requests since.

    It may take an absent file for one that is there, which costs calls. It never takes a file for absent that was listed.
    """

    folder: ObjectPath
    deep: bool
    """It has the folders below too, and the names of images. Otherwise it has those of latents and metadata."""
    names: NameDigests

    def cover(self, folder: Path) -> bool:
        """Return whether the listing has that folder."""
        return folder == self.folder or (self.deep and folder.is_relative_to(self.folder))

    def have_metadata(self, files: OutputFiles) -> bool:
        """Return whether metadata of these files may be there, in any format of the latent."""
        return any(str(files.folder / name) in self.names for name in files.metadata_of_all_formats)

    def have(self, files: OutputFiles) -> bool:
        """Return whether any of these files may be there; the listing has to be deep."""
        images = (getattr(files, name) for name in IMAGE_FILES)
        return self.have_metadata(files) or any(str(path) in self.names for path in (files.latent, *images))

    def add(self, files: OutputFiles) -> None:
        """Count these files as written."""
        self.names.add(str(files.metadata))


def names_in(folder: ObjectPath, allowed: AllowedFolders, most_calls: int, *, deep: bool) -> StoredNames | None:
    """List an output folder, by at most `most_calls` calls. `deep` lists the folders below and the names of images too.

    Returns:
        None if that is not enough or a call fails: then each file is looked up.
    """
    listing = Listing(folder, allowed.urls, beginning="" if deep else BEGINNINGS[0])
    found = StoredNames(folder, deep, NameDigests())
    bucket = f"{folder.scheme}://{folder.bucket}"
    try:
        for each in listing:
            if listing.calls > most_calls:
                return None
            if each.key.rpartition("/")[2].startswith(BEGINNINGS):
                found.names.add(f"{bucket}/{each.key}")
    except (NotThere, Refused, Unusable, Unavailable) as exc:
        log.info("output folder cannot be listed, so each file is looked up", folder=str(folder), reason=str(exc))
        return None
    return found
