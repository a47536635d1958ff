"""The page of a contact sheet: its structure, its size, and hostile names in it."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_encoder.contact_sheet.entries import LONGEST_SHOWN, Entry, Failure, shown
from latent_encoder.contact_sheet.thumbnails import (
    LADDER,
    PAGE_BYTES,
    PER_IMAGE,
    ThumbnailStore,
    share_of,
    thumbnail,
)
from models import Roundtrip
from tests.contact_sheet.pages import Made, sheet_of

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 400, 3), np.uint8))
"""The image that compresses worst."""

HOSTILE = [
    "</script><script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">.png',
    "{{ 7 * 7 }}{% raw %}.png",
    "evil\u202egnp.exe",
    "line\nbreak\x1b[31m.png",
    "lone\udcffsurrogate.png",
    "--><!-- <![CDATA[ &amp; &lt;",
]


def entry(name: str, psnr: float | None = 30.0, ssim: float | None = 0.9, *problems: str, compared: bool = True) -> Entry:
    roundtrip = Roundtrip(psnr_db=psnr, ssim=ssim, image_sha256="") if compared else None
    return Entry(shown(name), shown(f"output/latent_{name}.pt"), "512 x 512 px, latent 16 x 64 x 64", problems, roundtrip)


def test_worst_come_first(tmp_path: Path) -> None:
    """Rows are in the order of problems, PSNR, SSIM; equal images and those without a comparison come last."""
    made = Made(tmp_path, [entry("bare", compared=False), entry("equal", None), entry("good", 40.0), entry("poor", 18.5)])
    made.entries += [entry("also good", 40.0, 0.8), entry("broken", 45.0, 1.0, "latent_broken.pt is missing.")]
    rows = sheet_of(made.write()).rows["latents"]
    assert [row[0].split("512")[0].split("latent_")[0] for row in rows] == [
        "broken", "poor", "also good", "good", "equal", "bare",
    ]  # fmt: skip
    assert rows[0][0].startswith("brokenlatent_broken.pt is missing.")
    assert [row[-2:] for row in rows[1:]] == [
        ["18.50 dB", "0.9000"],
        ["40.00 dB", "0.8000"],
        ["40.00 dB", "0.9000"],
        ["equal", "0.9000"],
        ["-", "-"],
    ]


def test_failures_have_a_section_with_reasons(tmp_path: Path) -> None:
    """Each has its image, its code and its reason; the heading counts them."""
    page = sheet_of(Made(tmp_path, [entry("a")], [Failure("b.png", "IMAGE_INVALID", "Image file is empty: b.png")]).write())
    assert page.rows["failures"] == [["b.png", "IMAGE_INVALID", "Image file is empty: b.png"]]
    assert "1 latent, 1 failed. PSNR from 30.00 dB to 30.00 dB, median 30.00 dB." in page.text


def test_images_stand_side_by_side_with_words_for_those_who_do_not_see_them(tmp_path: Path) -> None:
    """A row has image, latent and round trip, each with an alternative text; a missing one is `none`."""
    data = thumbnail(NOISE, 100_000)
    assert data is not None
    page = sheet_of(Made(tmp_path, [entry("photo.jpg")]).write(data, data, data))
    assert [alt for alt, _ in page.images] == ["Image: photo.jpg", "Latent: photo.jpg", "Round trip: photo.jpg"]
    assert {image.size for _, image in page.images} == {(171, 256)}
    (row,) = sheet_of(Made(tmp_path, [entry("photo.jpg")]).write(data)).rows["latents"]
    assert row[1:3] == ["", "none"]


def test_page_fetches_nothing(tmp_path: Path) -> None:
    """All addresses are data in the page or places in it, and a policy forbids any other."""
    data = thumbnail(NOISE, 100_000)
    assert data is not None
    page = sheet_of(Made(tmp_path, [entry("a")], [Failure("b", "IMAGE_INVALID", "x")]).write(data, data, data))
    assert page.fetched == []
    policy = next(attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "unsafe-inline'; script-src 'sha256-" in policy


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text(tmp_path: Path, name: str) -> None:
    """Names and reasons add no element, no control character and no change of the direction of text."""
    data = thumbnail(NOISE, 100_000)
    assert data is not None
    hostile = Made(tmp_path, [entry(name)], [Failure(shown(name), "IMAGE_INVALID", shown(name))]).write(data, data, data)
    found = sheet_of(hostile)
    plain = sheet_of(Made(tmp_path, [entry("a")], [Failure("b", "IMAGE_INVALID", "c")]).write(data, data, data))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]
    assert [sorted(attributes) for _, attributes in found.tags] == [sorted(attributes) for _, attributes in plain.tags]
    assert found.rows["failures"][0][0] == shown(name)
    assert shown(name).isprintable()


def test_long_names_are_cut_in_their_middle() -> None:
    """A path as long as the system allows takes few bytes, and its end, which differs, is kept."""
    cut = shown("/" + "a/" * 2000 + "photo.jpg")
    assert len(cut) == LONGEST_SHOWN + 1
    assert cut.endswith("/photo.jpg")
    assert "…" in cut


def test_10_000_images_have_a_bounded_size(tmp_path: Path) -> None:
    """Thumbnails, even of noise, take 60 MB at most together, and the text of an image 5 kB, however long its name."""
    images = 10_000
    data = thumbnail(NOISE, share_of(images))
    assert data is not None
    made = Made(tmp_path, [entry("&" * 4000, float(number)) for number in range(images)])
    made.failures = [Failure("&" * LONGEST_SHOWN, "IMAGE_INVALID", "&" * LONGEST_SHOWN)] * 1000
    size = made.write(data, data, data).stat().st_size
    assert images * PER_IMAGE * len(data) < size < PAGE_BYTES + 5_000 * (images + 1000)


def test_thumbnails_of_a_run_of_unknown_length_shrink_at_its_end(tmp_path: Path) -> None:
    """A thumbnail that is larger than its share of the final page is made smaller when the page is written."""
    large = thumbnail(NOISE, share_of(1))
    assert large is not None
    most_bytes = len(large) // 4
    with ThumbnailStore(tmp_path) as store:
        first, second = store.add(large), store.add(b"other")
        smaller = store.read(first, most_bytes)
        assert (store.read(first, len(large)), store.read(second, 5)) == (large, b"other")
    assert smaller is not None
    assert len(smaller) <= most_bytes


@pytest.mark.parametrize("images", [1, 30, 1000, 10_000, 100_000, 10_000_000])
def test_a_thumbnail_keeps_to_its_share(images: int) -> None:
    """It has its share of the bytes at most; if the smallest has more, there is none."""
    data = thumbnail(NOISE, share_of(images))
    assert data is None or len(data) <= share_of(images)
    assert (data is None) == (images > 1_000_000)


@pytest.mark.parametrize("size", [(1, 1), (4000, 5), (5, 4000), (255, 257)])
def test_odd_shapes_have_thumbnails(size: tuple[int, int]) -> None:
    """An image of one pixel, and a line, have one; none is enlarged."""
    data = thumbnail(Image.new("RGB", size), 10_000)
    assert data is not None
    with Image.open(BytesIO(data)) as image:
        assert max(image.size) == min(LADDER[0][0], max(size))
