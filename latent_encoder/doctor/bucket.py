"""Checks of a folder in a bucket: the calls that the service makes there are tried."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from latent_encoder.doctor.check import Check, cross, tick, warning
from latent_encoder.outputs.checksums import checksum
from latent_encoder.outputs.locks import LOCK, PREFIX
from latent_encoder.storage.listing import Listed
from latent_encoder.storage.stores import Conflict, NotThere, Refused, Store, Version

GRANTS = {
    "s3": "s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket",
    "gs": "storage.objects.get, .create, .delete and .list",
    "az": "the role Storage Blob Data Contributor",
}
"""The permissions for writing; docs/object-storage.md has this table."""

READ_GRANTS = {"s3": "s3:GetObject and s3:ListBucket", "gs": "storage.objects.get and .list", "az": "Storage Blob Data Reader"}


@dataclass
class Tried:
    """A folder of a bucket with its shown name, and a hidden object of this check. No other process uses that name.

    A worker takes the object for an abandoned claim, and removes it after a day if this process is killed.
    """

    shown: str
    folder: str
    store: Store
    name: str = field(default_factory=lambda: f"{PREFIX}{secrets.token_hex(8)}{LOCK}")
    step: str = "list it"
    """The call that is tried."""
    left: bool = False
    """The object may be there."""

    @property
    def scheme(self) -> str:
        return self.store.place.scheme

    @property
    def key(self) -> str:
        return f"{self.folder}/{self.name}" if self.folder else self.name


def check_reading(tried: Tried, first: Listed | None, *, may_list: bool) -> Check:
    """Ask for an object that is not there, and for one that is there if the listing has one.

    Raises:
        Unusable, Unavailable: the storage fails.
    """
    needs = f"Grant {READ_GRANTS[tried.scheme]} to these credentials."
    refused: Refused | None = None
    try:
        if first is not None:
            tried.store.facts(first.key)
        tried.store.read(tried.key)
    except NotThere:
        pass
    except Refused as exc:
        refused = exc
    if refused is None:
        also = "listed and read" if may_list else "read; it may not be listed, which only folders of images need"
        return tick("storage read", f"{tried.shown} can be {also}")
    if may_list:
        return cross("storage read", f"{tried.shown} can be listed, but the storage refuses to read ({refused})", needs)
    found = f"{tried.shown}: the storage refuses to list, and to read an object that is not there ({refused})"
    return warning(
        "storage read", found, f"{needs} Without the permission to list, a missing image is reported as ACCESS_DENIED."
    )


def check_writing(tried: Tried) -> Iterator[Check]:
    """Write, replace, read and remove a hidden object.

    Raises:
        Unusable, Unavailable: the storage fails.
    """
    try:
        try:
            fault = _unconditional(tried, _created(tried))
        finally:
            if tried.left:
                _remove(tried)
        tried.step = "tell that an object is not there, as it does without the permission to list"
        with suppress(NotThere):
            tried.store.read(tried.key)
    except Refused as exc:
        found = f"{tried.shown}: the storage refuses to {tried.step} ({exc}){left_over(tried)}"
        yield cross("storage write", found, f"Grant {GRANTS[tried.scheme]} to these credentials.")
        return
    if fault is not None:
        advice = "Use a storage with conditional writes: without them, two workers could overwrite each other's files."
        yield cross("storage write", f"{tried.shown}: {fault}", advice)
        return
    found = f"{tried.shown}: a hidden object was written, replaced, read and removed; conditions are heeded"
    yield tick("storage write", found)


def left_over(tried: Tried) -> str:
    """Return the note that the hidden object may still be there, empty if it is not."""
    return f"; remove {tried.key}, if it is there" if tried.left else ""


def _created(tried: Tried) -> Version:
    tried.step, tried.left = "write", True
    data = b"doctor\n"
    try:
        return tried.store.put(tried.key, data, checksum(data), None)
    except Refused:
        tried.left = False
        raise
    except Conflict:  # the response to the first attempt was lost
        return tried.store.facts(tried.key).version


def _remove(tried: Tried) -> None:
    before, tried.step = tried.step, "remove"
    tried.store.remove(tried.key)
    tried.step, tried.left = before, False


def _unconditional(tried: Tried, version: Version) -> str | None:
    """Return the condition that the server ignores; None if it heeds both."""
    if _accepts(tried, b"second\n", None):
        return "the server ignores If-None-Match"
    if not _accepts(tried, b"third\n", version):
        return "the server refuses If-Match, although the object is unchanged"
    if _accepts(tried, b"fourth\n", version):
        return "the server ignores If-Match"
    return None


def _accepts(tried: Tried, data: bytes, expected: Version | None) -> bool:
    """Return whether a write with that condition changes the object. If the response to it was lost, the object tells."""
    tried.step = "write"
    try:
        tried.store.put(tried.key, data, checksum(data), expected)
    except Conflict:
        tried.step = "read"
        return tried.store.read(tried.key).data == data
    return True
