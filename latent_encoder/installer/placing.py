"""The files of a runtime: put into a fresh folder beside `comfyui/`, joined by the user's own, then swapped in at once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from latent_encoder.installer.sources import Source, write_origin

NOT_RUNTIME = {"README.md", "tests", "tests-unit", "script_examples", "pytest.ini", "venv", "__pycache__"}
NOT_RUNTIME |= {"models", "input", "output", "temp", "user"}
"""Entries of a checkout that are no part of the runtime: development files, and the user's own, which stay there."""

KEPT = ("README.md", "models", "input", "output", "temp", "user", "extra_model_paths.yaml")
MADE = ("models/vae", "models/vae_approx", "input", "output")


@contextmanager
def workspace(dest: Path) -> Iterator[tuple[Path, Path]]:
    """Make a scratch folder and, in it, the empty folder `fresh`, on the file system of `dest`; remove them at the end."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dest.name}.", dir=dest.parent) as space:
        fresh = Path(space) / "fresh"
        fresh.mkdir()
        yield Path(space), fresh


def place_runtime(tree: Path, fresh: Path, place: Callable[[Path, Path], object]) -> None:
    """Put every part of the runtime, and ComfyUI's model configurations, from `tree` into `fresh`.

    `place` puts one file or folder to a path: `copy`, `symlink` or `shutil.move`.
    """
    for entry in sorted(tree.iterdir()):
        if is_runtime(entry.name):
            place(entry, fresh / entry.name)
    if (tree / "models" / "configs").is_dir():
        (fresh / "models").mkdir()
        place(tree / "models" / "configs", fresh / "models" / "configs")


def is_runtime(name: str) -> bool:
    """Return whether a file or folder at the top of a tree is part of the runtime."""
    return name not in NOT_RUNTIME and not name.startswith(".")


def copy(source: Path, target: Path) -> None:
    """Copy a file, or a folder without bytecode and git's data."""
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".git"))
    else:
        shutil.copy2(source, target)


def symlink(source: Path, target: Path) -> None:
    target.symlink_to(source)


def keep_users_own(dest: Path, fresh: Path) -> None:
    """Carry the user's own files and folders in `dest` over to `fresh`, and make the folders that a runtime needs."""
    for name in KEPT:
        carry_over(dest / name, fresh / name)
    if not (fresh / "custom_nodes").is_symlink():
        carry_over(dest / "custom_nodes", fresh / "custom_nodes")
    for name in MADE:
        (fresh / name).mkdir(parents=True, exist_ok=True)


def carry_over(source: Path, target: Path) -> None:
    """Add to `target` the entries of `source` that it lacks, without copying: files are hard links."""
    if source.is_symlink():
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)  # the user keeps this folder elsewhere, and the link to it replaces the release's own
        if not target.is_symlink():
            target.symlink_to(source.readlink())
    elif source.is_file():
        if not target.exists():
            os.link(source, target)
    elif source.is_dir():
        target.mkdir(exist_ok=True)
        for entry in source.iterdir():
            carry_over(entry, target / entry.name)


def link_vae_files(checkout: Path, fresh: Path) -> None:
    """Link the checkout's VAE files whose names are free. A model folder that is itself a link gets none."""
    for folder in ("models/vae", "models/vae_approx"):
        if (fresh / folder).resolve() != fresh.resolve() / folder:
            continue
        for file in sorted((checkout / folder).glob("*.*")):
            target = fresh / folder / file.name
            if not (target.exists() or target.is_symlink()):
                target.symlink_to(file)


def swap_in(fresh: Path, dest: Path, source: Source) -> None:
    """Record the source of the fresh runtime, and put it in the place of the old one."""
    write_origin(fresh, source)
    if dest.exists():
        dest.rename(aside(dest))
    fresh.rename(dest)
    shutil.rmtree(aside(dest), ignore_errors=True)


def aside(dest: Path) -> Path:
    """Return the path that the old runtime has during the swap."""
    return dest.with_name(f".{dest.name}.old")


def recover(dest: Path) -> None:
    """Put the old runtime back if a run was stopped in the middle of the swap, and remove that run's scratch folders."""
    if aside(dest).exists() and not dest.exists():
        aside(dest).rename(dest)
    for left in dest.parent.glob(f".{dest.name}.*"):
        shutil.rmtree(left)
