"""The pipeline: a request in, three files and a response out.

`LatentEncoder` is made once per process and used for many requests, from any thread.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from PIL import Image

from comfy_runtime import ComfyRuntime, load_runtime
from config import PROJECT_DIR, Settings
from errors import EncodingFailed, ImageInvalid, RequestError, ScalingFailed, one_line, translated
from geometry import Size, latent_crop, scaled_size
from images import PILLOW_LOCK, SourceImage, read_image
from logs import get_logger
from models import (
    EncodeRequest,
    ErrorResponse,
    Metadata,
    Response,
    SuccessResponse,
    Timings,
    utc_timestamp,
)
from output_files import OutputFiles, StagedFiles, latent_bytes, output_files, png_bytes, prepare_output_dir
from vae import LoadedVae, VaeCache

log = get_logger("latent_encoder")

COMFYUI_METHODS = {"nearest": "nearest-exact"}  # the specification's name for it; the others are ComfyUI's own


def utc_now() -> datetime:
    return datetime.now(UTC)


class LatentEncoder:
    """ComfyUI's runtime, the VAEs that are loaded, and the steps from a request to its response."""

    def __init__(self, settings: Settings, runtime: ComfyRuntime, clock: Callable[[], datetime] = utc_now) -> None:
        self._settings = settings
        self.runtime = runtime
        self._clock = clock
        self.vaes = VaeCache(runtime, settings.vae_cache_size)

    @classmethod
    def set_up(cls, settings: Settings) -> LatentEncoder:
        """Load ComfyUI as the settings say.

        Raises:
            SetupError: ComfyUI is not there, lacks a node, or cannot run on the device.
        """
        runtime = load_runtime(settings.comfyui_path, settings.device, settings.vae_precision, settings.custom_nodes)
        _search_model_folders(runtime, settings.model_dir)
        Image.MAX_IMAGE_PIXELS = settings.max_image_pixels  # one limit, for LoadImage too
        return cls(settings, runtime)

    def answer(self, request: EncodeRequest) -> Response:
        """Encode, and answer whatever happens: every failure becomes an error response."""
        try:
            response: Response = self.encode(request)
        except RequestError as exc:
            response = ErrorResponse.of(exc, request.request_id, self._clock())
            log.warning("request failed", request_id=request.request_id, error_code=exc.code, reason=str(exc))
        except Exception as exc:
            fault = EncodingFailed(f"Unexpected error, please report it with the service's log: {one_line(exc)}")
            response = ErrorResponse.of(fault, request.request_id, self._clock())
            log.exception("request failed unexpectedly", request_id=request.request_id, error_code=fault.code)
        return response

    def encode(self, request: EncodeRequest) -> SuccessResponse:
        """Load the VAE, load the image, scale it, encode it, write the files.

        Raises:
            RequestError: of the class that says what failed. No file is left behind then.
        """
        timings = dict.fromkeys(Timings.model_fields, 0.0)
        with torch.inference_mode():
            with _timed(timings, "load_vae"):
                vae = self.vaes.get(request.vae_model_name)
            with _timed(timings, "load_image"):
                source, image = self._load_image(request.image_path)
            with _timed(timings, "scale"):
                scaled = self._scale(image, request, vae.factor)
            original = _size(image)
            del image  # a large photo's pixels must not stay in memory through the encode
            files = output_files(request.output_dir, request.image_path, request.request_id)
            prepare_output_dir(files.latent.parent)
            with _timed(timings, "encode"):
                latent = self._encode(vae, scaled)
            done = Encoded(request, files, vae, source, original, scaled, latent)
            metadata = self._write(done, timings)
        log.info(
            "request encoded", request_id=request.request_id, latent=str(files.latent), **metadata.timings_ms.model_dump()
        )
        return SuccessResponse(
            request_id=request.request_id,
            latent_file_path=str(files.latent),
            latent_shape=metadata.latent_shape,
            scaled_image_path=str(files.scaled_image),
            metadata=metadata,
        )

    def _load_image(self, path: str) -> tuple[SourceImage, torch.Tensor]:
        """The checked source and its pixels, float32 `[1, height, width, 3]` in [0, 1]."""
        with PILLOW_LOCK:
            source = read_image(path, self._settings.max_image_pixels)
            with translated(ImageInvalid, f"ComfyUI cannot load the image file {path}"), source.as_file() as file:
                return source, self.runtime.load_image(file)

    def _scale(self, image: torch.Tensor, request: EncodeRequest, factor: int) -> torch.Tensor:
        """The scaled image, float32 `[1, height, width, 3]`; both sides are at least `factor` pixels."""
        original = _size(image)
        target = scaled_size(original, request.megapixels)
        goal = f"the {original} image to {request.megapixels} megapixels ({target})"
        with translated(ScalingFailed, f"Cannot scale {goal}"):
            scaled = self.runtime.scale(
                image, COMFYUI_METHODS.get(request.upscale_method, request.upscale_method), request.megapixels
            )
        if min(_size(scaled)) < factor:
            raise ScalingFailed(
                f"Cannot encode after scaling {goal}: the VAE needs at least {factor} px a side. "
                "Ask for more megapixels, or crop the image."
            )
        return scaled

    def _encode(self, vae: LoadedVae, scaled: torch.Tensor) -> torch.Tensor:
        """The latent as one contiguous float32 tensor `[batch, channels, height, width]` on the CPU."""
        with translated(EncodingFailed, f"VAE {vae.name} failed to encode a {_size(scaled)} image"):
            samples = self.runtime.encode(vae.vae, scaled)
        if samples.ndim == 5 and samples.shape[2] == 1:
            samples = samples.squeeze(2)  # VAEs for video say that it is one frame
        if samples.ndim != 4:
            raise EncodingFailed(f"VAE {vae.name} gave a tensor of shape {list(samples.shape)}, not the latent of one image.")
        if not torch.isfinite(samples).all():
            raise EncodingFailed(f"VAE {vae.name} gave values that are not finite in {vae.dtype}; try VAE_PRECISION=fp32.")
        return samples.to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)

    def _write(self, done: Encoded, timings: dict[str, float]) -> Metadata:
        """Write latent, scaled image and, last, metadata."""
        with StagedFiles(done.files.latent.parent) as staged:
            with _timed(timings, "save"):
                latent = latent_bytes(done.latent)
                staged.add(done.files.latent, latent)
                staged.add(done.files.scaled_image, png_bytes(done.scaled))
            metadata = self._metadata(done, hashlib.sha256(latent).hexdigest(), timings)
            staged.add(done.files.metadata, metadata.model_dump_json(indent=2).encode() + b"\n")
            staged.publish()
        return metadata

    def _metadata(self, done: Encoded, latent_sha256: str, timings: Mapping[str, float]) -> Metadata:
        original, scaled = done.original, _size(done.scaled)
        batch, channels, height, width = done.latent.shape
        return Metadata(
            original_image_shape=(original.height, original.width, 3),
            scaled_image_shape=(scaled.height, scaled.width, 3),
            latent_shape=(batch, channels, height, width),
            vae_model_name=done.request.vae_model_name,
            processing_time_ms=round(sum(timings.values())),
            timestamp=utc_timestamp(self._clock()),
            timings_ms=Timings(**timings),
            upscale_method=done.request.upscale_method,
            megapixels=done.request.megapixels,
            crop=latent_crop(scaled, done.vae.factor),
            image_notes=done.source.notes,
            latent_dtype=str(done.latent.dtype).removeprefix("torch."),
            vae_dtype=done.vae.dtype,
            device=done.vae.device,
            comfyui_version=self.runtime.version,
            torch_version=torch.__version__,
            image_sha256=done.source.sha256,
            vae_sha256=done.vae.sha256,
            latent_sha256=latent_sha256,
        )


@dataclass(frozen=True)
class Encoded:
    """What the steps of one request gave, from the checked source to the latent."""

    request: EncodeRequest
    files: OutputFiles
    vae: LoadedVae
    source: SourceImage
    original: Size
    scaled: torch.Tensor
    latent: torch.Tensor


def _search_model_folders(runtime: ComfyRuntime, model_dir: Path | None) -> None:
    """MODEL_DIR first, then ComfyUI's own folders; those of our `comfyui/` also where another tree runs."""
    for kind in ("vae", "vae_approx"):
        runtime.search_vae_folder(PROJECT_DIR / "comfyui" / "models" / kind, kind)
        if model_dir is not None:
            runtime.search_vae_folder(model_dir / kind, kind, first=True)
            runtime.search_vae_folder(model_dir, kind, first=True)


def _size(image: torch.Tensor) -> Size:
    """The size of an image tensor `[batch, height, width, channels]`."""
    return Size(width=image.shape[2], height=image.shape[1])


@contextmanager
def _timed(timings: dict[str, float], step: str) -> Iterator[None]:
    """Put the milliseconds that the block takes into `timings[step]`."""
    start = time.perf_counter()
    yield
    timings[step] = round((time.perf_counter() - start) * 1000, 1)
