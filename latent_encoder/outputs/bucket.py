"""An output folder in a bucket, with the operations that a folder on disk has too."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from errors import OutputDirNotWritable
from latent_encoder.access import AllowedFolders
from latent_encoder.outputs.checksums import checksum
from latent_encoder.storage.locations import ObjectPath
from latent_encoder.storage.retrying import Unavailable, nothing
from latent_encoder.storage.stores import (
    Conflict,
    Content,
    NoBucket,
    NotThere,
    Refused,
    Store,
    Unusable,
    Version,
    fault_of_storage,
    store_of,
)
from latent_encoder.storage.watching import CallThreads

QUICK_S = 5.0
"""Longest time of a call about a small object, in seconds: a third of the time after which a claim counts as abandoned."""

R = TypeVar("R")

CALLS = CallThreads(max_workers=48, thread_name_prefix="storage")
"""Threads for calls of one request side by side, started as they are needed: three for each request that waits."""


@dataclass
class BucketFolder:
    """A folder of a bucket: the objects whose names begin alike. It exists as soon as an object is in it.

    Only an object that is not there raises an OSError, as a file that is not there does. Every other fault raises
    OutputDirNotWritable: an object that cannot be read must not pass for one that is absent.
    """

    path: ObjectPath
    store: Store
    quick: Store
    """The same bucket with a shorter time-out, for objects of some hundred bytes."""
    _known: dict[str, Content | None] | None = None
    """The objects that were read since the claim was taken, by their names; None for each that is absent."""

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Read each object once as long as the context lasts: no other process changes them, because of the claim."""
        self._known = {}
        try:
            yield
        finally:
            self._known = None

    def read(self, name: str) -> bytes:
        """Return the bytes of an object.

        Raises:
            FileNotFoundError: there is none of that name.
        """
        return self.content(name).data

    def content(self, name: str) -> Content:
        """Return an object with its version.

        Raises:
            FileNotFoundError: there is none of that name.
        """
        known = self._known
        if known is None or name not in known:
            found = self._looked_up(name)
            if known is None:
                known = {}
            known[name] = found
        if (content := known[name]) is None:
            raise FileNotFoundError(errno.ENOENT, "No such object", name)
        return content

    def _looked_up(self, name: str) -> Content | None:
        with reported(self.path):
            try:
                return self.store.read(self.key(name))
            except NotThere as exc:
                _refuse_absent_bucket(exc)
                return None

    def _forget(self, name: str) -> None:
        if self._known is not None:
            self._known.pop(name, None)

    def contents(self, names: Sequence[str]) -> Mapping[str, bytes]:
        """Return the bytes of those of the objects that are there, read side by side."""
        found = zip(names, side_by_side([partial(self._content_if_there, name) for name in names]), strict=True)
        return {name: data for name, data in found if data is not None}

    def _content_if_there(self, name: str) -> bytes | None:
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    def has(self, name: str) -> bool:
        """Return whether there is an object of that name."""
        try:
            self.version(name)
        except FileNotFoundError:
            return False
        return True

    def version(self, name: str) -> Version:
        """Return the version of an object.

        Raises:
            FileNotFoundError: there is none of that name.
        """
        with reported(self.path):
            try:
                return self.store.facts(self.key(name)).version
            except NotThere as exc:
                _refuse_absent_bucket(exc)
                raise FileNotFoundError(errno.ENOENT, "No such object", name) from None

    def whole(self, checksums: Mapping[str, str]) -> frozenset[str]:
        """Return the names of the objects that have these checksums.

        The checksum that an object's writer stated, in one step with its bytes, is believed: whoever replaces the object
        replaces it too. An object without one is read.
        """
        found = side_by_side([partial(self._has_checksum, name, sha256) for name, sha256 in checksums.items()])
        return frozenset(name for name, is_whole in zip(checksums, found, strict=True) if is_whole)

    def _has_checksum(self, name: str, sha256: str) -> bool:
        with reported(self.path):
            try:
                stated = self.store.facts(self.key(name)).sha256
                return stated == sha256 if stated is not None else checksum(self.store.read(self.key(name)).data) == sha256
            except NotThere:
                return False

    def put(
        self, name: str, data: bytes, expected: Version | None, before: Callable[[], None] = nothing, *, quick: bool = False
    ) -> Version:
        """Write an object in one step if it has the expected version; None stands for no object.

        `before` is called before each repetition. `quick` is for a small object.

        Raises:
            Conflict: it has another version.
        """
        self._forget(name)
        with reported(self.path):
            try:
                store = self.quick if quick else self.store
                return store.put(self.key(name), data, checksum(data), expected, before)
            except NotThere as exc:  # the bucket; or the object whose version is expected, which another writer removed
                if expected is not None and not isinstance(exc, NoBucket):
                    raise Conflict(str(exc)) from None
                raise Unusable("the bucket does not exist") from None

    def remove(self, name: str) -> None:
        """Remove an object if it exists."""
        self._forget(name)
        with reported(self.path):
            self.quick.remove(self.key(name))

    def key(self, name: str) -> str:
        """Return the name of an object in the bucket."""
        return f"{self.path.key}/{name}" if self.path.key else name


def open_bucket_folder(path: ObjectPath, allowed: AllowedFolders) -> BucketFolder:
    """Return the folder; nothing is called.

    Raises:
        AccessDenied: it is below none of the allowed URLs.
        OutputDirNotWritable: the environment lacks a setting for this storage.
    """
    allowed.urls.check(str(path))
    with reported(path):
        limits = allowed.urls
        return BucketFolder(
            path, store_of(path, limits), store_of(path, replace(limits, timeout_s=min(QUICK_S, limits.timeout_s)))
        )


@contextmanager
def reported(folder: ObjectPath) -> Iterator[None]:
    """Turn a fault of the storage inside into OutputDirNotWritable. A conflict stays, because its meaning differs."""
    try:
        yield
    except (Refused, Unusable, Unavailable) as exc:
        refused = isinstance(exc, Refused)
        cause = OSError(errno.EACCES if refused else errno.EIO, f"the storage refuses: {exc}" if refused else str(exc))
        error = OutputDirNotWritable(f"Cannot write to output folder: {folder} ({cause.strerror})")
        error.storage_fault = fault_of_storage(exc, folder)
        raise error from cause


def side_by_side(calls: Sequence[Callable[[], R]]) -> list[R]:
    """Return the results of calls that run at the same time. All that began have ended, also if one raises its error."""
    running: list[Future[R]] = []
    try:
        running.extend(map(CALLS.submit, calls))  # keeps those that began if another cannot begin
    finally:
        wait(running)
    return [each.result() for each in running]


def _refuse_absent_bucket(exc: NotThere) -> None:
    if isinstance(exc, NoBucket):
        raise Unusable("the bucket does not exist") from None
