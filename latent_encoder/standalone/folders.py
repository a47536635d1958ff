"""The walk through folders: the images in them, each once, and a count of everything that is left out.

A file or folder is known by its device and inode, so links make no loops and nothing is taken twice. Links come after
everything that is reached without them: a file keeps its own name if a link leads to it too.
"""

from __future__ import annotations

import os
import stat
from collections import Counter, deque
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from glob import has_magic
from itertools import dropwhile
from pathlib import Path

from latent_encoder.outputs.recognition import is_own_file

Identity = tuple[int, int] | str
"""The device and the inode of a file or folder, or its path without links on a file system that has no inodes."""


class LeftOut(StrEnum):
    """The reasons for which an entry of a folder is left out."""

    ENDING = "other_ending"
    HIDDEN = "hidden"
    OWN_OUTPUT = "own_output"
    SEEN = "seen_before"
    SPECIAL = "special_file"
    SUBFOLDER = "subfolder"
    UNREADABLE = "unreadable_folder"


SHOWN = {
    LeftOut.ENDING: "with another ending",
    LeftOut.HIDDEN: "hidden",
    LeftOut.OWN_OUTPUT: "own output",
    LeftOut.SEEN: "seen before",
    LeftOut.SPECIAL: "special",
    LeftOut.SUBFOLDER: "not entered without --recursive",
    LeftOut.UNREADABLE: "unreadable",
}
"""The words of each reason, after a number."""


def shown_counts(counts: Mapping[str, int]) -> str:
    """Return the counts of everything that was left out, in words; empty if nothing was."""
    shown = [f"{counts[reason]} {words}" for reason, words in SHOWN.items() if counts.get(reason)]
    return f"left out: {', '.join(shown)}" if shown else ""


