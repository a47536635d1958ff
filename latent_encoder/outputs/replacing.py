"""The change of several files together: as long as it is not complete, it can be undone."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from latent_encoder.outputs.folder import OutputFolder
from latent_encoder.outputs.locks import PREFIX, REPLACED


class Replacement:
    """Files of a folder that are replaced or removed, one after the other. The former ones are kept until `finish`.

    The caller holds the lock of a name, whose key is in the hidden names of the former files. So a process that starts can
    tell them from files that a killed one left.

    Raises:
        OSError: the file system refuses; each method may raise it.
    """

    def __init__(self, folder: OutputFolder, key: str) -> None:
        self._folder = folder
        self._key = key
        self._former: list[tuple[str, str | None]] = []
        """The names that were changed, each with the hidden name of its former file, or None if it had none."""

    def check(self, names: Iterable[str]) -> None:
        """Raise an OSError if one of the names is that of a folder, which no file replaces. Nothing was changed so far."""
        for name in names:
            if self._folder.has_folder(name):
                raise IsADirectoryError(errno.EISDIR, f"{os.strerror(errno.EISDIR)}: {name}")

    def remove(self, name: str) -> None:
        """Remove the file of that name if it exists."""
        hidden = self._hidden_name()
        if self._hide(name, hidden):
            self._former.append((name, hidden))

    def place(self, temporary: str, name: str) -> None:
        """Give a file that name. If there is another one, the name leads to one of the two at every moment."""
        self._former.append((name, self._keep(name)))
        self._folder.rename(temporary, name)

    def _keep(self, name: str) -> str | None:
        hidden = self._hidden_name()
        try:
            self._folder.link(name, hidden)
        except FileNotFoundError:
            return None
        except OSError:  # the file system has no hard links, or the file is another user's
            return hidden if self._hide(name, hidden) else None
        return hidden

    def _hide(self, name: str, hidden: str) -> bool:
        """Give the file the hidden name, and return whether there was one."""
        try:
            self._folder.rename(name, hidden)
        except FileNotFoundError:
            return False
        return True

    def _hidden_name(self) -> str:
        hidden = f"{PREFIX}{self._key}-{len(self._former)}{REPLACED}"
        self._folder.remove(hidden)  # of a process that was killed
        return hidden

    def undo(self) -> None:
        """Give each name its former file, the last one first."""
        for name, hidden in reversed(self._former):
            if hidden is None:
                self._folder.remove(name)
            else:
                self._folder.rename(hidden, name)
                self._folder.remove(hidden)  # a rename between two names of one file changes nothing

    def finish(self) -> None:
        """Remove the former files."""
        for _, hidden in self._former:
            if hidden is not None:
                self._folder.remove(hidden)
