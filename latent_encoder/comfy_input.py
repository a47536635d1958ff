"""ComfyUI's input folder, which LoadImage reads from: one for the whole process, set while images are loaded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class InputSetting:
    """The setting of the input folder in ComfyUI's module `folder_paths`. Thread-safe."""

    def __init__(self, folder_paths: Any) -> None:
        self._folder_paths = folder_paths
        self._changed = threading.Condition()
        self._users = 0
        self._folder: Path | None = None
        self._before = ""

    @contextmanager
    def being(self, folder: Path) -> Iterator[None]:
        """Make this the input folder inside the context; afterwards custom nodes find the former one.

        Threads may share a folder. A thread with another folder waits for them.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._users == 0 or self._folder == folder)
            if self._users == 0:
                self._before = self._folder_paths.get_input_directory()
                self._folder_paths.set_input_directory(str(folder))
                self._folder = folder
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                if self._users == 0:
                    self._folder_paths.set_input_directory(self._before)
                    self._changed.notify_all()
