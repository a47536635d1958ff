"""The size arithmetic, for all sizes."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from latent_encoder.geometry import Size, covered, factor_of, latent_crop, scaled_size

sides = st.integers(1, 20_000)
sizes = st.builds(Size, sides, sides)
megapixels = st.floats(0.01, 16.0)
factors = st.sampled_from([1, 4, 8, 16, 32])


@given(sizes, megapixels)
def test_scaled_image_has_the_pixels_that_were_asked_for(original: Size, target: float) -> None:
    """Each side is within half a pixel of the exact one, so the total is within half a pixel times both sides."""
    scaled = scaled_size(original, target)
    wanted = target * 1024 * 1024
    assert abs(scaled.width * scaled.height - wanted) <= (scaled.width + scaled.height) / 2 + 2


@given(sizes, megapixels)
def test_scaling_keeps_the_aspect(original: Size, target: float) -> None:
    """The ratio of width to height is kept, up to the rounding of each side."""
    scaled = scaled_size(original, target)
    assume(min(scaled) > 0)
    low = (scaled.width - 0.5) / (scaled.height + 0.5)
    high = (scaled.width + 0.5) / max(scaled.height - 0.5, 0.1)
    assert low * 0.999 <= original.width / original.height <= high * 1.001


@given(sizes, factors)
def test_crop_is_the_largest_centred_box_of_whole_cells(scaled: Size, factor: int) -> None:
    """It lies inside, its sides are multiples of the factor, less than a cell is lost, and it is centred to a pixel."""
    box = latent_crop(scaled, factor)
    for first, past, side in ((box.left, box.right, scaled.width), (box.upper, box.lower, scaled.height)):
        assert 0 <= first <= past <= side
        assert (past - first) % factor == 0
        assert side - (past - first) < factor
        assert 0 <= (side - past) - first <= 1


@given(sizes)
@settings(max_examples=20)
def test_crop_by_one_is_everything(scaled: Size) -> None:
    """A VAE that does not scale down loses nothing."""
    assert latent_crop(scaled, 1) == (0, 0, *scaled)


@given(
    st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([1, 2, 4, 8, 16, 32]), st.sampled_from([1, 2, 4, 8, 16, 32])
)
def test_covered_part_is_what_the_model_was_given(width: int, height: int, stated: int, true: int) -> None:
    """By ComfyUI's own cut, also where the factor that it cuts to is not the one that the model has."""
    scaled = Size(max(width, stated), max(height, stated))
    cut = latent_crop(scaled, stated)
    for rounded in (math.floor, math.ceil):
        latent = Size(rounded(cut.size.width / true), rounded(cut.size.height / true))
        assert covered(scaled, cut.size, latent, true) == cut
    with pytest.raises(ValueError, match="do not fit"):
        covered(scaled, cut.size, Size(cut.size.width // true + 2, latent.height), true)


@given(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), st.booleans())
def test_factor_follows_from_an_image_that_is_large_enough(factor: int, up: bool) -> None:
    """The factor is found for models that fill up the last cell and for those that drop it."""
    seen = Size(133, 69)
    latent = Size(*(math.ceil(side / factor) if up else side // factor for side in seen))
    assert factor_of(seen, latent) == factor


@pytest.mark.parametrize("latent", [Size(16, 4), Size(1, 17), Size(300, 150)])
def test_sides_with_different_factors_have_none(latent: Size) -> None:
    """Such a tensor is not the latent of an image."""
    assert factor_of(Size(133, 69), latent) is None
