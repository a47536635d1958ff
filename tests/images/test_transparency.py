"""Transparency: the images that have some, and the image laid over a colour."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from errors import InvalidRequest
from latent_encoder.access import ANYWHERE
from latent_encoder.comfy_node import Node
from latent_encoder.images import transparency
from latent_encoder.images.loading import LoadedImage, load_image
from latent_encoder.images.source import ImageLimits, read_image
from latent_encoder.images.transparency import COLOURS
from models import Alpha
from service import LatentEncoder
from tests.helpers import IMAGES, Encode, load_latent
from tests.images.odd_files import Values, exif, png
from tests.trees import IS_PINNED

pytestmark = pytest.mark.core

LIMITS = ImageLimits(ANYWHERE, max_bytes=1_000_000, max_pixels=1_000_000)
OPAQUE = None
GREY, COLOUR, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types of PNG

Load = Callable[..., LoadedImage]


@dataclass(frozen=True)
class Case:
    """A PNG, and the share of each pixel that is hidden, or None if the image is opaque."""

    name: str
    data: bytes
    hidden: np.ndarray[Any, np.dtype[np.float64]] | None


def sizes() -> dict[str, tuple[int, int, dict[str, bytes]]]:
    """Return sizes and further chunks: LoadImage's empty mask has 64 x 64 pixels, and an image may be turned."""
    return {"": (18, 30, {}), "64 x 64": (64, 64, {}), "turned": (18, 30, {"eXIf": exif(6)})}


def with_alpha(kind: str, height: int, width: int, more: dict[str, bytes]) -> Iterator[Case]:
    """Yield images with an alpha channel."""
    rng = np.random.default_rng(1)
    for colour_type, channels, depth in ((RGBA, 4, 8), (RGBA, 4, 16), (GREY_ALPHA, 2, 8), (GREY_ALPHA, 2, 16)):
        top, name = (1 << depth) - 1, f"{'RGBA' if colour_type == RGBA else 'LA'} {depth} bits {kind}"
        values = rng.integers(0, top + 1, (height, width, channels))
        yield Case(f"{name}: hidden", png(colour_type, depth, values, **more), 1 - upper(values[..., -1], depth) / 255)
        values[..., -1] = top
        yield Case(f"{name}: opaque", png(colour_type, depth, values, **more), OPAQUE)
        values[3, 5, -1] = 254 if depth == 8 else 0xFEFF
        yield Case(f"{name}: one pixel", png(colour_type, depth, values, **more), 1 - upper(values[..., -1], depth) / 255)
        if depth == 16:
            values[3, 5, -1] = 0xFF00
            yield Case(f"{name}: upper bits full", png(colour_type, depth, values, **more), OPAQUE)


def upper(values: Values, depth: int) -> Values:
    return values >> (depth - 8)


def with_palette(kind: str, height: int, width: int, more: dict[str, bytes]) -> Iterator[Case]:
    """Yield images with a palette, whose entries have an alpha."""
    rng = np.random.default_rng(2)
    for depth in (1, 2, 4, 8):
        entries, name = 1 << depth, f"palette of {depth} bits {kind}"
        values = rng.integers(0, entries, (height, width, 1))
        colours = {"PLTE": rng.integers(0, 256, entries * 3).astype("u1").tobytes()} | more
        alphas = rng.integers(0, 255, entries)
        yield Case(
            f"{name}: hidden",
            png(PALETTE, depth, values, **colours, tRNS=alphas.astype("u1").tobytes()),
            1 - alphas[values[..., 0]] / 255,
        )
        yield Case(f"{name}: all 255", png(PALETTE, depth, values, **colours, tRNS=b"\xff" * entries), OPAQUE)
        values[0, 0] = 1
        one = (values[..., 0] == 1).astype(float)
        yield Case(f"{name}: one entry", png(PALETTE, depth, values, **colours, tRNS=b"\xff\0"), one)
        yield Case(f"{name}: unused", png(PALETTE, depth, np.zeros_like(values), **colours, tRNS=b"\xff\0"), OPAQUE)


