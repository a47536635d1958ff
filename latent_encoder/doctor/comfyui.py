"""Checks of the ComfyUI tree: its release and source, the packages that it needs, and its nodes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

from errors import SetupError
from latent_encoder.comfy_import import NODE_IDS
from latent_encoder.doctor.check import Check, Installation, cross, cross_of, tick, warning
from latent_encoder.installer.checksums import recorded_checksums, wrong_files
from latent_encoder.installer.comfy_packages import unsatisfied_packages
from latent_encoder.installer.sources import RELEASES, Source, origin, version_of
from latent_encoder.releases import PINNED_RELEASE, TESTED, is_tested
from utils import find_path

PINNED = RELEASES[PINNED_RELEASE]
GIT_TIMEOUT_S = 5
"""Far more than `git rev-parse` takes, except on a network disk that hangs."""
REFILL = "Run ./setup_comfyui.sh --pinned for the release that this service is tested with."
MAX_NAMES_SHOWN = 3


def check_tree(installation: Installation) -> Iterator[Check]:
    """Check that there is a tree, and whether its Python files are those of the pinned or of another tested release."""
    try:
        path = find_path(installation.settings.comfyui_path)
    except SetupError as exc:
        yield cross_of("comfyui", exc, REFILL)
        return
    yield tick("comfyui", f"{path}, {_source(path)}")
    yield _files(path)


def check_packages(installation: Installation) -> Iterator[Check]:
    """Check that the packages of the tree's four nodes are installed, in versions that the tree asks for."""
    try:
        packages = unsatisfied_packages(installation.settings.comfyui_path)
    except SetupError:
        return  # `check_tree` reports it
    if packages.wanted:
        yield cross("packages", f"missing or too old: {', '.join(packages.wanted)}", f"Install them with: {packages.command}")
    elif packages.by_setup:
        found = f"this ComfyUI asks for {', '.join(packages.by_setup)}"
        yield warning("packages", found, "Run ./setup_comfyui.sh, which installs torch and torchvision.")
    elif packages.stopped_by is not None:
        advice = "See the check named nodes for the next step."
        yield warning("packages", f"only some were checked, because loading ended early: {packages.stopped_by}", advice)
    else:
        yield tick("packages", "all packages of the nodes are installed, in versions that this ComfyUI asks for")


def check_nodes(installation: Installation) -> Iterator[Check]:
    """Check that the four nodes run on a test image, with the packages of CUSTOM_NODES loaded."""
    encoder, packages = installation.encoder, installation.settings.custom_nodes
    if isinstance(encoder, SetupError):
        yield cross_of("nodes", encoder, REFILL)
        return
    runtime, tried = encoder.runtime, encoder.tried_nodes
    device = f"on {runtime.device}" + (f", with CUSTOM_NODES={','.join(packages)}" if packages else "")
    yield tick("nodes", f"ComfyUI {runtime.version} ran {', '.join(tried)} on a test image, {device}")
    yield tick("image decoder", runtime.decoder)
    if not_tried := [node_id for node_id in NODE_IDS if node_id not in tried]:
        advice = "They run with the first request. This release has no built-in VAE to try them with."
        yield warning("nodes", f"ComfyUI {runtime.version} loads {', '.join(not_tried)}, which were not tried", advice)


def _source(path: Path) -> str:
    """Return the source that a tree was filled from, as a phrase for a finding."""
    source = origin(path)
    if source is None:
        return f"a git checkout{_commit(path)}" if (path / ".git").exists() else "not filled by setup_comfyui.sh"
    if source.repository is not None:
        return f"{source} as setup_comfyui.sh fetched it from {source.repository}"
    if source.source in {release.wheel for release in RELEASES.values()}:
        return f"{source} as setup_comfyui.sh installs it"
    return f"{'links to' if (path / 'comfy').is_symlink() else 'a copy of'} {source}{_commit(Path(source.source))}"


def _commit(checkout: Path) -> str:
    """Return `, commit …`, or nothing if the folder is no git repository; `, commit unknown` if git cannot read it."""
    if not (checkout / ".git").exists():
        return ""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=GIT_TIMEOUT_S)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ", commit unknown"
    return f", commit {done.stdout.strip()}"


def _files(path: Path) -> Check:
    """Compare the tree's Python files with those of their release, and look that release up in the tested ones."""
    wrong = wrong_files(path, PINNED.checksums)
    if not wrong:
        return tick("comfyui files", f"those of release {PINNED.version}, by their SHA-256 checksums")
    source, checksums, version = origin(path), recorded_checksums(path), version_of(path)
    if source is not None and checksums is not None:
        return _fetched_files(path, source, checksums, version)
    if version is not None and version != PINNED.version:
        return _tested(version, f"states version {version}")
    found = f"{len(wrong)} are missing or differ from release {PINNED.version}: {_names(wrong)}"
    return warning("comfyui files", found, f"Ignore this if you changed them on purpose or use another release. {REFILL}")


def _fetched_files(path: Path, source: Source, checksums: Path, version: str | None) -> Check:
    """Compare the files with the checksums that were recorded when their release was fetched."""
    if changed := wrong_files(path, checksums):
        found = f"{len(changed)} are missing or have changed since {source} was fetched: {_names(changed)}"
        again = "" if source.commit is None else f" Run ./setup_comfyui.sh --release {source.source} to fetch it again."
        return warning("comfyui files", found, f"Ignore this if you changed them on purpose.{again or f' {REFILL}'}")
    return _tested(version or "unknown", f"those of {source}, by the checksums recorded when it was fetched")


def _tested(version: str, found: str) -> Check:
    """Return a tick for a tested release, and a warning for another one."""
    if is_tested(version):
        return tick("comfyui files", f"{found}; {version} is tested")
    return warning("comfyui files", f"{found}; {version} is not tested", f"Compare with {TESTED}. {REFILL}")


def _names(files: list[str]) -> str:
    return ", ".join(files[:MAX_NAMES_SHOWN]) + (", …" if len(files) > MAX_NAMES_SHOWN else "")
