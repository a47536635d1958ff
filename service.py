"""The pipeline: a request in, files and a response out.

`LatentEncoder` is made once per process and used for many requests, from any thread.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import ValidationError

from config import PROJECT_DIR, Settings
from errors import (
    EncodingFailed,
    ImageNotFound,
    InvalidRequest,
    RequestError,
    ScalingFailed,
    SetupError,
    UnexpectedError,
    as_request_error,
    translated,
)
from latent_encoder.access import AllowedFolders
from latent_encoder.comfy_runtime import ComfyRuntime, load_runtime
from latent_encoder.geometry import Box, Size, covered, cropped, scaled_size
from latent_encoder.images.loading import load_image
from latent_encoder.images.source import PILLOW_LOCK, ImageLimits, read_file
from latent_encoder.outputs.files import (
    WRITING,
    OutputFiles,
    OutputFolder,
    StagedFiles,
    open_output_folder,
    output_files,
    png_bytes,
    prepare_output_dir,
    space_needed,
)
from latent_encoder.outputs.latent_files import latent_bytes
from latent_encoder.outputs.preview import latent_picture, preview_image
from latent_encoder.outputs.roundtrip import Comparison, compare
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.telemetry.metrics import STAGE_SECONDS
from latent_encoder.telemetry.tracing import step as traced_step
from latent_encoder.trial import try_nodes
from latent_encoder.vae.cache import VaeCache
from latent_encoder.vae.loaded_vae import Encoding, LoadedVae
from models import (
    EncodeRequest,
    EncoderKind,
    ErrorResponse,
    Metadata,
    Response,
    SuccessResponse,
    Timings,
    utc_timestamp,
)

log = get_logger("latent_encoder")

COMFYUI_METHODS = {"nearest": "nearest-exact"}  # the specification's name for it; the others are ComfyUI's own


WARMUP_SIDE = 256  # pixels


def utc_now() -> datetime:
    return datetime.now(UTC)


class LatentEncoder:
    """ComfyUI's runtime, the VAEs that are loaded, and the steps from a request to its response."""

    def __init__(self, settings: Settings, runtime: ComfyRuntime, clock: Callable[[], datetime] = utc_now) -> None:
        self._settings = settings
        self.runtime = runtime
        self._clock = clock
        self._images = ImageLimits.of(settings)
        self._outputs = AllowedFolders("ALLOWED_OUTPUT_DIRS", settings.allowed_output_dirs)
        self.vaes = VaeCache(runtime, settings)
        self.tried_nodes: tuple[str, ...] = ()
        """Ids of the nodes that ran on a test picture when this was set up."""

    @property
    def versions(self) -> dict[str, str]:
        """What it runs on, by the names of a metric's labels."""
        return {
            "comfyui_version": self.runtime.version,
            "torch_version": torch.__version__,
            "device": self.runtime.device,
        }

    @classmethod
    def set_up(cls, settings: Settings) -> LatentEncoder:
        """Load ComfyUI as the settings say, and try its nodes on a small picture.

        Raises:
            SetupError: ComfyUI is not there, lacks a node or a package, fails on the picture, or cannot run on the device.
        """
        torch.set_num_threads(settings.torch_num_threads or usable_cpus())
        runtime = load_runtime(settings.comfyui_path, settings.device, settings.vae_precision, settings.custom_nodes)
        _search_model_folders(runtime, settings.model_dir)
        Image.MAX_IMAGE_PIXELS = settings.max_image_pixels  # one limit, for LoadImage too
        encoder = cls(settings, runtime)
        with PILLOW_LOCK, runtime.contained():
            encoder.tried_nodes = try_nodes(runtime)
            log.debug("comfyui encodes", version=runtime.version, nodes=encoder.tried_nodes, decoder=runtime.decoder)
        return encoder

    def answer(self, request: EncodeRequest) -> Response:
        """Encode, and answer whatever happens: every failure becomes an error response."""
        try:
            return self.encode(request)
        except Exception as exc:
            error = as_request_error(exc)
            log_failure(error, request_id=request.request_id)
            return ErrorResponse.of(error, request.request_id, self._clock())

    def encode(self, request: EncodeRequest) -> SuccessResponse:
        """Load the VAE, load the image, scale it, encode it, write the files.

        Raises:
            RequestError: of the class that says what failed. No file is left behind then.
        """
        response = self.write(self.encode_prepared(self.prepare(request)))
        timings = response.metadata.timings_ms.model_dump()
        log.info("request encoded", request_id=request.request_id, latent=response.latent_file_path, **timings)
        return response

    def warm_up(self) -> None:
        """Load the VAE of the requests that name none and encode a picture, so that the first request waits for neither.

        Raises:
            SetupError: it fails, as every such request would.
        """
        try:
            vae = self.vaes.get(self._settings.vae_model_name)
            with torch.inference_mode():
                self._encode(vae, torch.full((1, WARMUP_SIDE, WARMUP_SIDE, 3), 0.5))
        except RequestError as exc:
            raise SetupError(
                f"The warm-up failed: {exc} VAE_MODEL_NAME names the VAE; WARMUP=false starts without, "
                "where every request names one of its own."
            ) from exc

    # The three stages of `encode`. Each may run in a thread of its own, beside the others' work on other requests.

    def prepare(self, request: EncodeRequest) -> Prepared:
        """Load the VAE, load the image and scale it, and make sure that the output folder can be written to.

        Raises:
            RequestError: of the class that says what failed.
        """
        self._admit(request)
        timings = dict.fromkeys(Timings.model_fields, 0.0)
        with torch.inference_mode():
            with _timed(timings, "load_vae"):
                vae = self.vaes.get(request.vae_model_name)
            with _timed(timings, "load_image"):
                image = load_image(self.runtime, request.image_path, self._images)
            with _timed(timings, "scale"):
                scaled = self._scale(image.pixels, request, vae.cells.factor)
        files = output_files(request.output_dir, request.image_path, request.request_id, request.latent_format)
        prepare_output_dir(files.folder, self._outputs, self._space_needed(_size(scaled), vae))
        # The unscaled pixels end here: a large photo's must not stay in memory through the encode.
        return Prepared(request, files, vae, image.sha256, image.notes, _size(image.pixels), scaled, timings)

    def encode_prepared(self, prepared: Prepared) -> Encoded:
        """The encode itself, and the decode where ROUNDTRIP asks for it.

        Raises:
            EncodingFailed: the VAE gave no usable latent or image, or memory ran out.
        """
        vae, scaled, timings, comparison = prepared.vae, prepared.scaled, prepared.timings, None
        with torch.inference_mode():
            with _timed(timings, "encode"):
                latent, crop, encoding = self._encode(vae, scaled)
            if self._settings.roundtrip:
                with _timed(timings, "roundtrip"):
                    comparison = compare(self.runtime, vae, latent, cropped(scaled, crop))
        return Encoded(prepared, latent, crop, encoding.tiled, encoding.encoder, comparison)

    def write(self, encoded: Encoded) -> SuccessResponse:
        """Write latent, scaled image, the pictures that the settings ask for and, last, metadata.

        Raises:
            AccessDenied, OutputDirNotWritable: none of the files is left behind then.
        """
        prepared, files = encoded.prepared, encoded.prepared.files
        comparison = encoded.comparison
        with WRITING, open_output_folder(files.folder, self._outputs) as folder, StagedFiles(folder) as staged:
            with _timed(prepared.timings, "save"):
                png = png_bytes(prepared.scaled)
                facts = self._facts(encoded, png)
                latent = latent_bytes(
                    encoded.latent, prepared.request.latent_format, frames=prepared.vae.cells.frames, header=facts
                )
                preview = self._preview(encoded) if self._settings.preview else None
                staged.add(files.latent.name, latent)
                staged.add(files.scaled_image.name, png)
                staged.add_or_remove(files.preview.name, preview)
                staged.add_or_remove(files.roundtrip.name, comparison.png if comparison is not None else None)
            metadata = self._metadata(encoded, facts, latent, preview)
            staged.add(files.metadata.name, metadata.model_dump_json(indent=2).encode() + b"\n")
            staged.publish()
        return _success(prepared.request, files, metadata, self._asked_for(files))

    def stored_answer(self, request: EncodeRequest) -> SuccessResponse | None:
        """The answer that this request got before, where all files asked for are still there, whole and of this input.

        Their checksums say whether they are whole, the fingerprint in the metadata whether they match. An image that is gone
        since counts as unchanged: who got the first answer may have removed it. The answer names a picture that was asked for
        then and is not now, if that is whole.

        Raises:
            RequestError: the request is not allowed, or the image or the VAE cannot be read.
        """
        self._admit(request)
        files = output_files(request.output_dir, request.image_path, request.request_id, request.latent_format)
        metadata, whole = _stored(files, self._outputs)
        if metadata is None or not self._asked_for(files) <= whole:
            return None
        try:
            image_sha256 = hashlib.sha256(read_file(request.image_path, self._images)).hexdigest()
        except ImageNotFound:
            image_sha256 = metadata.image_sha256
        expected = self._fingerprint(request, files, image_sha256, self.vaes.get(request.vae_model_name))
        return _success(request, files, metadata, whole) if metadata.fingerprint == expected else None

    def _asked_for(self, files: OutputFiles) -> frozenset[Path]:
        """The files that a request gets under these settings, beside the metadata."""
        pictures = {files.preview: self._settings.preview, files.roundtrip: self._settings.roundtrip}
        return frozenset({files.latent, files.scaled_image, *(path for path, wanted in pictures.items() if wanted)})

    def _space_needed(self, scaled: Size, vae: LoadedVae) -> int:
        pictures = 1 + 2 * self._settings.preview + self._settings.roundtrip  # a preview is twice as wide as the others
        return space_needed(scaled, vae.cells.factor, vae.cells.channels, pictures)

    def _admit(self, request: EncodeRequest) -> None:
        """Refuse what the settings do not allow, before anything is looked at for it.

        Raises:
            InvalidRequest: more megapixels than MAX_OUTPUT_MEGAPIXELS.
                Or an exact fit, which this ComfyUI cannot make.
            AccessDenied: a path that leads out of the allowed folders.
        """
        limit = self._settings.max_output_megapixels
        if request.megapixels > limit:
            raise InvalidRequest(
                f"Invalid request: megapixels: must be at most MAX_OUTPUT_MEGAPIXELS={limit} (got {request.megapixels})"
            )
        if request.fit == "exact" and not self.runtime.can_fit_exactly:
            raise InvalidRequest(
                "Invalid request: fit: 'exact' takes a ComfyUI whose ImageScaleToTotalPixels has the input resolution_steps, "
                f"and {self.runtime.version} has not; use 'crop', or another ComfyUI"
            )
        self._images.folders.check(request.image_path)
        self._outputs.check(request.output_dir)

    def _scale(self, image: torch.Tensor, request: EncodeRequest, factor: int) -> torch.Tensor:
        """The scaled image, float32 `[1, height, width, 3]`; both sides are at least `factor` pixels."""
        original = _size(image)
        target = scaled_size(original, request.megapixels)
        goal = f"the {original} image to {request.megapixels} megapixels ({target})"
        method = COMFYUI_METHODS.get(request.upscale_method, request.upscale_method)
        steps = factor if request.fit == "exact" else None
        with translated(ScalingFailed, f"Cannot scale {goal}"):
            scaled = self.runtime.scale(image, method, request.megapixels, steps)
        if min(_size(scaled)) < factor:
            raise ScalingFailed(
                f"Cannot encode after scaling {goal}: the VAE needs at least {factor} px a side. "
                "Ask for more megapixels, or crop the image."
            )
        return scaled

    def _encode(self, vae: LoadedVae, scaled: torch.Tensor) -> tuple[torch.Tensor, Box, Encoding]:
        """The latent as one contiguous float32 tensor `[batch, channels, height, width]` on the CPU, and what it covers."""
        size, factor = _size(scaled), vae.cells.factor
        ragged = any(side % factor for side in size)
        advice = f" (its sides are no multiples of {factor}; fit=exact makes them so where this ComfyUI can)" if ragged else ""
        with translated(EncodingFailed, f"VAE {vae.name} failed to encode a {size} image{advice}"):
            encoding = vae.encode(self.runtime, scaled, self._settings.oom_policy)
        samples = encoding.samples
        if samples.ndim == 5 and samples.shape[2] == 1:
            samples = samples.squeeze(2)  # VAEs for video say that it is one frame
        if samples.ndim != 4:
            raise EncodingFailed(f"VAE {vae.name} gave a tensor of shape {list(samples.shape)}, not the latent of one image.")
        if not torch.isfinite(samples).all():
            raise EncodingFailed(f"VAE {vae.name} gave values that are not finite in {vae.dtype}; try VAE_PRECISION=fp32.")
        with translated(EncodingFailed, f"It cannot be told which part of a {size} image the latent of VAE {vae.name} covers"):
            crop = covered(size, encoding.seen, Size(width=samples.shape[3], height=samples.shape[2]), factor)
        return samples.to("cpu", torch.float32).clone(memory_format=torch.contiguous_format), crop, encoding

    def _preview(self, encoded: Encoded) -> bytes:
        """A PNG of what the latent covers, and of the latent beside it."""
        prepared = encoded.prepared
        picture = latent_picture(self.runtime, encoded.latent, prepared.vae.latent_space)
        return png_bytes(preview_image(picture, prepared.scaled, encoded.crop, prepared.vae.cells.factor))

    def _facts(self, encoded: Encoded, png: bytes) -> dict[str, Any]:
        """What the metadata say that the same request gives again, wherever it is written: a latent's file may hold it too."""
        prepared, request = encoded.prepared, encoded.prepared.request
        original, scaled = prepared.original, _size(prepared.scaled)
        return {
            "original_image_shape": (original.height, original.width, 3),
            "scaled_image_shape": (scaled.height, scaled.width, 3),
            "latent_shape": tuple(encoded.latent.shape),
            "vae_model_name": request.vae_model_name,
            "upscale_method": request.upscale_method,
            "megapixels": request.megapixels,
            "fit": request.fit,
            "crop": encoded.crop,
            "image_notes": prepared.image_notes,
            "latent_dtype": str(encoded.latent.dtype).removeprefix("torch."),
            "vae_dtype": prepared.vae.dtype,
            "encoder": encoded.encoder,
            "tiled": encoded.tiled,
            "device": prepared.vae.device,
            "comfyui_version": self.runtime.version,
            "image_decoder": self.runtime.decoder,
            "torch_version": torch.__version__,
            "image_sha256": prepared.image_sha256,
            "vae_sha256": prepared.vae.sha256,
            "scaled_image_sha256": hashlib.sha256(png).hexdigest(),
            "latent_format": request.latent_format,
            "latent_space": prepared.vae.latent_space,
        }

    def _metadata(self, encoded: Encoded, facts: Mapping[str, Any], latent: bytes, preview: bytes | None) -> Metadata:
        prepared = encoded.prepared
        return Metadata(
            **facts,
            processing_time_ms=round(sum(prepared.timings.values())),
            timestamp=utc_timestamp(self._clock()),
            timings_ms=Timings(**prepared.timings),
            latent_sha256=hashlib.sha256(latent).hexdigest(),
            fingerprint=self._fingerprint(prepared.request, prepared.files, prepared.image_sha256, prepared.vae),
            preview_sha256=hashlib.sha256(preview).hexdigest() if preview is not None else None,
            roundtrip=encoded.comparison and encoded.comparison.roundtrip,
        )

    def _fingerprint(self, request: EncodeRequest, files: OutputFiles, image_sha256: str, vae: LoadedVae) -> str:
        """SHA-256 of everything that decides what the files hold and where they are."""
        parts = (
            image_sha256,
            vae.sha256 or vae.name,
            vae.dtype,
            vae.encoder,
            request.upscale_method,
            request.megapixels,
            request.fit,
            self.runtime.version,
            self.runtime.decoder,
            str(files.latent),
        )
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Prepared:
    """A request that is ready for the encode; `scaled` is float32 `[1, height, width, 3]`."""

    request: EncodeRequest
    files: OutputFiles
    vae: LoadedVae
    image_sha256: str
    image_notes: tuple[str, ...]
    original: Size
    scaled: torch.Tensor
    timings: dict[str, float]


