"""The contract as pydantic models: the fields of requests, responses and metadata. API.md is its prose."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Annotated, Literal
from uuid import uuid4

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from errors import ErrorCode, RequestError
from latent_encoder.storage.locations import is_url, path_of_file_url

MIN_MEGAPIXELS = 0.01  # both limits are those that ImageScaleToTotalPixels declares in its schema
MAX_MEGAPIXELS = 16.0
MAX_PATH_LENGTH = 4096  # Linux's limit (PATH_MAX); the time to resolve a path grows with the square of its length

Alpha = Literal["drop", "black", "white", "grey"]
Fit = Literal["crop", "exact"]
EncoderKind = Literal["single-frame", "stock"]
FileFormat = Literal["pt", "safetensors", "comfy"]
UpscaleMethod = Literal["lanczos", "nearest", "bilinear", "bicubic", "nearest-exact", "area"]
ImageNote = Literal[
    "alpha_applied",
    "alpha_composited",
    "alpha_dropped",
    "clipped_to_8_bit",
    "colour_profile_ignored",
    "converted_from_cmyk",
    "damaged",
    "exif_orientation_applied",
    "exif_orientation_ignored",
    "exif_orientation_misapplied",
    "first_frame_used",
    "other_frame_used",
    "reduced_to_8_bit",
]
"""A code in `image_notes`; API.md explains each."""


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain a NUL byte")
    return text


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise ValueError("must be text that can be written in UTF-8: no lone surrogates") from exc
    return text


def _inside_model_folders(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError("must be a name inside the model folders: no absolute path and no '..'")
    return name


# In the JSON Schema, the patterns stand for the functions' checks.
Text = Annotated[str, Field(min_length=1, json_schema_extra={"pattern": r"^[^\x00]*$"}), AfterValidator(_no_nul)]
PathText = Annotated[Text, Field(max_length=MAX_PATH_LENGTH), AfterValidator(path_of_file_url)]
VaeModelName = Annotated[
    Text, Field(json_schema_extra={"not": {"pattern": r"^/|(^|/)\.\.(/|$)"}}), AfterValidator(_inside_model_folders)
]
Megapixels = Annotated[float, Field(ge=MIN_MEGAPIXELS, le=MAX_MEGAPIXELS, allow_inf_nan=False)]


class EncodeRequest(BaseModel):
    """One image to encode. Unknown fields are ignored; no type is converted to another."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    image_path: PathText = Field(description="Path or URL of a JPEG or PNG.")
    vae_model_name: VaeModelName = Field(
        "qwen_image_vae.safetensors",
        description="Name of a VAE file in the model folders, sub-folders included; no absolute path and no `..`.",
    )
    upscale_method: UpscaleMethod = Field("lanczos", description="How to scale; `nearest` is ComfyUI's `nearest-exact`.")
    megapixels: Megapixels = Field(1.0, description="Size to scale to; one megapixel is 1024 x 1024 pixels, as in ComfyUI.")
    fit: Fit = Field(
        "crop",
        description="How the image gets sides that are multiples of the VAE's factor: `crop` cuts off the rest, as ComfyUI "
        "does; `exact` scales to such sides, if the ComfyUI release can.",
    )
    alpha: Alpha = Field(
        "drop",
        description="Treatment of transparency: `drop` encodes the colours under it, as ComfyUI does; `black`, `white` and "
        "`grey` lay the image over that colour.",
    )
    output_dir: PathText = Field("./output", description="Folder for the files, a path or a URL; made if absent.")
    latent_format: FileFormat = Field(
        "pt",
        description="`pt` (torch), `safetensors` (with metadata in its header) or `comfy` (for ComfyUI's LoadLatent).",
    )
    request_id: Text = Field(
        default_factory=lambda: str(uuid4()),
        description="Comes back in the response and is part of the files' names; made by the service if absent.",
    )
    correlation_id: Annotated[str, AfterValidator(_encodable)] | None = Field(None, description="Comes back in the response.")
    timestamp: float | None = Field(None, description="When the request was made, in Unix seconds; not used.")

    @property
    def has_urls(self) -> bool:
        """The image or the files are behind a network: in object storage or on a web server."""
        return is_url(self.image_path) or is_url(self.output_dir)


CONTENT_FIELDS = tuple(
    name
    for name in EncodeRequest.model_fields
    if name not in ("image_path", "output_dir", "request_id", "correlation_id", "timestamp")
)
"""The fields of a request that decide, together with the image, what its files hold."""


IMAGE_FILES = ("scaled_image", "preview", "roundtrip")
"""The image files of a request, of which some are optional. The files' names begin with these words."""


