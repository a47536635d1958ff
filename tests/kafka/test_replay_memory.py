"""The memory of the replays of one partition."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_encoder.kafka.replay_memory import LONGEST_METADATA, Letters, ReplayMemory

GAPS = st.lists(st.integers(1, 4), max_size=30)
"""Distances from each letter to the next one: foreign records and the markers of transactions stand between."""


def letters_of(gaps: list[int]) -> list[Letters]:
    ends = list(accumulate(gaps))
    return [Letters(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


@given(GAPS, st.lists(st.sets(st.integers(0, 29)), max_size=4))
def test_every_replay_remembers_those_before(gaps: list[int], replays: list[set[int]]) -> None:
    """After replays that each read all letters and send some, exactly these count as sent, also from the committed form."""
    letters = letters_of(gaps)
    memory, sent = ReplayMemory(), set[int]()
    for chosen in replays:
        for letter in letters:
            memory.read(letter)
        for n, letter in enumerate(letters):
            if n in chosen:
                memory.sent(letter)
                sent.add(n)
        memory = ReplayMemory.of(*memory.committed())
        assert [memory.was_sent(letter.end - 1) for letter in letters] == [n in sent for n in range(len(letters))]
        waiting = [letter for n, letter in enumerate(letters) if n not in sent]
        assert memory.committed()[0] <= (waiting[0].end - 1 if waiting else sum(gaps))


@given(GAPS)
def test_all_sent_is_the_end_without_metadata(gaps: list[int]) -> None:
    """Kafka's tools show no lag then, whatever stands between the letters."""
    memory = ReplayMemory()
    for letter in letters_of(gaps):
        memory.read(letter)
        memory.sent(letter)
    assert memory.committed() == (sum(gaps), "")


def test_deleted_letters_are_forgotten() -> None:
    """The offset moves to the first letter that the topic still has."""
    memory = ReplayMemory()
    for n in range(10):
        memory.read(Letters(n, n + 1))
    memory.sent(Letters(7, 8))
    memory.forget_before(5)
    assert memory.committed()[0] == 5
    assert [memory.was_sent(n) for n in range(5, 11)] == [False, False, True, False, False, False]


def test_letters_chosen_at_random_fit_into_the_metadata() -> None:
    """10,000 letters of a partition of which every second one, at random, was sent."""
    memory, rng = ReplayMemory(), random.Random(0)  # noqa: S311  # nothing secret depends on it
    for n in range(10_000):
        memory.read(Letters(n, n + 1))
    for n in range(10_000):
        if rng.random() < 0.5:
            memory.sent(Letters(n, n + 1))
    assert len(memory.committed()[1]) <= LONGEST_METADATA


@pytest.mark.parametrize(
    "metadata", ["mine", "waiting,sent;zlib;base64:", "waiting,sent;zlib;base64:AAAA", "waiting,sent;zlib;base64:eJwDAAAAAAE="]
)
def test_foreign_metadata_are_refused(metadata: str) -> None:
    with pytest.raises(ValueError, match="metadata"):
        ReplayMemory.of(3, metadata)
