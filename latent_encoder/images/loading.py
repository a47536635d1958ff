"""Loading an image: from its path to the pixels that LoadImage gives, with notes on LoadImage's changes to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from io import BytesIO

import torch
from PIL import Image

from errors import EncodingFailed, ImageInvalid, InvalidRequest, SetupError, translated
from latent_encoder.comfy_runtime import ComfyRuntime
from latent_encoder.geometry import Size, size_of
from latent_encoder.images.colours import SAMPLED_SIDE, colours_of
from latent_encoder.images.features import Orientation, Transparency
from latent_encoder.images.pillow import quiet_pillow, tolerant_pillow
from latent_encoder.images.source import SourceImage
from latent_encoder.images.transparency import hidden_part, laid_over
from latent_encoder.storage.locations import shown
from latent_encoder.trial import try_load_image
from models import Alpha, ImageNote


@dataclass(frozen=True)
class LoadedImage:
    """An image as LoadImage gives it, with its checksum and notes."""

    pixels: torch.Tensor
    """Float32 `[1, height, width, 3]` in [0, 1], on the CPU."""
    sha256: str
    """Checksum of the file."""
    notes: tuple[ImageNote, ...]
    """Changes beyond decoding; API.md explains the codes."""
    colour_error: float | None
    """Mean difference of the values from the file's colours in sRGB, in levels of 8 bits; None if not noted or not known."""


def load_image(runtime: ComfyRuntime, path: str, source: SourceImage, alpha: Alpha = "drop") -> LoadedImage:
    """Load an image with LoadImage that was read from `path`. Lay it over the colour `alpha` if that is one.

    Raises:
        InvalidRequest: `alpha` is a colour, and this ComfyUI applies transparency itself.
        ImageInvalid: this ComfyUI cannot decode it.
        EncodingFailed: LoadImage fails on every image, memory ran out, or no folder has room for LoadImage's copy.
    """
    with tolerant_pillow() if source.damage is not None else nullcontext(), quiet_pillow():
        try:
            with translated(ImageInvalid, _cannot_load(runtime, path, source), quoting=False):
                image, hidden = _load(runtime, source)
        except ImageInvalid:
            _blame_the_tree_if_it_is_at_fault(runtime)
            raise
    return image if hidden is None or alpha == "drop" else _composited(runtime, image, hidden, alpha)


def _load(runtime: ComfyRuntime, source: SourceImage) -> tuple[LoadedImage, torch.Tensor | None]:
    """Return the image as LoadImage gives it, and its `hidden_part`."""
    pixels, mask = runtime.load_image_and_mask(source.data, source.ending)
    hidden = hidden_part(runtime, source, pixels, mask)
    notes = tuple(_notes(runtime, source, pixels, opaque=hidden is None))
    pixels = pixels[:1]
    error = _colour_error(source, pixels) if "colour_profile_ignored" in notes else None
    return LoadedImage(pixels, source.sha256, notes, error), hidden


def _composited(runtime: ComfyRuntime, image: LoadedImage, hidden: torch.Tensor, alpha: Alpha) -> LoadedImage:
    if "alpha_dropped" not in image.notes:
        raise InvalidRequest(
            f"Invalid request: alpha: {alpha!r} does not go with ComfyUI {runtime.version}, whose LoadImage applies "
            "transparency itself; use 'drop', or another ComfyUI"
        )
    notes = tuple[ImageNote, ...]("alpha_composited" if note == "alpha_dropped" else note for note in image.notes)
    return replace(image, pixels=laid_over(image.pixels, hidden, alpha), notes=notes)


def _colour_error(source: SourceImage, pixels: torch.Tensor) -> float | None:
    """Measure a sample of the image. The pixels are the file's own values, except those of a JPEG in CMYK."""
    with Image.open(BytesIO(source.data)) as image:
        colours = colours_of(image, source.data)
        if image.mode == "CMYK":
            image.draft("CMYK", (SAMPLED_SIDE, SAMPLED_SIDE))  # an eighth of the size, which is quick to decode
            sample = image.resize((SAMPLED_SIDE, SAMPLED_SIDE), Image.Resampling.NEAREST)
        else:
            rows, columns = (-(-side // SAMPLED_SIDE) for side in pixels.shape[1:3])
            sample = Image.fromarray((pixels[0, ::rows, ::columns] * 255).round().byte().numpy())
        error = colours.error(sample) if colours is not None else None
    return round(error, 1) if error is not None else None


def _cannot_load(runtime: ComfyRuntime, path: str, source: SourceImage) -> str:
    path = shown(path)
    if source.damage is not None:
        return f"Image file {source.damage}: {path}. ComfyUI {runtime.version} cannot load any part of it"
    return f"ComfyUI {runtime.version} cannot load the image file; save it again as a usual JPEG or PNG: {path}"


def _blame_the_tree_if_it_is_at_fault(runtime: ComfyRuntime) -> None:
    """Raise EncodingFailed if LoadImage fails on the trial image too, which it loaded when the service started."""
    try:
        try_load_image(runtime)
    except SetupError as exc:
        raise EncodingFailed(str(exc)) from exc


def _notes(runtime: ComfyRuntime, source: SourceImage, pixels: torch.Tensor, *, opaque: bool) -> Iterator[ImageNote]:
    loaded = size_of(pixels)
    if source.size not in (loaded, loaded.swapped):
        raise ValueError(f"it has {source.size} by its header, and {loaded} after decoding")
    if source.damage is not None:
        yield "damaged"
    several = pixels.shape[0] > 1
    for feature in source.features:
        if opaque and isinstance(feature, Transparency):
            continue
        note = runtime.note(feature)
        if isinstance(feature, Orientation):
            note = _seen_in_sizes(feature, source.size, loaded) or note
        if note is not None:
            yield note
        several = several and note != "first_frame_used"
    if several:
        yield "first_frame_used"


def _seen_in_sizes(orientation: Orientation, header: Size, loaded: Size) -> ImageNote | None:
    """Return the note if the sizes show that the image was not turned; None if sizes do not tell, as of a square."""
    not_turned = orientation.swaps_sides and header.width != header.height and loaded == header
    return "exif_orientation_ignored" if not_turned else None
