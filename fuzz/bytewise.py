"""Damage that knows no format: bits flipped, numbers set, parts cut out, repeated, moved, or taken from another file."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)

Mutation = Callable[[bytearray, Random, bytes], None]


def damaged(data: bytes, mutation: Mutation, rng: Random, other: bytes) -> bytes:
    """Return `data` after `mutation`; `other` is a file of the same kind."""
    buffer = bytearray(data or b"\0")
    mutation(buffer, rng, other)
    return bytes(buffer)


def somewhere(data: bytes | bytearray, rng: Random) -> int:
    """Return an index, more often near the beginning, where headers are."""
    end = len(data) if rng.random() < 0.5 else min(len(data), 128)
    return rng.randrange(max(1, end))


def flip_bits(data: bytearray, rng: Random, _: bytes) -> None:
    for _bit in range(rng.choice((1, 1, 2, 8, 64))):
        data[somewhere(data, rng)] ^= 1 << rng.randrange(8)


def set_number(data: bytearray, rng: Random, _: bytes) -> None:
    size, place = rng.choice((1, 2, 4)), somewhere(data, rng)
    value = rng.choice(INTERESTING) & ((1 << 8 * size) - 1)
    data[place : place + size] = value.to_bytes(size, rng.choice(("big", "little")))


def truncate(data: bytearray, rng: Random, _: bytes) -> None:
    del data[somewhere(data, rng) :]


def cut_out(data: bytearray, rng: Random, _: bytes) -> None:
    start = somewhere(data, rng)
    del data[start : start + rng.choice((1, 2, 4, 64, 1024))]


def insert_noise(data: bytearray, rng: Random, _: bytes) -> None:
    place = somewhere(data, rng)
    data[place:place] = rng.randbytes(rng.choice((1, 4, 256)))


def repeat_part(data: bytearray, rng: Random, _: bytes) -> None:
    start = somewhere(data, rng)
    part = data[start : start + rng.choice((1, 16, 256, 2048))]
    data[start:start] = part * rng.choice((1, 2, 50))


def fill_part(data: bytearray, rng: Random, _: bytes) -> None:
    start = somewhere(data, rng)
    end = min(len(data), start + rng.choice((4, 64, 1024)))
    data[start:end] = bytes([rng.choice((0, 0x20, 0xFF))]) * (end - start)


def splice(data: bytearray, rng: Random, other: bytes) -> None:
    data[somewhere(data, rng) :] = other[somewhere(other, rng) :]


def append_noise(data: bytearray, rng: Random, other: bytes) -> None:
    data += rng.choice((rng.randbytes(1000), b"\0" * 1000, other))


MUTATIONS: tuple[Mutation, ...] = (
    flip_bits,
    set_number,
    truncate,
    cut_out,
    insert_noise,
    repeat_part,
    fill_part,
    splice,
    append_noise,
)
