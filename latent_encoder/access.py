"""What a request may touch: the folders that its paths may lead to, and opening them with no gap between check and use.

A path is resolved first, symlinks and all, and what it leads to has to be in an allowed folder. That place is then opened
name by name from `/`, each in the descriptor of the one before, and no symlink is followed any more: what somebody puts in
the way after the check is refused, and what is open is what was checked.

`os.path.realpath` does not serve to resolve it: for a loop of symlinks it returns a path that is resolved in part, and
other Pythons return other parts.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from config import Settings
from errors import AccessDenied
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder")

# A folder on the way has to be passed and not listed: systems have a flag for that, but for those that want more.
PASS = getattr(os, "O_PATH", getattr(os, "O_SEARCH", os.O_RDONLY)) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
READ_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC  # non-blocking: a named pipe is not waited for
READ_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

MOST_SYMLINKS = 40  # that Linux follows for one path: path_resolution(7)


@dataclass(frozen=True)
class AllowedFolders:
    """Where the paths of requests may lead: into these folders, or anywhere where `folders` is None.

    They need not exist, and may be symlinks: what they lead to is looked up at each use.
    """

    setting: str
    folders: tuple[Path, ...] | None = None

    def check(self, path: str) -> None:
        """Check where the path leads. Nothing is looked up where any folder is allowed.

        Raises:
            AccessDenied: outside of the folders.
        """
        if self.folders is not None:
            self.resolve(path)

    def resolve(self, path: str) -> Path:
        """Return where the path leads; nothing has to be there. It is made `absolute` first: no `..` probes what is outside.

        Raises:
            AccessDenied: outside of the folders, or nowhere. The text is the same whether something is there or not.
            OSError: any folder is allowed, and the path leads nowhere: too many symlinks.
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
        """A descriptor to read what is there, which need not be a file, as long as the context lasts.

        Raises:
            AccessDenied: outside of the folders.
            OSError: it cannot be opened.
        """
        with _closing(self._opened(path, _open_file)) as descriptor:
            yield descriptor

    @contextmanager
    def open_folder(self, path: str, *, create: bool = False) -> Iterator[int]:
        """A descriptor of the folder, made where it is missing if `create`, as long as the context lasts.

        Raises:
            AccessDenied: outside of the folders.
            OSError: it cannot be made or opened.
        """
        with _closing(self._opened(path, _make_folder if create else _open_folder)) as descriptor:
            yield descriptor

    def _opened(self, path: str, open_place: Callable[[Path], int]) -> int:
        place = self.resolve(path)
        try:
            return open_place(place)
        except OSError:
            self.resolve(path)  # where a symlink was put in the way, it may lead outside: then that is what to say
            raise


ANYWHERE = AllowedFolders("")


def log_missing_limits(settings: Settings) -> None:
    """Warn of what requests from others may do, unless the settings limit it, and of limits that allow nothing yet."""
    limits = {"ALLOWED_INPUT_DIRS": settings.allowed_input_dirs, "ALLOWED_OUTPUT_DIRS": settings.allowed_output_dirs}
    if unset := [name for name, folders in limits.items() if folders is None]:
        log.warning("requests may touch any file that the service may: set the folders that they need", settings=unset)
    for name, folders in limits.items():
        if missing := [str(folder) for folder in folders or () if not folder.is_dir()]:
            log.warning("allowed folders that do not exist", setting=name, folders=missing)


def absolute(path: str) -> Path:
    """The path from `/` on, without `..`, which goes back by name; nothing is looked up, and no symlink resolved."""
    # Two slashes at the start may mean something else than one in POSIX; they do on no system that we run on.
    return Path("/" + os.path.abspath(path).lstrip("/"))  # noqa: PTH100  # Path.resolve() looks symlinks up


def resolved(path: str) -> Path:
    """Return the path made `absolute`, with every symlink resolved. Nothing has to be there.

    A name that cannot be looked up counts as no symlink, and `..` in a symlink's target goes back from it as from a folder: so
    nothing tells whether it is there.

    Raises:
        OSError: more symlinks than the system follows, a loop for example.
    """
    place, names, followed = Path("/"), [*reversed(absolute(path).parts[1:])], 0
    while names:
        name = names.pop()
        if name == "..":
            place = place.parent
            continue
        try:
            target = (place / name).readlink()
        except OSError:  # no symlink, or not to be looked up
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
    """Tell whether the resolved `place` is in the folder. A loop of symlinks contains nothing."""
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
    """A descriptor of that folder, which is good for reaching what is in it."""
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
