"""The folders that the paths of a request may lead to, and opening files there without a gap between check and use.

A path is resolved first, with all its symlinks, and the place that it leads to has to be in an allowed folder. That place is
then opened name by name from `/`, each name relative to the descriptor of the folder before, without following symlinks. So a
symlink that appears after the check is refused, and the open file is the one that was checked.

`os.path.realpath` cannot resolve the path: for a loop of symlinks it returns a partly resolved path, which differs between
versions of Python.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from config import Settings
from errors import AccessDenied
from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.locations import ObjectPath, is_url, location_of
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder")

# A folder on the way is only passed, so no right to list it is needed. Systems without a flag for that need O_RDONLY.
PASS = getattr(os, "O_PATH", getattr(os, "O_SEARCH", os.O_RDONLY)) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a named pipe must not wait for its writer.
READ_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
READ_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

MOST_SYMLINKS = 40
"""The largest count of symlinks that Linux follows for one path: path_resolution(7)."""


@dataclass(frozen=True)
class AllowedFolders:
    """The folders that the paths of requests may lead to; None allows every folder.

    The folders need not exist and may be symlinks. They are resolved at each use.
    """

    setting: str
    folders: tuple[Path, ...] | None = None
    urls: AllowedUrls = AllowedUrls("image_path")  # noqa: RUF009  # it is frozen
    """The URLs that may stand in the place of a path."""

    @classmethod
    def of_inputs(cls, settings: Settings) -> Self:
        """Return the places that images may be read from."""
        return cls("ALLOWED_INPUT_DIRS", settings.allowed_input_dirs, AllowedUrls.of_inputs(settings))

    @classmethod
    def of_outputs(cls, settings: Settings) -> Self:
        """Return the places that files may be written to."""
        return cls("ALLOWED_OUTPUT_DIRS", settings.allowed_output_dirs, AllowedUrls.of_outputs(settings))

    def check(self, path: str) -> None:
        """Check the place that a path or a URL leads to. Nothing is looked up if every folder is allowed.

        Raises:
            AccessDenied: the place is outside of the folders, or below no allowed URL.
            InvalidRequest: the URL names no place.
        """
        if is_url(path):
            self.urls.check(path)
        elif self.folders is not None:
            self.resolve(path)

    def resolve(self, path: str) -> Path:
        """Return the place that a path leads to; it need not exist.

        The path is made `absolute` first, so `..` in it cannot probe a place outside.

        Raises:
            AccessDenied: the path leads out of the folders, or nowhere. The text does not depend on what exists there.
            OSError: every folder is allowed, and the path has too many symlinks.
        """
        if self.folders is None:
            return resolved(path)
        with suppress(OSError):
            place = resolved(path)
            if any(_contains(folder, place) for folder in self.folders):
                return place
        raise AccessDenied(
            f"Access denied: {path} does not lead into a folder of {self.setting}; "
            "name one that does, or add its folder there."
        )

    @contextmanager
    def open_file(self, path: str) -> Iterator[int]:
        """Open a path for reading as long as the context lasts; yield the descriptor, which may not be that of a file.

        Raises:
            AccessDenied: the path leads out of the folders.
            OSError: it cannot be opened.
        """
        with _closing(self._opened(path, _open_file)) as descriptor:
            yield descriptor

    @contextmanager
    def open_folder(self, path: str, *, create: bool = False) -> Iterator[int]:
        """Open a folder as long as the context lasts, and yield its descriptor; with `create`, make missing folders.

        Raises:
            AccessDenied: the path leads out of the folders.
            OSError: the folder cannot be made or opened.
        """
        with _closing(self._opened(path, _make_folder if create else _open_folder)) as descriptor:
            yield descriptor

    def _opened(self, path: str, open_place: Callable[[Path], int]) -> int:
        place = self.resolve(path)
        try:
            return open_place(place)
        except OSError:
            self.resolve(path)  # a symlink that was put in the way may lead outside, which is then the error to report
            raise


ANYWHERE = AllowedFolders("", urls=AllowedUrls("output_dir"))


def log_missing_limits(settings: Settings) -> None:
    """Warn if no setting limits the folders that requests may touch, and if a folder of such a setting does not exist."""
    limits = {"ALLOWED_INPUT_DIRS": settings.allowed_input_dirs, "ALLOWED_OUTPUT_DIRS": settings.allowed_output_dirs}
    if unset := [name for name, folders in limits.items() if folders is None]:
        log.warning("requests may touch any file that the service may: set the folders that they need", settings=unset)
    for name, folders in limits.items():
        if missing := [str(folder) for folder in folders or () if not folder.is_dir()]:
            log.warning("allowed folders that do not exist", setting=name, folders=missing)


def place_of(folder: str) -> Path:
    """Return the place that the path or the URL of a folder names; nothing is looked up.

    Raises:
        ValueError: the URL names none in object storage.
    """
    if not is_url(folder):
        return absolute(folder)
    place = location_of(folder)
    if not isinstance(place, ObjectPath):
        raise ValueError("must be a folder, or begin with s3://, gs:// or az://")  # noqa: TRY004  # the value is wrong
    return place


def absolute(path: str) -> Path:
    """Return the path from `/` on, with each `..` removed together with the name before it; nothing is looked up."""
    # POSIX allows two slashes at the start to mean something else than one; no system that we run on does that.
    return Path("/" + os.path.abspath(path).lstrip("/"))  # noqa: PTH100  # Path.resolve() looks symlinks up


def resolved(path: str) -> Path:
    """Return the path made `absolute`, with every symlink resolved; it need not exist.

    A name that cannot be looked up counts as no symlink, and `..` in a symlink's target goes back from it as from a folder. So
    the result does not reveal whether that name exists.

    Raises:
        OSError: there are more symlinks than the system follows, for example a loop.
    """
    place, names, followed = Path("/"), [*reversed(absolute(path).parts[1:])], 0
    while names:
        name = names.pop()
        if name == "..":
            place = place.parent
            continue
        try:
            target = (place / name).readlink()
        except OSError:  # no symlink, or it cannot be looked up
            place /= name
            continue
        followed += 1
        if followed > MOST_SYMLINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        if target.is_absolute():
            place = Path("/")
        names += [name for name in reversed(target.parts) if name != target.root]
    return place


def _contains(folder: Path, place: Path) -> bool:
    """Return whether the folder contains the resolved `place`. A loop of symlinks contains nothing."""
    try:
        return place.is_relative_to(resolved(str(folder)))
    except OSError:
        return False


def _open_file(place: Path) -> int:
    with _closing(_walk(place.parent)) as folder:
        return os.open(place.name or ".", READ_FILE, dir_fd=folder)


def _open_folder(place: Path, *, create: bool = False) -> int:
    with _closing(_walk(place, create=create)) as folder:
        return os.open(".", READ_FOLDER, dir_fd=folder)


def _make_folder(place: Path) -> int:
    return _open_folder(place, create=True)


def _walk(place: Path, *, create: bool = False) -> int:
    """Open a folder name by name, without following symlinks; return a descriptor for opening names in it."""
    folder = os.open("/", PASS)
    for name in place.parts[1:]:
        with _closing(folder):
            folder = _enter(name, folder, create=create)
    return folder


def _enter(name: str, folder: int, *, create: bool) -> int:
    try:
        return os.open(name, PASS, dir_fd=folder)
    except FileNotFoundError:
        if not create:
            raise
    with suppress(FileExistsError):  # another worker made it meanwhile
        os.mkdir(name, dir_fd=folder)
    return os.open(name, PASS, dir_fd=folder)


@contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)