@dataclass(frozen=True)
class Encoded:
    """A request whose latent is there and not yet written: float32 `[batch, channels, height, width]`."""

    prepared: Prepared
    latent: torch.Tensor
    crop: Box
    """The part of the scaled image that the latent covers."""
    tiled: bool
    encoder: EncoderKind
    comparison: Comparison | None
    """None where ROUNDTRIP does not ask for it."""


def ready_encoder(settings: Settings) -> LatentEncoder:
    """The encoder as Kafka mode begins with it: loaded, and warm where WARMUP says so.

    Raises:
        SetupError: as `LatentEncoder.set_up` and `LatentEncoder.warm_up`.
    """
    encoder = LatentEncoder.set_up(settings)
    if settings.warmup:
        encoder.warm_up()
    return encoder


def log_failure(error: RequestError, **fields: Any) -> None:
    """Log why a request failed, with the traceback where it is a fault of ours."""
    if isinstance(error, UnexpectedError):
        log.error("request failed unexpectedly", error_code=error.code, exc_info=error.__cause__, **fields)
    else:
        log.warning("request failed", error_code=error.code, reason=str(error), **fields)


def _success(request: EncodeRequest, files: OutputFiles, metadata: Metadata, there: Collection[Path]) -> SuccessResponse:
    """The answer; it names those pictures that are `there`."""
    return SuccessResponse(
        request_id=request.request_id,
        latent_file_path=str(files.latent),
        latent_shape=metadata.latent_shape,
        scaled_image_path=str(files.scaled_image),
        metadata=metadata,
        preview_path=str(files.preview) if files.preview in there else None,
        roundtrip_path=str(files.roundtrip) if files.roundtrip in there else None,
    )


