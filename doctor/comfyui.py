"""Checks of the ComfyUI tree: what it is, where it is from, whether its packages are installed, and whether its nodes load."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

from comfy_packages import unsatisfied_packages
from comfy_runtime import NODE_IDS, ComfyRuntime
from doctor.check import Check, Installation, cross, cross_of, tick, warning
from errors import SetupError
from releases import is_tested
from setup.fill_comfyui import RELEASES, source_of, wrong_files
from utils import find_path

PINNED = RELEASES["0.3.75"]
GIT_TIMEOUT_S = 5
REFILL = "Run ./setup_comfyui.sh --pinned for the release that this service is tested with."
MAX_NAMES_SHOWN = 3


def check_tree(installation: Installation) -> Iterator[Check]:
    """Where the tree is, what filled it, and whether its Python files are those of the release that is pinned."""
    try:
        path = find_path(installation.settings.comfyui_path)
    except SetupError as exc:
        yield cross_of("comfyui", exc, REFILL)
        return
    yield tick("comfyui", f"{path}, {_source(path)}")
    yield _files(path, installation.comfyui)


def check_packages(installation: Installation) -> Iterator[Check]:
    """Check that the packages which the tree's four nodes import are installed, in versions that the tree asks for."""
    try:
        packages = unsatisfied_packages(installation.settings.comfyui_path)
    except SetupError:
        return  # the check of the tree says so
    if packages.wanted:
        yield cross("packages", f"missing or too old: {', '.join(packages.wanted)}", f"Install them with: {packages.command}")
    elif packages.by_setup:
        found = f"this ComfyUI asks for {', '.join(packages.by_setup)}"
        yield warning("packages", found, "Run ./setup_comfyui.sh, which installs torch and torchvision.")
    elif packages.stopped_by is not None:
        advice = "The check named nodes says what to do about that."
        yield warning("packages", f"only some could be looked at, because loading ended early: {packages.stopped_by}", advice)
    else:
        yield tick("packages", "all that the nodes import are installed, in versions that this ComfyUI asks for")


def check_nodes(installation: Installation) -> Iterator[Check]:
    """Whether it can be imported, with the nodes that encoding needs and the packages of CUSTOM_NODES."""
    runtime, packages = installation.comfyui, installation.settings.custom_nodes
    if isinstance(runtime, ComfyRuntime):
        with_packages = f" with CUSTOM_NODES={','.join(packages)}" if packages else ""
        yield tick("nodes", f"ComfyUI {runtime.version} loads {', '.join(NODE_IDS)}{with_packages}, on {runtime.device}")
    else:
        yield cross_of("nodes", runtime, REFILL)


def _source(path: Path) -> str:
    source = source_of(path)
    if source == PINNED.wheel:
        return f"release {PINNED.version} as setup_comfyui.sh gets it"
    if source is None:
        return f"a git checkout{_commit(path)}" if (path / ".git").exists() else "not filled by setup_comfyui.sh"
    return f"{'links to' if (path / 'comfy').is_symlink() else 'a copy of'} {source}{_commit(Path(source))}"


def _commit(checkout: Path) -> str:
    """`, commit …`; nothing where it has no git repository of its own, or git is missing or will not say."""
    if not (checkout / ".git").exists():
        return ""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=GIT_TIMEOUT_S)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ", commit unknown"
    return f", commit {done.stdout.strip()}"


def _files(path: Path, runtime: object) -> Check:
    """How the tree's Python files compare with the release that is pinned, whatever release it says it is."""
    wrong = wrong_files(path, PINNED.sums)
    if not wrong:
        return tick("comfyui files", f"those of release {PINNED.version}, by their SHA-256 sums")
    version = getattr(runtime, "version", PINNED.version)
    if version != PINNED.version and is_tested(version):
        return tick("comfyui files", f"release {version} by its own word, which this service is tested with too")
    names = ", ".join(wrong[:MAX_NAMES_SHOWN]) + (", …" if len(wrong) > MAX_NAMES_SHOWN else "")
    found = f"{len(wrong)} are missing or differ from release {PINNED.version}: {names}"
    return warning("comfyui files", found, f"Nothing where you changed them on purpose or use another release. {REFILL}")
