"""Releases of ComfyUI side by side: the own encode of each, and ours on it, all in turns and each in a process of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from PIL import Image

from benchmarks.encode_difference import distance
from benchmarks.encode_diffusers import scaled
from benchmarks.encode_peers import Peer
from benchmarks.encode_processes import Bench
from benchmarks.encode_report import Spread, gigabytes, markdown, megapixels_text, progress
from benchmarks.encode_sides import COMFYUI, FULL_SIZE_VAE, OURS, PHOTO
from benchmarks.encode_time import cpu_s_of_others
from benchmarks.encode_trees import Tree

HEADER = (
    "ComfyUI",
    "its own, s",
    "ours on it, s",
    "its own / ours",
    "our encoder",
    "max abs difference",
    "peak, its own",
    "ours",
)

BUSY = 0.1  # share of the CPUs that others had; above it even ratios are wrong, because threads wait for one without a CPU


@dataclass(frozen=True)
class ReleaseTimes:
    """One release at one size: its own encode, and ours with this release's ComfyUI."""

    release: str
    encoder: str
    """The encoder that ran in ours, `single-frame` or `stock`."""
    comfyui_s: Spread
    ours_s: Spread
    speedup: Spread
    """The release's own time divided by ours, of the same round."""
    max_abs: float
    """Largest difference between our latent and the release's own."""
    comfyui_peak_bytes: int
    our_peak_bytes: int
    """Peak of our process so far, with the loading of the VAE and all smaller sizes; `comfyui_peak_bytes` likewise."""


@dataclass(frozen=True)
class SizeReleases:
    """All releases at one size."""

    megapixels: float
    height: int
    width: int
    cpu_share_of_others: float
    """Share of the CPUs that processes outside of the benchmark had."""
    releases: list[ReleaseTimes]


Pair = tuple[Peer, Peer]  # a release's own side, and ours


def measure_releases(
    bench: Bench, trees: Sequence[Tree], sizes: Sequence[float], pairs: int, vae: str = FULL_SIZE_VAE
) -> list[SizeReleases]:
    """Measure both sides on each tree at each size: one encode that does not count, then `pairs` rounds.

    Raises:
        TreeFailed: a side cannot run on a tree.
    """
    with ExitStack() as stack:

        def started(tree: Tree, side: str) -> Peer:
            return stack.enter_context(Peer(bench, tree, side, vae))

        peers = [(started(tree, COMFYUI), started(tree, OURS)) for tree in trees]
        return [_measure_size(peers, bench.folder, megapixels, pairs) for megapixels in sizes]


def _measure_size(peers: Sequence[Pair], folder: Path, megapixels: float, pairs: int) -> SizeReleases:
    pixels_file = folder / f"pixels-{megapixels:g}.pt"
    pixels = torch.from_numpy(scaled(Image.open(PHOTO), megapixels))[None]
    torch.save(pixels, pixels_file)
    apart = [_warm_up(pair, pixels_file, folder, megapixels) for pair in peers]
    pids = [peer.pid for pair in peers for peer in pair]
    start, others = time.perf_counter(), _cpu_s_beside(pids)
    rounds = []
    for n in range(pairs):
        progress(f"releases at {megapixels_text(megapixels)}, round {n + 1} of {pairs}")
        rounds.append([_one_round(pair, pixels_file, folder) for pair in peers])
    cpu_s = (time.perf_counter() - start) * (os.cpu_count() or 1)
    return SizeReleases(
        megapixels=megapixels,
        height=pixels.shape[1],
        width=pixels.shape[2],
        cpu_share_of_others=(_cpu_s_beside(pids) - others) / cpu_s,
        releases=[
            release_times(pair, max_abs, [runs[n] for runs in rounds])
            for n, (pair, max_abs) in enumerate(zip(peers, apart, strict=True))
        ],
    )


def _warm_up(pair: Pair, pixels_file: Path, folder: Path, megapixels: float) -> float:
    """Let both sides encode once; return the largest difference between their latents."""
    latents = []
    for peer in pair:
        progress(f"first encode of {megapixels_text(megapixels)} by {peer.side}, ComfyUI {peer.tree.release}")
        peer.encode(pixels_file, folder / "latent.pt")
        latents.append(torch.load(folder / "latent.pt", weights_only=True))
    theirs, ours = latents
    return distance(ours, theirs)[0]


def _one_round(pair: Pair, pixels_file: Path, folder: Path) -> tuple[float, float]:
    theirs, ours = (peer.encode(pixels_file, folder / "latent.pt") for peer in pair)
    return theirs, ours


def _cpu_s_beside(pids: Sequence[int]) -> float:
    """Return the CPU seconds of processes outside of the benchmark so far, on all CPUs."""
    own = (psutil.Process(pid).cpu_times() for pid in pids)
    return cpu_s_of_others() - sum(times.user + times.system for times in own)


def release_times(pair: Pair, max_abs: float, rounds: Sequence[tuple[float, float]]) -> ReleaseTimes:
    """Return the figures of one release; `rounds` are the seconds of its own encode and of ours, in turns."""
    stock, ours = pair
    comfyui_s, ours_s = zip(*rounds, strict=True)
    return ReleaseTimes(
        release=stock.tree.release,
        encoder=ours.encoder,
        comfyui_s=Spread(comfyui_s),
        ours_s=Spread(ours_s),
        speedup=Spread(tuple(theirs / mine for theirs, mine in rounds)),
        max_abs=max_abs,
        comfyui_peak_bytes=stock.peak_bytes,
        our_peak_bytes=ours.peak_bytes,
    )


def releases_text(sizes: Sequence[SizeReleases]) -> str:
    """Return a table of each size as Markdown."""
    return "\n\n".join(map(_size_text, sizes))


def _size_text(size: SizeReleases) -> str:
    others = size.cpu_share_of_others
    busy = " The machine was too busy: run it again, the times and the ratios do not hold." if others > BUSY else ""
    return f"{size.width} x {size.height}. Other processes had {others:.1%} of the CPUs meanwhile.{busy}\n\n" + markdown(
        HEADER, [_row(release) for release in size.releases]
    )


def _row(release: ReleaseTimes) -> tuple[str, ...]:
    return (
        release.release,
        release.comfyui_s.text(),
        release.ours_s.text(),
        release.speedup.text(),
        release.encoder,
        f"{release.max_abs:.1e}",
        gigabytes(release.comfyui_peak_bytes),
        gigabytes(release.our_peak_bytes),
    )