def utc_timestamp(moment: datetime) -> str:
    """Return the moment in ISO 8601, in UTC to the second, with a `Z`: `2024-11-06T12:00:00Z`."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# The schema states the forms of these texts. They are not checked here, because our own code writes them.
Sha256 = Annotated[str, Field(json_schema_extra={"pattern": "^[0-9a-f]{64}$"})]
DateTime = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
ImageShape = tuple[int, int, int]
LatentShape = tuple[int, int, int, int]


def _is_none(value: object) -> bool:
    return value is None


class Timings(BaseModel):
    """Duration of each step in milliseconds."""

    model_config = ConfigDict(frozen=True)

    load_vae: float = Field(description="Finding, judging and loading the VAE; near 0 if it was loaded already.")
    load_image: float = Field(description="Reading, judging and decoding the image.")
    scale: float = Field(description="Scaling the image.")
    encode: float = Field(description="Encoding the scaled image.")
    save: float = Field(description="Writing the files, without the final renames.")
    roundtrip: float = Field(0.0, description="Decoding and comparing, if ROUNDTRIP is set.")


class Roundtrip(BaseModel):
    """Distance of the decoded latent from the part of the scaled image that it covers, as 8-bit pixels of both."""

    model_config = ConfigDict(frozen=True)

    psnr_db: float | None = Field(description="Peak signal-to-noise ratio in decibels; null if both are equal.")
    ssim: float | None = Field(description="Mean structural similarity, at most 1; null if a side is shorter than 7 pixels.")
    image_sha256: Sha256 = Field(description="SHA-256 of the decoded latent's image.")


class LatentStatistics(BaseModel):
    """Mean and deviation of each channel of a latent space: a diffusion model works on `(latent - mean) / std`."""

    model_config = ConfigDict(frozen=True)

    mean: tuple[float, ...] = Field(description="Mean of each channel, as a float32.")
    std: tuple[float, ...] = Field(description="Standard deviation of each channel, as a float32; never 0.")


class LatentFacts(BaseModel):
    """Facts about a latent that are the same each time its request is run.

    A `safetensors` or `comfy` file has them in its header, in this order.
    """

    model_config = ConfigDict(frozen=True)

    original_image_shape: ImageShape = Field(description="`[height, width, 3]` after the EXIF orientation was applied.")
    scaled_image_shape: ImageShape = Field(description="`[height, width, 3]` of the scaled image, before the crop.")
    latent_shape: LatentShape = Field(description="`[batch, channels, height, width]`.")
    vae_model_name: str = Field(description="Name of the VAE, as requested.")

    # The fields from here on are ours; the specification has those above.
    image_path: str | None = Field(None, description="Path of the image, as the request gave it; a URL without its query.")
    upscale_method: UpscaleMethod = Field(description="As requested.")
    megapixels: float = Field(description="As requested.")
    fit: Fit = Field("crop", description="As requested.")
    alpha: Alpha = Field("drop", description="As requested.")
    crop: tuple[int, int, int, int] = Field(
        description="`[left, upper, right, lower]`: the box of the scaled image that the latent covers."
    )
    image_notes: tuple[ImageNote, ...] = Field(description="Changes beyond decoding, as codes.")
    colour_error: float | None = Field(
        None,
        description="With the note `colour_profile_ignored`, the mean difference of the image's samples from its colours in "
        "sRGB, in levels of 8 bits; null if it was not measured.",
    )
    latent_dtype: str = Field(description="Type of the latent's numbers in its file, always `float32`.")
    vae_dtype: str = Field(description="Precision of the VAE, for example `bfloat16`.")
    encoder: EncoderKind = Field(
        description="The encoder that ran: `single-frame` is ours, for VAEs of the Wan family; `stock` is the VAE's own."
    )
    tiled: bool = Field(description="True if memory ran out and ComfyUI encoded in tiles: a slightly different latent.")
    device: str = Field(description="Device of the VAE, for example `cuda:0`.")
    comfyui_version: str = Field(description="Version of ComfyUI.")
    image_decoder: str | None = Field(None, description="Decoder of the image, with its version; null if it is not known.")
    torch_version: str = Field(description="Version of torch.")
    image_sha256: Sha256 = Field(description="SHA-256 of the input image's file.")
    vae_sha256: Sha256 | None = Field(
        description="SHA-256 of the VAE's file; for a TAESD pair, of the encoder's bytes followed by the decoder's; null if "
        "it has no file."
    )
    scaled_image_sha256: Sha256 = Field(description="SHA-256 of the scaled image's file.")
    latent_format: FileFormat = Field("pt", description="Format of the latent's file, as requested.")
    latent_space: str | None = Field(
        None,
        description="Meaning of the latent's numbers: the name of ComfyUI's class in `comfy.latent_formats`; null if it is "
        "not known.",
    )
    latent_statistics: LatentStatistics | None = Field(
        None,
        description="The numbers that scale the latent for a diffusion model; null if they are not known, or if ComfyUI does "
        "more than scale and shift each channel.",
    )


class Metadata(LatentFacts):
    """Facts about a latent and the run that made it. Shapes of images are `[height, width, 3]`, checksums SHA-256 in hex."""

    # Fields with a default, here and in `LatentFacts`, came later: the metadata that older versions wrote lack them.
    processing_time_ms: int = Field(description="Sum of the timings in milliseconds, without the final renames.")
    timestamp: DateTime = Field(description="Time when the files were written, in UTC to the second.")

    # The fields from here on are ours; the specification has those above.
    timings_ms: Timings = Field(description="Milliseconds of each step.")
    latent_sha256: Sha256 = Field(description="SHA-256 of the latent's file.")
    fingerprint: Sha256 = Field(description="SHA-256 of everything that decides the content and the place of the files.")
    preview_sha256: Sha256 | None = Field(None, description="SHA-256 of the preview's file; null if none was asked for.")
    roundtrip: Roundtrip | None = Field(
        None, description="Distance of the decoded latent from the image; null if it was not asked for."
    )
    request_id: str | None = Field(None, description="Id of the request that the files belong to; null in old metadata.")
    origin: str | None = Field(
        None,
        description="Kafka record that the files were written for, `<topic id>/<partition>/<offset>`; null outside of Kafka.",
    )
    source_id: str | None = Field(
        None,
        description="Id made of the image's absolute path and the request's fields; null if the request was given an id.",
    )

    @property
    def sha256_by_file(self) -> dict[str, str]:
        """Checksum of each file that these metadata describe, by the file's field in `OutputFiles`."""
        checksums = {
            "latent": self.latent_sha256,
            "scaled_image": self.scaled_image_sha256,
            "preview": self.preview_sha256,
            "roundtrip": self.roundtrip.image_sha256 if self.roundtrip else None,
        }
        return {name: sha256 for name, sha256 in checksums.items() if sha256 is not None}


