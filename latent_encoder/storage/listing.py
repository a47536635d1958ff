"""The listing of a folder in a bucket, as a stream: memory holds one page of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.locations import ObjectPath
from latent_encoder.storage.stores import PAGE, store_of


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
    store, after, page = store_of(place, limits), None, [None] * PAGE
    folder = f"{place.key}/" if place.key else ""
    while len(page) == PAGE:
        page = store.page(place.key, after)
        for found in page:
            after = found["path"]
            if recursive or "/" not in after.removeprefix(folder):
                yield Listed(after, found["size"], found["last_modified"])
