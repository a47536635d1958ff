"""Images that are asked for after the encode: preview and roundtrip image, made of a stored latent and scaled image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from errors import LatentUnreadable
from latent_encoder.comfy_runtime import ComfyRuntime
from latent_encoder.geometry import Box, cropped
from latent_encoder.outputs.checksums import checksum
from latent_encoder.outputs.latent_files import read_latent
from latent_encoder.outputs.places import Folder
from latent_encoder.outputs.png import pixels_of
from latent_encoder.outputs.preview import preview_of
from latent_encoder.outputs.roundtrip import Comparison, compare
from latent_encoder.outputs.stored_responses import StoredFiles
from latent_encoder.storage.locations import shown
from latent_encoder.telemetry.steps import timed
from latent_encoder.vae.loaded_vae import LoadedVae
from models import EncodeRequest, Metadata, Timings


@dataclass(frozen=True)
class Undrawn:
    """A request whose latent is stored, and that lacks an image which is asked for now."""

    request: EncodeRequest
    stored: StoredFiles
    vae: LoadedVae
    latent: torch.Tensor
    """Float32 `[1, channels, height, width]`."""
    scaled: torch.Tensor
    """Scaled image, float32 `[1, height, width, 3]` in [0, 1], as its file has it."""
    preview: bool
    """The preview is to be made."""
    roundtrip: bool
    """The roundtrip image is to be made."""


@dataclass(frozen=True)
class Drawn:
    """The images that were made of a stored latent; None for each that was not asked for."""

    undrawn: Undrawn
    """The request, without the tensors."""
    preview: bytes | None
    comparison: Comparison | None
    roundtrip_ms: float

    def described(self, stored: Metadata) -> Metadata:
        """Return the stored metadata with the images and the time that decoding took. The latent's facts stay."""
        update: dict[str, object] = {"image_path": stored.image_path or shown(self.undrawn.request.image_path)}
        if self.preview is not None:
            update["preview_sha256"] = checksum(self.preview)
        if self.comparison is not None:
            timings = stored.timings_ms.model_copy(update={"roundtrip": self.roundtrip_ms})
            update |= {"roundtrip": self.comparison.roundtrip, "timings_ms": timings, "processing_time_ms": _total(timings)}
        return stored.model_copy(update=update)


def read_tensors(folder: Folder, stored: StoredFiles) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the stored latent and the scaled image; None if they cannot be read, or are no longer those of the metadata."""
    metadata, files = stored.metadata, stored.files
    try:
        latent = _whole(folder, files.latent, metadata.latent_sha256)
        scaled = _whole(folder, files.scaled_image, metadata.scaled_image_sha256)
        return read_latent(latent, metadata.latent_format).float(), pixels_of(scaled)
    except (OSError, LatentUnreadable, Image.DecompressionBombError):
        return None


def _whole(folder: Folder, path: Path, sha256: str) -> bytes:
    data = folder.read(path.name)
    if checksum(data) != sha256:
        raise LatentUnreadable("it was changed")
    return data


def draw(runtime: ComfyRuntime, undrawn: Undrawn) -> Drawn:
    """Make the images, with the bytes that they would have if they had been asked for when the latent was encoded.

    Raises:
        EncodingFailed: the VAE cannot decode the latent.
    """
    vae, crop = undrawn.vae, Box(*undrawn.stored.metadata.crop)
    times = {"roundtrip": 0.0}
    preview = comparison = None
    with torch.inference_mode():
        if undrawn.preview:
            preview = preview_of(runtime, vae, undrawn.latent, undrawn.scaled, crop)
        if undrawn.roundtrip:
            with timed(times, "roundtrip"):
                comparison = compare(runtime, vae, undrawn.latent, cropped(undrawn.scaled, crop))
    return Drawn(replace(undrawn, latent=torch.empty(0), scaled=torch.empty(0)), preview, comparison, times["roundtrip"])


def _total(timings: Timings) -> int:
    return round(sum(map(float, timings.model_dump().values())))
