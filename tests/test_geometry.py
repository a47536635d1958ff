"""The size arithmetic, for all sizes."""

from __future__ import annotations

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from geometry import Size, latent_crop, scaled_size

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
    """Width to height stays what it was, up to the rounding of each side."""
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
