"""Files like those of torch.save, damaged, and files that it never writes: with code, bombs, or no weights."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

from fuzz import bytewise

EXECUTED = "executed"  # a pickle that is executed makes a folder of this name in the working folder
SUFFIXES = (".pt", ".ckpt", ".pth", ".bin", ".pkl")
BOMB_BYTES = 2_000_000_000


class Code:
    """A call that unpickling makes."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.arguments


def damaged_pickle(files: tuple[bytes, ...], rng: Random) -> tuple[str, str, bytes]:
    """Return the damage's name, a suffix other than `.safetensors`, and the file."""
    mutate = rng.choice((bytes_of_file, bytes_of_file, bytes_of_pickle, bytes_of_pickle, code, no_weights, bomb))
    return mutate.__name__, rng.choice(SUFFIXES), mutate(files, rng)


def bytes_of_file(files: tuple[bytes, ...], rng: Random) -> bytes:
    return bytewise.damaged(rng.choice(files), rng.choice(bytewise.MUTATIONS), rng, rng.choice(files))


def bytes_of_pickle(files: tuple[bytes, ...], rng: Random) -> bytes:
    """Damage only the pickle, in an archive that is whole, so that it reaches the unpickler."""
    with zipfile.ZipFile(io.BytesIO(rng.choice(files))) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    changed = [
        (name, bytewise.damaged(data, rng.choice(bytewise.MUTATIONS), rng, data) if name.endswith(".pkl") else data)
        for name, data in members
    ]
    return _archive(changed)


def code(_: tuple[bytes, ...], rng: Random) -> bytes:
    """Return a pickle of code that would run, at the top or in the place of a weight."""
    called = rng.choice(
        (Code(os.mkdir, EXECUTED), Code(os.system, f"mkdir {EXECUTED}"), Code(eval, f"__import__('os').mkdir('{EXECUTED}')"))
    )
    return _pickled(rng.choice((called, {"encoder.conv1.weight": called}, [called])), rng)


def no_weights(_: tuple[bytes, ...], rng: Random) -> bytes:
    """Return a pickle of plain values that are not weights."""
    nested: Any = []
    for _level in range(200):
        nested = [nested]
    keyed: Any = {"decoder.middle.0.residual.0.gamma": 1, "decoder.head.0.gamma": None}
    value: Any = rng.choice(
        (
            7,
            "text",
            None,
            [],
            {},
            {1: 2},
            {"state_dict": 3},
            {"a": {"b": {}}},
            OrderedDict(keyed),
            nested,
            {b"a": b"b"},
            {"x": set()},
        )
    )
    return _pickled(value, rng)


def bomb(_: tuple[bytes, ...], rng: Random) -> bytes:
    """Return a few bytes, or kilobytes, that would take gigabytes."""
    if rng.random() < 0.5:
        return _pickled({"encoder.conv1.weight": Code(bytearray, BOMB_BYTES)}, rng)
    return _compressed_bomb()


@cache
def _compressed_bomb() -> bytes:
    return _archive([("archive/data.pkl", bytes(BOMB_BYTES // 8)), ("archive/version", b"3\n")], zipfile.ZIP_DEFLATED)


def _pickled(value: Any, rng: Random) -> bytes:
    data = pickle.dumps(value, protocol=2)
    if rng.random() < 0.5:
        return data
    return _archive([("archive/data.pkl", data), ("archive/byteorder", b"little"), ("archive/version", b"3\n")])


def _archive(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return buffer.getvalue()