def _stored(files: OutputFiles, allowed: AllowedFolders) -> tuple[Metadata | None, frozenset[Path]]:
    """The metadata of an earlier run, and which of its files are there and have the checksums that it states."""
    try:
        with allowed.open_folder(str(files.folder)) as descriptor:
            folder = OutputFolder(files.folder, descriptor)
            metadata = Metadata.model_validate_json(folder.read(files.metadata.name))
            stated: dict[Path, str] = {getattr(files, name): sha256 for name, sha256 in metadata.sha256_by_file.items()}
            return metadata, frozenset(path for path, sha256 in stated.items() if _has(folder, path.name, sha256))
    except (OSError, ValidationError):
        return None, frozenset()  # not there, or of another version: then the request is encoded


def _has(folder: OutputFolder, name: str, sha256: str) -> bool:
    """Whether the folder has that file, with those bytes."""
    try:
        return hashlib.sha256(folder.read(name)).hexdigest() == sha256
    except OSError:
        return False


def _search_model_folders(runtime: ComfyRuntime, model_dir: Path | None) -> None:
    """MODEL_DIR first, then ComfyUI's own folders; those of our `comfyui/` also where another tree runs."""
    for kind in ("vae", "vae_approx"):
        runtime.search_vae_folder(PROJECT_DIR / "comfyui" / "models" / kind, kind)
        if model_dir is not None:
            runtime.search_vae_folder(model_dir / kind, kind, first=True)
            runtime.search_vae_folder(model_dir, kind, first=True)


def usable_cpus() -> int:
    """How many threads the encode gets: torch's own choice, but no more than the container's CPU quota allows."""
    from loky import cpu_count  # it takes a while to import, and knows what a control group allows

    return min(torch.get_num_threads(), int(cpu_count()))


def _size(image: torch.Tensor) -> Size:
    """The size of an image tensor `[batch, height, width, channels]`."""
    return Size(width=image.shape[2], height=image.shape[1])


@contextmanager
def _timed(timings: dict[str, float], step: str) -> Iterator[None]:
    """Put the milliseconds that the block takes into `timings[step]`; metrics and traces get them too."""
    start = time.perf_counter()
    with traced_step(step), STAGE_SECONDS.labels(step).time():
        yield
    timings[step] = round((time.perf_counter() - start) * 1000, 1)
