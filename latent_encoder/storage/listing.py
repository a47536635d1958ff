"""The listing of a folder in a bucket, as a stream: memory holds one page of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.locations import ObjectPath
from latent_encoder.storage.stores import store_of


@dataclass(frozen=True)
class Listed:
    """An object in a listing."""

    key: str
    """Its name in the bucket."""
    size: int
    last_modified: datetime


def listed(place: ObjectPath, limits: AllowedUrls, *, recursive: bool) -> Iterator[Listed]:
    """Yield the objects in a folder, with `recursive` those below it too, in the order of the storage.

    Raises:
        NotThere, Refused, Unusable, Unavailable: a call failed, also when it was repeated.
    """
    store, after = store_of(place, limits), None
    folder = f"{place.key}/" if place.key else ""
    while page := store.page(place.key, after):
        after = page[-1]["path"]
        for found in page:
            if recursive or "/" not in found["path"].removeprefix(folder):
                yield Listed(found["path"], found["size"], found["last_modified"])
