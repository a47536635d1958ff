"""The publication of files in a folder of a bucket: together, with the metadata last.

No object is ever visible in part, because each is written by one call. The objects are not renamed: a rename in a bucket is a
copy. So the names get their objects one after the other, under the claim of the name, and the metadata come last.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from errors import OutputDirNotWritable
from latent_encoder.outputs.bucket import BucketFolder, side_by_side
from latent_encoder.outputs.claims import Claim, claimed
from latent_encoder.outputs.locks import key_of
from latent_encoder.outputs.staging import Staging
from latent_encoder.storage.stores import Conflict, Version

ATTEMPTS = 3
"""Attempts to replace an object that changes meanwhile. Under the claim only a process that has lost its own can change it."""

R = TypeVar("R")


class StagedObjects(Staging):
    """Files in memory that get their names in a bucket together when `publish` is called. Nothing is written before.

    `publish` first removes earlier metadata, if there are some. Then it writes the files side by side, each on the condition
    that nobody else does, and last the metadata.

    Raises:
        OutputDirNotWritable: the storage refuses or fails; `publish` may raise it.
    """

    def __init__(self, folder: BucketFolder, shared_name: str = "") -> None:
        """`shared_name` is one for all sets of files that have a name in common, by default that of the last file."""
        super().__init__(shared_name)
        self.folder = folder
        self._staged: list[tuple[str, bytes]] = []
        self._former: dict[str, bytes | None] = {}
        """The former bytes of the names that were changed; None for each that had no object."""
        self._unsure: dict[str, bytes] = {}
        """The bytes of the names whose change failed: the storage may have made it all the same."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._staged.clear()

    def add(self, final: str, data: bytes) -> None:
        """Keep the bytes of a file whose name will be `final`."""
        self._staged.append((final, data))

    def publish(self, instead: Callable[[], R | None] = lambda: None, *, adding: bool = False) -> R | None:
        """Give all files their names, while no other process does so; former files of these names are replaced.

        If `instead` has a result, return it and publish nothing. It is called when no other process can publish. With
        `adding`, the last file describes others too, which stay: the former one is there until the new one replaces it.

        Raises:
            OutputDirNotWritable: the files cannot be published. The former ones are back, or the text tells otherwise.
        """
        shared = self._shared_name or self._staged[-1][0]
        with claimed(self.folder, key_of(shared), shared) as claim, self.folder.remembering():
            found = instead()
            if found is None:
                self._replace(claim, adding=adding)
        return found

    def _replace(self, claim: Claim, *, adding: bool) -> None:
        *files, (last, described) = self._staged
        try:
            former = self._take_away(claim, last, removing=not adding)
            for name in self._outdated:
                self._take_away(claim, name, removing=True)
            claim.keep()
            side_by_side([partial(self._put, claim, name, data) for name, data in files])
            if former is not None or any(data is not None for data in self._former.values()):
                for name in self._obsolete:
                    self._take_away(claim, name, removing=True)
            claim.keep()
            self._put_last(claim, last, described, former if adding else None)
            claim.keep()  # a success is reported only by the process that had the claim when the metadata appeared
        except BaseException as exc:
            self._undo(claim, exc)
            raise

    def _take_away(self, claim: Claim, name: str, *, removing: bool) -> Version | None:
        """Return the version of an object, None if there is none. Remember its bytes, and remove it if `removing`."""
        try:
            found = self.folder.content(name)
        except FileNotFoundError:
            return None
        self._former[name] = found.data
        if removing:
            claim.keep()
            self.folder.remove(name)
        return found.facts.version

    def _put(self, claim: Claim, name: str, data: bytes) -> None:
        """Write an object. One that is there was left by a killed process, or belongs to the metadata that were removed."""
        expected: Version | None = None
        for _ in range(ATTEMPTS):
            self._unsure[name] = data
            try:
                self.folder.put(name, data, expected, claim.keep)
            except Conflict:
                with suppress(FileNotFoundError):
                    found = self.folder.content(name)
                    if found.data == data:
                        del self._unsure[name]
                        return
                    expected = found.facts.version
                    self._former[name] = found.data
                    continue
                expected = None
            else:
                del self._unsure[name]
                self._former.setdefault(name, None)
                return
        raise self._taken(name)

    def _put_last(self, claim: Claim, name: str, data: bytes, expected: Version | None) -> None:
        """Write the metadata. Others that are there by now are of a process that lost its claim, and reports no success."""
        self._unsure[name] = data
        for _ in range(ATTEMPTS):
            try:
                self.folder.put(name, data, expected, claim.keep, quick=True)
            except Conflict:
                expected = None
                with suppress(FileNotFoundError):
                    found = self.folder.content(name)
                    if found.data == data:  # the response to our own write was lost
                        return
                    expected = found.facts.version
                claim.renew()
            else:
                return
        raise self._taken(name)

    def _taken(self, name: str) -> OutputDirNotWritable:
        return OutputDirNotWritable(
            f"Cannot write to output folder: {self.folder.path} (another process wrote {name} at the same time)"
        )

    def _undo(self, claim: Claim, cause: BaseException) -> None:
        """Give each name its former object, the metadata last. Without the claim, the names are another process's."""
        described_by = {self._staged[-1][0], *self._outdated}
        try:
            for name, data in self._unsure.items():
                claim.keep()
                self._remove_ours(name, data)
            for name in sorted(self._former, key=described_by.__contains__):
                claim.keep()
                self._restore(name, self._former[name])
        except (OutputDirNotWritable, Conflict) as exc:
            if any(data is not None for data in self._former.values()):
                raise OutputDirNotWritable(
                    f"Cannot write to output folder: {self.folder.path} ({cause}; the former files cannot be restored: {exc})"
                ) from cause

    def _remove_ours(self, name: str, data: bytes) -> None:
        """Remove an object that was created although its response was lost. One that was there before stays or comes back."""
        if name in self._former:
            return
        with suppress(FileNotFoundError):
            if self.folder.read(name) == data:
                self.folder.remove(name)

    def _restore(self, name: str, data: bytes | None) -> None:
        if data is None:
            self.folder.remove(name)
            return
        try:
            self.folder.put(name, data, None)
        except Conflict:
            self.folder.put(name, data, self.folder.version(name))