class SuccessResponse(BaseModel):
    """Response to a request that gave a latent. Paths are absolute; `latent_shape` is `[batch, channels, height, width]`."""

    model_config = ConfigDict(frozen=True)

    status: Literal["success"] = Field("success", description="Outcome of the request.")
    request_id: str = Field(description="That of the request, or one made for it.")
    latent_file_path: str = Field(description="Absolute path or URL of the latent.")
    latent_shape: LatentShape = Field(description="`[batch, channels, height, width]`.")
    scaled_image_path: str = Field(description="Absolute path or URL of the scaled image, not yet cropped.")
    metadata: Metadata = Field(description="Facts about the latent.")
    preview_path: str | None = Field(
        None, exclude_if=_is_none, description="Absolute path or URL of the preview; absent if there is none."
    )
    roundtrip_path: str | None = Field(
        None, exclude_if=_is_none, description="Absolute path or URL of the decoded latent's image; absent if there is none."
    )


class ErrorResponse(BaseModel):
    """Response to a request that gave no latent."""

    model_config = ConfigDict(frozen=True)

    status: Literal["error"] = Field("error", description="Outcome of the request.")
    request_id: str = Field(description="That of the request, or one made for it.")
    error_code: ErrorCode = Field(description="Kind of the fault.")
    error_message: str = Field(description="Fault, the file or field, and how to fix it.")
    timestamp: DateTime = Field(description="Time of the response, in UTC to the second.")

    @classmethod
    def of(cls, error: RequestError, request_id: str, moment: datetime) -> ErrorResponse:
        """Return the response for an error; its message is the error's text."""
        return cls(
            request_id=request_id,
            error_code=error.code,
            error_message=str(error),
            timestamp=utc_timestamp(moment),
        )


Response = SuccessResponse | ErrorResponse


class ResponseMessage(BaseModel):
    """Response as it goes to the response topic: one shape for both outcomes. Fields that do not apply are null.

    The exceptions are the paths of preview and roundtrip image, which are absent.
    """

    model_config = ConfigDict(frozen=True)

    request_id: str = Field(description="That of the request, or one made for it.")
    correlation_id: str | None = Field(description="That of the request; null if it has no valid one.")
    status: Literal["success", "error"] = Field(description="Outcome of the request.")
    latent_file_path: str | None = Field(None, description="Absolute path or URL of the latent.")
    latent_shape: LatentShape | None = Field(None, description="`[batch, channels, height, width]`.")
    error_message: str | None = Field(None, description="Fault, the file or field, and how to fix it.")
    timestamp: int = Field(description="Unix time in whole seconds.")

    # The fields from here on are ours; the specification has those above.
    error_code: ErrorCode | None = Field(None, description="Kind of the fault.")
    scaled_image_path: str | None = Field(None, description="Absolute path or URL of the scaled image, not yet cropped.")
    metadata: Metadata | None = Field(None, description="Facts about the latent.")
    preview_path: str | None = Field(
        None, exclude_if=_is_none, description="Absolute path or URL of the preview; absent if there is none."
    )
    roundtrip_path: str | None = Field(
        None, exclude_if=_is_none, description="Absolute path or URL of the decoded latent's image; absent if there is none."
    )

    @classmethod
    def of(cls, response: Response, correlation_id: str | None, moment: datetime) -> ResponseMessage:
        """Return the message for a response, with the request's correlation id and the time of responding."""
        fields = response.model_dump(exclude={"timestamp"})
        return cls(**fields, correlation_id=correlation_id, timestamp=int(moment.timestamp()))