@dataclass
class Walk:
    """The search for images in folders and patterns, and its results so far."""

    endings: Sequence[str]
    """The ends of the names of images in folders, in lower case. A pattern takes any name."""
    recursive: bool = False
    unreadable: dict[str, str] = field(default_factory=dict)
    """The folders that could not be read, with the system's reasons."""
    _left_out: Counter[LeftOut] = field(default_factory=Counter)
    _noted: set[Path] = field(default_factory=set)
    """The paths of the entries that were counted as left out."""
    _taken: set[Identity] = field(default_factory=set)

    @property
    def counts(self) -> dict[str, int]:
        """The count of everything that was left out so far, by reason."""
        return {reason.value: self._left_out[reason] for reason in LeftOut if self._left_out[reason]}

    def take(self, path: Path) -> bool:
        """Return whether the file is taken for the first time. A path that leads nowhere always is."""
        identity = _identity(path)
        if identity in self._taken:
            self._leave_out(path, LeftOut.SEEN)
            return False
        if identity is not None:
            self._taken.add(identity)
        return True

    def images_in(self, folder: Path) -> list[Path]:
        """Return the images in a folder; links come last."""
        files: list[Path] = []
        links: list[Path] = []
        for place in self._folders_from(folder) if self.recursive else [folder]:
            entries = self._entries(place)
            names = {entry.name for entry in entries}
            for entry in entries:
                reason = self._reason_against(entry, place, names)
                if reason is None:
                    (links if entry.is_symlink() else files).append(place / entry.name)
                elif reason is not LeftOut.SUBFOLDER or not self.recursive:
                    self._leave_out(place / entry.name, reason)
        return files + links

    def matching(self, pattern: str) -> list[Path]:
        """Return the files that a pattern matches, and with `recursive` the images in the folders that it matches."""
        found, folders = [], []
        start, *parts = Path(pattern).parts if pattern.startswith("/") else ("", *Path(pattern).parts)
        for place in dict.fromkeys(self._matches(Path(start), parts)):
            if (state := _state(place)) and stat.S_ISDIR(state.st_mode):
                folders.append(place)
            elif reason := _reason_against_file(place):
                self._leave_out(place, reason)
            else:
                found.append(place)
        for folder in folders if self.recursive else ():
            found += self.images_in(folder)
        return sorted(found, key=_is_link)  # links last, so that a file is taken under a name that is none

    def _reason_against(self, entry: os.DirEntry[str], folder: Path, names: Container[str]) -> LeftOut | None:
        """Return the reason to leave out an entry of a folder with these names; None if it is taken."""
        hidden = entry.name.startswith(".")
        if _is_folder(entry):
            return LeftOut.HIDDEN if hidden else LeftOut.SUBFOLDER
        if is_own_file(folder, entry.name, names.__contains__):
            return LeftOut.OWN_OUTPUT
        if hidden:
            return LeftOut.HIDDEN
        if not entry.name.lower().endswith(tuple(self.endings)):
            return LeftOut.ENDING
        return None if entry.is_file(follow_symlinks=False) else _reason_against_file(folder / entry.name)

    def _folders_from(self, top: Path) -> Iterator[Path]:
        """Yield a folder and those below it, each once: first without following links, then those that links lead to."""
        seen: set[Identity] = set()
        waiting, links = deque([top]), deque[Path]()
        while waiting or links:
            folder = waiting.popleft() if waiting else links.popleft()
            identity = _identity(folder) or str(folder)
            if identity in seen:
                self._leave_out(folder, LeftOut.SEEN)
                continue
            seen.add(identity)
            yield folder
            for entry in self._entries(folder):
                if not entry.name.startswith(".") and _is_folder(entry):
                    (links if entry.is_symlink() else waiting).append(folder / entry.name)

    def _matches(self, folder: Path, parts: Sequence[str]) -> Iterator[Path]:
        """Yield the paths below a folder that match the parts of a pattern. `**` stands for folders to any depth."""
        if not parts:
            yield folder
            return
        part, others = parts[0], parts[1:]
        if part == "**":
            rest = list(dropwhile("**".__eq__, others)) or ["*"]
            for place in self._folders_from(folder):
                yield from self._matches(place, rest)
        elif not has_magic(part):
            if self._has(folder, part):
                yield from self._matches(folder / part, others)
        else:
            for entry in self._entries(folder):
                if _fits(entry.name, part) and (not others or _is_folder(entry)):
                    yield from self._matches(folder / entry.name, others)

    def _has(self, folder: Path, name: str) -> bool:
        """Return whether a folder has that name; if it may not be looked up, the folder is noted as unreadable."""
        try:
            (folder / name).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (OSError, ValueError) as exc:
            self._cannot_read(folder, exc)
            return False
        return True

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """Return the entries of a folder, sorted by name; none if it cannot be read, which is noted."""
        try:
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except NotADirectoryError:
            return []
        except OSError as exc:
            self._cannot_read(folder, exc)
            return []

    def _cannot_read(self, folder: Path, exc: Exception) -> None:
        self.unreadable[str(folder)] = getattr(exc, "strerror", None) or str(exc)
        self._leave_out(folder, LeftOut.UNREADABLE)

    def _leave_out(self, path: Path, reason: LeftOut) -> None:
        """Count an entry, once if several of the given paths lead to it."""
        if path not in self._noted:
            self._noted.add(path)
            self._left_out[reason] += 1


def _reason_against_file(path: Path) -> LeftOut | None:
    """Return the reason to leave out a file with any name. A link that leads nowhere is taken, and fails as an image."""
    if _is_own(path) or (_is_link(path) and _is_own(Path(os.path.realpath(path)))):
        return LeftOut.OWN_OUTPUT
    state = _state(path)
    return LeftOut.SPECIAL if state and not stat.S_ISREG(state.st_mode) else None


def _is_own(path: Path) -> bool:
    return is_own_file(path.parent, path.name, lambda name: os.path.lexists(path.parent / name))


def _fits(name: str, part: str) -> bool:
    """Return whether a name fits one part of a pattern. Hidden names need a pattern that begins with a dot, as in a shell."""
    return fnmatchcase(name, part) and (part.startswith(".") or not name.startswith("."))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links, or one into a folder that this user may not enter
        return False


def _is_link(path: Path) -> bool:
    state = _state(path, follow_symlinks=False)
    return state is not None and stat.S_ISLNK(state.st_mode)


def _identity(path: Path) -> Identity | None:
    """Return the identity of the file or folder that a path leads to; None if it leads nowhere."""
    if (state := _state(path)) is None:
        return None
    return (state.st_dev, state.st_ino) if state.st_ino else os.path.realpath(path)


def _state(path: Path, *, follow_symlinks: bool = True) -> os.stat_result | None:
    try:
        return path.stat(follow_symlinks=follow_symlinks)
    except (OSError, ValueError):
        return None