def with_colour(kind: str, height: int, width: int, more: dict[str, bytes]) -> Iterator[Case]:
    """Yield images with a transparent colour, and with one that no pixel has, but a similar one."""
    rng = np.random.default_rng(3)
    for colour_type, channels, depth in [(GREY, 1, depth) for depth in (1, 2, 4, 8, 16)] + [(COLOUR, 3, 8), (COLOUR, 3, 16)]:
        name = f"{'grey' if colour_type == GREY else 'colours'} of {depth} bits {kind}"
        top = (1 << depth) - 1
        colour = [top] + [top // 3] * (channels - 1)
        values = rng.integers(0, top, (height, width, channels))
        yield Case(f"{name}: absent", png(colour_type, depth, values, **more, tRNS=stored(colour)), OPAQUE)
        values[4:9, 6:11] = colour
        hidden = np.zeros((height, width))
        hidden[4:9, 6:11] = 1
        yield Case(f"{name}: hidden", png(colour_type, depth, values, **more, tRNS=stored(colour)), hidden)
        if depth == 16:  # equal in the upper 8 bits only
            near = [colour[0] ^ 1, *colour[1:]]
            yield Case(f"{name}: near", png(colour_type, depth, values, **more, tRNS=stored(near)), OPAQUE)


def stored(colour: list[int]) -> bytes:
    return struct.pack(f">{len(colour)}H", *colour)


CASES = [
    case for kind, size in sizes().items() for make in (with_alpha, with_palette, with_colour) for case in make(kind, *size)
]


@pytest.fixture
def load(encoder: LatentEncoder, tmp_path: Path) -> Load:
    """Return a function that loads an image file with these bytes."""

    def loaded(data: bytes, alpha: Alpha = "drop") -> LoadedImage:
        path = tmp_path / "image.png"
        path.write_bytes(data)
        return load_image(encoder.runtime, str(path), read_image(str(path), LIMITS), alpha)

    return loaded


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_only_what_hides_something_is_noted_and_composited(case: Case, load: Load) -> None:
    """An image of any mode and depth has the note if a pixel is hidden, and lies over the colour by the formula of API.md."""
    plain = load(case.data)
    assert ("alpha_dropped" in plain.notes) == (case.hidden is not None)
    turned = case.hidden is not None and plain.pixels.shape[1:3] != case.hidden.shape
    hidden = np.rot90(case.hidden, -1 if turned else 0)[..., None] if case.hidden is not None else np.float64(0)
    for alpha, colour in COLOURS.items():
        given = load(case.data, alpha)
        expected = plain.pixels[0].double().numpy() * (1 - hidden) + colour * hidden
        # Newer releases decode grey with alpha to within a level.
        np.testing.assert_allclose(given.pixels[0].numpy(), expected, atol=1e-6 if IS_PINNED else 1 / 255)
        assert ("alpha_composited" in given.notes, "alpha_dropped" in given.notes) == (case.hidden is not None, False)


def test_composite_is_that_of_pillow_and_of_comfyui(load: Load) -> None:
    """Pillow's alpha_composite differs by its rounding, ComfyUI's ImageCompositeMasked not at all."""
    path = IMAGES / "rgba.png"
    plain = load(path.read_bytes())
    composite = importlib.import_module("comfy_extras.nodes_mask").composite
    with Image.open(path) as image:
        mask = 1 - torch.from_numpy(np.asarray(image.getchannel("A")).astype("float32") / 255)[None]
        for alpha, colour in COLOURS.items():
            given = load(path.read_bytes(), alpha)
            background = torch.full_like(plain.pixels, colour)
            theirs = composite(plain.pixels.movedim(-1, 1).clone(), background.movedim(-1, 1), 0, 0, mask, 1)
            assert torch.equal(given.pixels, theirs.movedim(1, -1))
            over = Image.alpha_composite(Image.new("RGBA", image.size, (round(colour * 255),) * 3), image).convert("RGB")
            assert np.abs(given.pixels[0].numpy() * 255 - np.asarray(over)).max() <= 1


def test_response_and_latent_are_those_of_the_colour(encode: Encode, tmp_path: Path) -> None:
    """Metadata record the colour; the latent of an image over white is that of the same pixels in an opaque file."""
    fully = tmp_path / "cut_out.png"
    with Image.open(IMAGES / "photo.jpg") as photo:
        cut_out = photo.convert("RGBA")
        cut_out.paste((7, 7, 7, 0), (0, 0, 40, 40))
        cut_out.save(fully)
        photo.paste("white", (0, 0, 40, 40))
        photo.save(tmp_path / "opaque.png")
    given, expected = encode(fully, alpha="white"), encode(tmp_path / "opaque.png")
    assert (given.metadata.alpha, given.metadata.image_notes) == ("white", ("alpha_composited",))
    assert torch.equal(load_latent(given.latent_file_path), load_latent(expected.latent_file_path))
    assert not torch.equal(load_latent(encode(fully).latent_file_path), load_latent(expected.latent_file_path))


def test_every_value_but_drop_is_a_colour() -> None:
    """A new value of the field needs a colour."""
    assert set(get_args(Alpha)) == {"drop", *COLOURS}


def test_colour_is_refused_if_load_image_applies_transparency(encoder: LatentEncoder, load: Load, monkeypatch: Any) -> None:
    """A custom node package may do so: a second time, transparency would darken the image."""
    node: Any = encoder.runtime.nodes["LoadImage"]
    plain = node.load_image

    def applied(self: Any, image: str) -> Any:
        pixels, mask = plain(self, image)
        return (pixels * (1 - mask[..., None]) if mask.shape[1:] == pixels.shape[1:3] else pixels), mask

    monkeypatch.setattr(
        encoder.runtime, "_load_image", Node("LoadImage", type("Applying", (node,), {"load_image": applied}), ("image",))
    )
    monkeypatch.setattr(encoder.runtime, "_notes", {})
    data = (IMAGES / "rgba.png").read_bytes()
    assert load(data).notes == ("alpha_applied",)
    with pytest.raises(InvalidRequest, match=r"alpha: 'white' does not go with ComfyUI .* use 'drop'"):
        load(data, "white")


def test_opaque_image_costs_no_second_decode(load: Load, monkeypatch: Any) -> None:
    """For an alpha channel or a palette, LoadImage's mask is enough; only a transparent colour is read from the file."""
    read: list[bytes] = []
    monkeypatch.setattr(transparency, "_mask_of_file", lambda _runtime, source: read.append(source.data))
    for case in CASES:
        if not case.name.startswith(("grey", "colours")):
            load(case.data)
    assert read == []
