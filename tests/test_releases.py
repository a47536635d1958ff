"""Tests of the list of tested ComfyUI releases."""

from __future__ import annotations

import pytest

from latent_encoder.releases import PINNED_RELEASE, TESTED, TESTED_RELEASES, is_tested


@pytest.mark.parametrize("version", [*TESTED_RELEASES, "v0.33.0", "0.33", "0.33.0.0"])
def test_tested_release_counts_however_it_is_written(version: str) -> None:
    """Versions are compared as versions, not as texts."""
    assert is_tested(version)


@pytest.mark.parametrize("version", ["0.3.5", "0.3.7", "3.75", "0.33.1", "0.3", "0", "", "unknown", "and"])
def test_part_of_a_tested_release_does_not_count(version: str) -> None:
    """`0.3.5` is another release than `0.3.52`, although its text begins with it."""
    assert not is_tested(version)


def test_error_messages_name_each_tested_release() -> None:
    """`TESTED` has every tested release, and the pinned release is one of them."""
    assert PINNED_RELEASE in TESTED_RELEASES
    assert all(release in TESTED for release in TESTED_RELEASES)
