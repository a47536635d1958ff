"""Checks of the ComfyUI tree: what it is, where it is from, whether its packages are installed, and whether its nodes load."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

from errors import SetupError
from latent_encoder.comfy_import import NODE_IDS
from latent_encoder.doctor.check import Check, Installation, cross, cross_of, tick, warning
from latent_encoder.installer.comfy_packages import unsatisfied_packages
from latent_encoder.installer.fill_comfyui import RELEASES, Source, origin, recorded_sums, version_of, wrong_files
from latent_encoder.releases import PINNED_RELEASE, TESTED, is_tested
from utils import find_path

PINNED = RELEASES[PINNED_RELEASE]
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
    yield _files(path)


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
    """Whether the nodes that encoding needs run on a test picture, with the packages of CUSTOM_NODES loaded."""
    encoder, packages = installation.encoder, installation.settings.custom_nodes
    if isinstance(encoder, SetupError):
        yield cross_of("nodes", encoder, REFILL)
        return
    runtime, tried = encoder.runtime, encoder.tried_nodes
    where = f"on {runtime.device}" + (f", with CUSTOM_NODES={','.join(packages)}" if packages else "")
    yield tick("nodes", f"ComfyUI {runtime.version} ran {', '.join(tried)} on a test picture, {where}")
    yield tick("image decoder", runtime.decoder)
    if not_tried := [node_id for node_id in NODE_IDS if node_id not in tried]:
        advice = "They run with the first request; the release has no VAE built in with which they could be tried."
        yield warning("nodes", f"ComfyUI {runtime.version} loads {', '.join(not_tried)}, which were not tried", advice)


def _source(path: Path) -> str:
    source = origin(path)
    if source is None:
        return f"a git checkout{_commit(path)}" if (path / ".git").exists() else "not filled by setup_comfyui.sh"
    if source.repository is not None:
        return f"{source} as setup_comfyui.sh fetched it from {source.repository}"
    if source.source in {release.wheel for release in RELEASES.values()}:
        return f"{source} as setup_comfyui.sh gets it"
    return f"{'links to' if (path / 'comfy').is_symlink() else 'a copy of'} {source}{_commit(Path(source.source))}"


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


def _files(path: Path) -> Check:
    """Return how the tree's Python files compare with their release's, and whether that release is tested."""
    wrong = wrong_files(path, PINNED.sums)
    if not wrong:
        return tick("comfyui files", f"those of release {PINNED.version}, by their SHA-256 sums")
    source, sums, version = origin(path), recorded_sums(path), version_of(path)
    if source is not None and sums is not None:
        return _fetched_files(path, source, sums, version)
    if version is not None and version != PINNED.version:
        return _tested(version, f"release {version} by its own word")
    found = f"{len(wrong)} are missing or differ from release {PINNED.version}: {_names(wrong)}"
    return warning("comfyui files", found, f"Nothing where you changed them on purpose or use another release. {REFILL}")


def _fetched_files(path: Path, source: Source, sums: Path, version: str | None) -> Check:
    """Return how the files compare with the sums that were recorded when their release was fetched."""
    if changed := wrong_files(path, sums):
        found = f"{len(changed)} are missing or have changed since {source} was fetched: {_names(changed)}"
        again = "" if source.commit is None else f" Run ./setup_comfyui.sh --release {source.source} to fetch it again."
        return warning("comfyui files", found, f"Nothing where you changed them on purpose.{again or f' {REFILL}'}")
    return _tested(version or "unknown", f"those of {source}, by the sums recorded when it was fetched")


def _tested(version: str, found: str) -> Check:
    """Return a tick for a release that is tested, and a warning for another one."""
    if is_tested(version):
        return tick("comfyui files", f"{found}; {version} is tested")
    return warning("comfyui files", f"{found}; {version} is not tested", f"Compare with {TESTED}. {REFILL}")


def _names(files: list[str]) -> str:
    return ", ".join(files[:MAX_NAMES_SHOWN]) + (", …" if len(files) > MAX_NAMES_SHOWN else "")
