"""Loading an image: from its path to the pixels that LoadImage gives, with notes on LoadImage's changes to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from errors import EncodingFailed, ImageInvalid, SetupError, translated
from latent_encoder.comfy_runtime import ComfyRuntime
from latent_encoder.geometry import Size, size_of
from latent_encoder.images.features import ImageNote, Orientation
from latent_encoder.images.source import PILLOW_LOCK, ImageLimits, SourceImage, quiet_pillow, read_image
from latent_encoder.trial import try_load_image


@dataclass(frozen=True)
class LoadedImage:
    """An image as LoadImage gives it, with its checksum and notes."""

    pixels: torch.Tensor
    """Float32 `[1, height, width, 3]` in [0, 1], on the CPU."""
    sha256: str
    """Checksum of the file."""
    notes: tuple[ImageNote, ...]
    """LoadImage's changes beyond decoding; API.md explains the codes."""


def load_image(runtime: ComfyRuntime, path: str, limits: ImageLimits) -> LoadedImage:
    """Check the image file at `path` and load it with LoadImage.

    Raises:
        AccessDenied, ImageNotFound, ImageInvalid: `read_image` refused the file.
        ImageInvalid: this ComfyUI cannot decode it.
        EncodingFailed: LoadImage fails on every image, memory ran out, or no folder has room for LoadImage's copy.
    """
    source = read_image(path, limits)
    with PILLOW_LOCK, quiet_pillow():
        try:
            with translated(ImageInvalid, _cannot_load(runtime, path, source)):
                pixels = runtime.load_image(source.data, source.ending)
                notes = tuple(_notes(runtime, source, pixels))
        except ImageInvalid:
            _blame_the_tree_if_it_is_at_fault(runtime)
            raise
    return LoadedImage(pixels[:1], source.sha256, notes)


def _cannot_load(runtime: ComfyRuntime, path: str, source: SourceImage) -> str:
    if source.damage is not None:
        return f"Image file {source.damage}: {path}. ComfyUI {runtime.version} cannot load any part of it"
    return f"ComfyUI {runtime.version} cannot load the image file {path}"


def _blame_the_tree_if_it_is_at_fault(runtime: ComfyRuntime) -> None:
    """Raise EncodingFailed if LoadImage fails on the trial image too, which it loaded when the service started."""
    try:
        try_load_image(runtime)
    except SetupError as exc:
        raise EncodingFailed(str(exc)) from exc


def _notes(runtime: ComfyRuntime, source: SourceImage, pixels: torch.Tensor) -> Iterator[ImageNote]:
    loaded = size_of(pixels)
    if source.size not in (loaded, loaded.swapped):
        raise ValueError(f"it has {source.size} by its header, and {loaded} after decoding")
    if source.damage is not None:
        yield "damaged"
    several = pixels.shape[0] > 1
    for feature in source.features:
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
