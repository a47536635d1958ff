"""A request between the stages of the pipeline: prepared for the encode, then encoded and not yet written."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from latent_encoder.geometry import Size
from latent_encoder.outputs.names import OutputFiles
from latent_encoder.outputs.roundtrip import Comparison
from latent_encoder.vae.encoding import EncodedImage
from latent_encoder.vae.loaded_vae import LoadedVae
from models import EncodeRequest, ImageNote


@dataclass(frozen=True)
class Prepared:
    """A request that is ready for the encode."""

    request: EncodeRequest
    files: OutputFiles
    vae: LoadedVae
    origin: str | None
    """Identity of the Kafka record that holds the request: topic id, partition and offset; None outside of Kafka."""
    replaceable: str | None
    """Checksum of the metadata file that was there when the preparation began, None if there was none: its files may be
    replaced. Files that another process published later may be those of a response that was sent."""
    fingerprint: str
    """Checksum of everything that decides the files' content and place: `metadata.fingerprint`."""
    image_sha256: str
    """Checksum of the input image file."""
    image_notes: tuple[ImageNote, ...]
    colour_error: float | None
    """Mean difference of the input image's values from its colours in sRGB, in levels of 8 bits; None if they are the same."""
    original: Size
    """Size of the input image as LoadImage gives it."""
    scaled: torch.Tensor
    """Scaled image, float32 `[1, height, width, 3]` in [0, 1] on the CPU; bicubic scaling overshoots."""
    timings: dict[str, float]
    """Milliseconds of each step so far. Later stages add theirs."""


@dataclass(frozen=True)
class Encoded:
    """A request whose latent is in memory."""

    prepared: Prepared
    image: EncodedImage
    comparison: Comparison | None
    """Decoded latent and its distance from the image; None unless ROUNDTRIP is set."""
