"""The inputs: each depends only on the run's seed and its own number, so that any of them can be made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

from fuzz import jpegs, pickles, pngs, records, weights
from fuzz.bytewise import MUTATIONS as BYTEWISE
from fuzz.bytewise import damaged
from models import UpscaleMethod

Kind = Literal["png", "jpeg", "safetensors", "pickle", "json"]
SHARES: Mapping[Kind, int] = {"png": 30, "jpeg": 22, "safetensors": 7, "pickle": 3, "json": 38}  # weights are slow to load

SUFFIXES = {"png": ".png", "jpeg": ".jpg", "json": ".json"}
METHODS = get_args(UpscaleMethod)

TINY_VAE = "tiny_qwen_vae.safetensors"
SOUND_VAES = (TINY_VAE, *["pixel_space"] * 7)  # the VAE hardly matters for a damaged image, and pixel_space costs no time


@dataclass(frozen=True)
class Corpus:
    """The sound files to damage, by kind."""

    files: Mapping[Kind, tuple[bytes, ...]]
    hollow: tuple[bytes, ...]
    """Headers of large safetensors files, whose values are a hole in the file."""

    @classmethod
    def read(cls, folder: Path) -> Corpus:
        kinds: tuple[Kind, ...] = get_args(Kind)
        return cls({kind: _contents(folder / kind) for kind in kinds}, _contents(folder / "hollow"))


def _contents(folder: Path) -> tuple[bytes, ...]:
    return tuple(file.read_bytes() for file in sorted(folder.iterdir()))


@dataclass(frozen=True)
class Case:
    """One input: a file, or the value of a record, and the request that names it."""

    number: int
    kind: Kind
    mutation: str
    suffix: str
    data: bytes
    hole: int = 0
    """Number of zeros after `data`: a hole in the file, which takes no space on disk."""
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_vae(self) -> bool:
        return self.kind in ("safetensors", "pickle")


def make_case(corpus: Corpus, seed: int, number: int) -> Case:
    """Return the input with that number."""
    rng = Random(f"{seed}/{number}")  # noqa: S311  # it has to be the same again
    kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
    if kind == "json":
        mutation, data = records.damaged_record(rng)
        return Case(number, kind, mutation, SUFFIXES[kind], data)
    if kind == "safetensors":
        return _safetensors_case(corpus, rng, number)
    if kind == "pickle":
        mutation, suffix, data = pickles.damaged_pickle(corpus.files[kind], rng)
        return Case(number, kind, mutation, suffix, data)
    knowing = pngs.MUTATIONS if kind == "png" else jpegs.MUTATIONS
    mutation, data = _damaged_file(corpus.files[kind], knowing, rng)
    fields = {
        "vae_model_name": rng.choice(SOUND_VAES),
        "upscale_method": rng.choice(METHODS),
        "megapixels": rng.choice((0.01, 0.011, 0.02)),
    }
    return Case(number, kind, mutation, SUFFIXES[kind], data, fields=fields)


def _damaged_file(
    files: tuple[bytes, ...], knowing: tuple[Callable[[bytes, Random], bytes], ...], rng: Random
) -> tuple[str, bytes]:
    """Return the names of the damage and a file that was damaged with knowledge of its format, without, or both."""
    data, names = rng.choice(files), []
    if rng.random() < 0.75:
        mutate = rng.choice(knowing)
        names.append(mutate.__name__)
        data = mutate(data, rng)
    if not names or rng.random() < 0.15:
        blind = rng.choice(BYTEWISE)
        names.append(blind.__name__)
        data = damaged(data, blind, rng, rng.choice(files))
    return "+".join(names), data


def _safetensors_case(corpus: Corpus, rng: Random, number: int) -> Case:
    if rng.random() < 0.2:
        blind = rng.choice(BYTEWISE)
        files = corpus.files["safetensors"]
        data = damaged(rng.choice(files), blind, rng, rng.choice(files))
        return Case(number, "safetensors", blind.__name__, ".safetensors", data)
    is_hollow = rng.random() < 0.04
    sound = _parsed(rng.choice(corpus.hollow if is_hollow else corpus.files["safetensors"]))
    mutate = rng.choice(weights.MUTATIONS)
    file = mutate(sound.copy(), rng)
    prefix = "hollow " if is_hollow else ""
    return Case(number, "safetensors", f"{prefix}{mutate.__name__}", ".safetensors", file.to_bytes(), hole=file.hole)


@cache
def _parsed(data: bytes) -> weights.WeightsFile:
    return weights.WeightsFile.parse(data)
