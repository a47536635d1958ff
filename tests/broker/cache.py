"""The folder of downloads that test runs share."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the project's folder among the user's caches."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latent-encoder"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
