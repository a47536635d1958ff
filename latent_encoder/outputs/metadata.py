"""The metadata of a latent, with the facts that its file may hold too, and the fingerprint by which it is found again."""

from __future__ import annotations

import json
from datetime import datetime

import torch

from latent_encoder.comfy_runtime import ComfyRuntime
from latent_encoder.geometry import size_of
from latent_encoder.outputs.checksums import checksum
from latent_encoder.outputs.encoded import Encoded
from latent_encoder.outputs.run_requests import source_id_of
from latent_encoder.storage.locations import shown
from latent_encoder.vae.latent_spaces import statistics_of
from latent_encoder.vae.loaded_vae import LoadedVae
from models import CONTENT_FIELDS, EncodeRequest, LatentFacts, Metadata, Timings, utc_timestamp

RESULT_VERSION = 1
"""Raised with each change of ours that gives other numbers or pixels for the same input, so that they are computed anew."""

STATED_OTHERWISE = ("vae_model_name", "latent_format", "alpha")
"""Fields of a request that a fingerprint has in another form: the VAE as its checksum, the format as the path's suffix, and
`alpha` only if it is not `drop`, because files that were written before the field came are those of `drop`."""


def latent_facts(encoded: Encoded, runtime: ComfyRuntime, scaled_image_png: bytes) -> LatentFacts:
    """Return the facts that do not differ between two runs of the same request."""
    prepared, request, vae = encoded.prepared, encoded.prepared.request, encoded.prepared.vae
    image, original, scaled = encoded.image, prepared.original, size_of(prepared.scaled)
    batch, channels, height, width = image.latent.shape
    space = runtime.latent_space(vae.latent_space) if vae.latent_space is not None else None
    return LatentFacts(
        original_image_shape=(original.height, original.width, 3),
        scaled_image_shape=(scaled.height, scaled.width, 3),
        latent_shape=(batch, channels, height, width),
        vae_model_name=request.vae_model_name,
        image_path=shown(request.image_path),
        upscale_method=request.upscale_method,
        megapixels=request.megapixels,
        fit=request.fit,
        alpha=request.alpha,
        crop=image.crop,
        image_notes=prepared.image_notes,
        colour_error=prepared.colour_error,
        latent_dtype=str(image.latent.dtype).removeprefix("torch."),
        vae_dtype=vae.dtype,
        encoder=image.encoder,
        tiled=image.tiled,
        device=vae.device,
        comfyui_version=runtime.version,
        image_decoder=runtime.decoder,
        torch_version=torch.__version__,
        image_sha256=prepared.image_sha256,
        vae_sha256=vae.sha256,
        scaled_image_sha256=checksum(scaled_image_png),
        latent_format=request.latent_format,
        latent_space=vae.latent_space,
        latent_statistics=statistics_of(space, channels) if space is not None else None,
    )


def metadata_of(encoded: Encoded, facts: LatentFacts, latent: bytes, preview: bytes | None, moment: datetime) -> Metadata:
    """Return the metadata of a request's files: the facts, and the timings and checksums of this run.

    `latent` and `preview` are the bytes of those files, `moment` is the time to state.
    """
    prepared = encoded.prepared
    return Metadata(
        **facts.model_dump(),
        processing_time_ms=round(sum(prepared.timings.values())),
        timestamp=utc_timestamp(moment),
        timings_ms=Timings(**prepared.timings),
        latent_sha256=checksum(latent),
        fingerprint=of_tiles(prepared.fingerprint) if encoded.image.tiled else prepared.fingerprint,
        preview_sha256=checksum(preview) if preview is not None else None,
        roundtrip=encoded.comparison and encoded.comparison.roundtrip,
        request_id=prepared.request.request_id,
        origin=prepared.origin,
        source_id=source_id_of(prepared.request),
    )


def fingerprint(request: EncodeRequest, place: str, image_sha256: str, vae: LoadedVae, runtime: ComfyRuntime) -> str:
    """Return the SHA-256 of everything that decides content and name of the files.

    `place` is the latent's name; earlier versions had its absolute path there. If the fingerprint in stored metadata is equal
    to that of a new request, the files beside them are its result. For a latent that was encoded in tiles the metadata have
    `of_tiles` of it.

    Left out is what changes only the order of additions: the count of threads, and the model of the CPU or GPU. torch counts,
    because a release may change a kernel; its build does not.
    """
    parts = (
        RESULT_VERSION,
        image_sha256,
        vae.sha256 or vae.name,
        vae.dtype,
        vae.encoder,
        vae.compiled,
        vae.device.partition(":")[0],
        *(getattr(request, name) for name in CONTENT_FIELDS if name not in STATED_OTHERWISE),
        runtime.version,
        runtime.decoder,
        runtime.custom_nodes,
        torch.__version__.partition("+")[0],
        place,
        *([] if request.alpha == "drop" else [request.alpha]),
    )
    return checksum(json.dumps(parts).encode())


def of_tiles(fingerprint: str) -> str:
    """Return the fingerprint of the same request if its latent is encoded in tiles, which gives other numbers."""
    return checksum(f"{fingerprint} in tiles".encode())
