"""The files of a publication, on disk or in a bucket: those that are added, and the earlier ones that give way to them."""

from __future__ import annotations

from abc import ABC, abstractmethod


class Staging(ABC):
    """Files that get their names together, and the names whose earlier files are removed with that."""

    def __init__(self, shared_name: str) -> None:
        """`shared_name` is one for all sets of files that have a name in common; if empty, that of the last file counts."""
        self._shared_name = shared_name
        self._outdated: list[str] = []
        """Removed before any file is replaced."""
        self._obsolete: list[str] = []

    @abstractmethod
    def add(self, final: str, data: bytes) -> None:
        """Add a file whose name will be `final`."""

    def add_or_remove(self, final: str, data: bytes | None) -> None:
        """Add a file whose name will be `final`. Without data, let such a file of an earlier run be removed."""
        if data is not None:
            self.add(final, data)
        else:
            self._obsolete.append(final)

    def remove_first(self, name: str) -> None:
        """Let a file be removed before any that it describes is replaced or removed."""
        self._outdated.append(name)

    def keep(self, name: str) -> None:
        """Let an earlier file stay that would have been removed."""
        self._obsolete = [other for other in self._obsolete if other != name]
