"""The listing of a folder in a bucket, as a stream: memory holds one page of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.locations import ObjectPath
from latent_encoder.storage.retrying import repeated
from latent_encoder.storage.stores import NotThere, Refused, Store, Unusable, _translated, store_of

PAGE = 1000
"""Objects in one call: the most that S3 gives."""


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
    store, after, count = store_of(place, limits), None, PAGE
    folder = f"{place.key}/" if place.key else ""
    while count == PAGE:
        page = repeated(lambda after=after: _page(store, place.key, after), limits, f"{place}/")  # type: ignore[misc]
        count = len(page)
        for found in page:
            after = found["path"]
            if recursive or "/" not in after.removeprefix(folder):
                yield Listed(after, found["size"], found["last_modified"])


def _page(store: Store, folder: str, after: str | None) -> list[Any]:
    """Return the objects behind a name. obstore has no classes for the errors of this call."""
    try:
        return _translated(lambda: list(next(iter(store.bucket.list(folder or None, offset=after, chunk_size=PAGE)), [])))
    except Unusable as exc:
        if status := re.match(r"401|403|404", str(exc)):
            raise (NotThere if status[0] == "404" else Refused)(str(exc)) from None
        raise
