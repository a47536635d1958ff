"""The folders from which LoadImage reads: private to this process, and in memory if the system has a folder there.

ComfyUI refuses paths outside its input folder since 0.28.0. Since 0.21.0 it chooses the decoder by the ending of the name. So
the checked bytes become a real file, with a name of ours and the ending of their format. LoadImage decodes these bytes, and
never sees the path in the request.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

from errors import EncodingFailed, SetupError
from latent_encoder.exits import not_on_exit, on_exit
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder")

Ending = Literal[".jpg", ".png"]

MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108  # Linux mounts memory there; the private folder in it has mode 0700
USUAL_TEMPORARY_FOLDER = Path("/tmp")  # noqa: S108
PREFIX = "latent-encoder-images-"
IMAGES = "image-*.*"
TRIAL_BYTES = 4096  # one page of memory: enough to notice a full folder when the service starts
NEEDED = "give the service a writable /dev/shm (docker: --shm-size) or /tmp, or set TMPDIR to a folder with room for one image"


class PrivateFolder:
    """A folder of mode 0700 that only this process uses. It is removed when the process ends.

    The process holds a lock (flock) on it. A folder without a lock was left by a process that was killed, and the next process
    that makes a folder beside it removes it. Process ids cannot show this, because containers may share the parent folder.
    """

    def __init__(self, parent: Path) -> None:
        """Make the folder in `parent`, and remove abandoned ones there.

        Raises:
            OSError: nothing can be written there.
        """
        self._parent = parent
        self._owner = os.getpid()
        self._numbers = itertools.count(1)
        self._renewing = threading.Lock()
        _remove_abandoned(parent)
        self.path, self._lock = _make(parent)
        on_exit(self.close)

    @contextmanager
    def file(self, data: bytes, ending: Ending) -> Iterator[Path]:
        """Write the bytes to a file that exists as long as the context lasts, and give its absolute path.

        Raises:
            OSError: there is no room for it, or the folder cannot be written.
        """
        try:
            path = self._write_file(data, ending)
        except FileNotFoundError:  # somebody cleared the temporary folder while the service ran
            self._renew()
            path = self._write_file(data, ending)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folder. A process that was forked from its owner leaves it alone."""
        not_on_exit(self.close)
        if os.getpid() == self._owner:
            with suppress(OSError):
                _remove(self.path)
            os.close(self._lock)

    def _renew(self) -> None:
        with self._renewing:
            if not self.path.exists():
                os.close(self._lock)
                self.path, self._lock = _make(self._parent)

    def _write_file(self, data: bytes, ending: Ending) -> Path:
        path = self.path / f"image-{next(self._numbers)}{ending}"
        try:
            with path.open("xb") as file:
                file.write(data)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return path


class InputFolders:
    """The private folders of this process. Each is made when it is first needed: in memory, else in the temporary folder."""

    def __init__(self, parents: Sequence[Path] | None = None) -> None:
        """Use `parents` in that order, by default the folder in memory and the temporary folder.

        Raises:
            SetupError: none of them can be written.
        """
        self._parents = _usual_parents() if parents is None else parents
        self._folders: dict[Path, PrivateFolder] = {}
        try:
            with self.file(bytes(TRIAL_BYTES), ".png"):
                pass
        except EncodingFailed as exc:
            raise SetupError(str(exc)) from exc

    @contextmanager
    def file(self, data: bytes, ending: Ending) -> Iterator[Path]:
        """Write the bytes to a file in the first folder that has room; it exists as long as the context lasts.

        Raises:
            EncodingFailed: no folder has room.
        """
        with ExitStack() as stack:
            yield self._placed(stack, data, ending)

    def _placed(self, stack: ExitStack, data: bytes, ending: Ending) -> Path:
        faults = []
        for parent in self._parents:
            try:
                folder = self._folders.get(parent) or self._folders.setdefault(parent, PrivateFolder(parent))
                return stack.enter_context(folder.file(data, ending))
            except OSError as exc:
                faults.append(f"{parent} ({exc.strerror or exc})")
        raise EncodingFailed(f"Cannot hand an image of {len(data)} bytes to ComfyUI: {', '.join(faults)}; {NEEDED}.")

    def close(self) -> None:
        """Remove the folders."""
        for folder in self._folders.values():
            folder.close()


def _usual_parents() -> list[Path]:
    return [*([MEMORY_FOLDER] if MEMORY_FOLDER.is_dir() else []), _temporary_folder()]


def _temporary_folder() -> Path:
    """Return the system's temporary folder. Python's fallback, the working folder, is not used for private files."""
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError:
        return USUAL_TEMPORARY_FOLDER
    return USUAL_TEMPORARY_FOLDER if folder == Path.cwd() else folder


def _make(parent: Path) -> tuple[Path, int]:
    """Make a private folder, and return it with a descriptor that holds its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(OSError):  # a file system without locks: no process can remove abandoned folders there
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Before it was locked, another process may have taken it for abandoned and removed it.
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(lock).st_ino:
                return path, lock
        os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    """Remove the private folders of this user in `parent` that no process holds."""
    for path in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # it is another user's, or gone meanwhile
            if path.lstat().st_uid != os.geteuid():
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
                log.info("removed the images of a process that was killed", folder=str(path))
            finally:
                os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a private folder and the images in it. It stays if it has other files.

    Raises:
        OSError: it cannot be removed.
    """
    for image in folder.glob(IMAGES):
        image.unlink(missing_ok=True)
    folder.rmdir()
