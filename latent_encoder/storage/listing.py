"""The listing of a folder in a bucket, page by page: memory holds one page of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.locations import ObjectPath
from latent_encoder.storage.retrying import repeated
from latent_encoder.storage.stores import next_page, store_of

PAGE = 1000
"""Objects of one call: the most that S3 gives."""

LAST = "\U0010ffff"
"""A name after all others in a folder: the last character that there is."""

CAN_BEGIN_ANYWHERE = ("s3",)
"""Storages whose listing begins behind a name by one call. Those of the others are read as one stream: obstore may drop the
names before it on this side."""


@dataclass(frozen=True, slots=True)
class Listed:
    """An object in a listing."""

    key: str
    """Its name in the bucket."""
    size: int
    last_modified: datetime


class Listing:
    """The objects below a folder, in the order of the storage: by the bytes of their names, except in S3's directory buckets.

    Raises, while it is iterated:
        NotThere: there is no such bucket.
        Refused, Unusable, Unavailable: a call failed, also when it was repeated.
    """

    def __init__(self, place: ObjectPath, limits: AllowedUrls, beginning: str = "") -> None:
        """`beginning` limits the listing to names in the folder that begin so."""
        self._place = place
        self._limits = limits
        self._store = store_of(place, limits)
        self._folder = f"{place.key}/" if place.key else ""
        self._start = self._folder + beginning
        self._after = self._start if beginning else None
        self._skipped: str | None = None
        self._pages: Iterator[Any] | None = None
        self.calls = 0
        """The count of pages that were asked for."""

    def __iter__(self) -> Iterator[Listed]:
        page: list[Any] | None = None
        while page is None or len(page) == PAGE:
            page = repeated(self._page, self._limits, f"{self._place}/")
            for found in page:
                key = self._after = found["path"]
                if not key.startswith(self._start):  # behind the beginning; or the marker of the folder itself
                    if key > self._start:
                        return
                    continue
                if self._skipped is None or not key.startswith(self._skipped):
                    yield Listed(key, found["size"], found["last_modified"])
            self._jump()

    def skip(self, folder: str) -> None:
        """Leave out the objects that follow in a folder, whose key ends with `/`."""
        self._skipped = folder

    def _jump(self) -> None:
        """Go on behind the skipped folder if a page ended in it: it may have millions of objects.

        Each page is a listing of its own, because some servers refuse a beginning together with the mark of a next page.
        """
        if self._place.scheme not in CAN_BEGIN_ANYWHERE:
            return
        self._pages = None
        if self._skipped and self._after and self._after.startswith(self._skipped):
            self._after = self._skipped + LAST

    def _page(self) -> list[Any]:
        """Return the next objects, none at the end. After an error, the next call begins behind the last object."""
        pages, self._pages = self._pages, None
        if pages is None:
            pages = iter(self._store.bucket.list(self._place.key or None, offset=self._after, chunk_size=PAGE))
        page = next_page(pages)
        self._pages = pages
        self.calls += 1
        return page


def listed(place: ObjectPath, limits: AllowedUrls, *, recursive: bool) -> Iterator[Listed]:
    """Yield the objects in a folder, with `recursive` those below it too, in the order of the storage.

    Raises:
        NotThere, Refused, Unusable, Unavailable: a call failed, also when it was repeated.
    """
    listing = Listing(place, limits)
    folder = f"{place.key}/" if place.key else ""
    for found in listing:
        name, slash, _ = found.key.removeprefix(folder).partition("/")
        if recursive or not slash:
            yield found
        else:
            listing.skip(f"{folder}{name}/")
