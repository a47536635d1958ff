"""ComfyUI's input folder, which LoadImage reads from: one for the whole process, set while images are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from latent_encoder.shared_context import SharedContext


def input_setting(folder_paths: Any) -> SharedContext[Path]:
    """Return the setting in ComfyUI's module `folder_paths`. Outside of it custom nodes find the former folder."""
    return SharedContext(partial(_set, folder_paths))


@contextmanager
def _set(folder_paths: Any, folder: Path) -> Iterator[None]:
    before: str = folder_paths.get_input_directory()
    folder_paths.set_input_directory(str(folder))
    try:
        yield
    finally:
        folder_paths.set_input_directory(before)
