"""The contract as pydantic models: what a request may say and what a response holds. API.md is its prose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from errors import ErrorCode, InvalidRequest, RequestError

MIN_MEGAPIXELS = 0.01  # the range that ImageScaleToTotalPixels declares in its schema
MAX_MEGAPIXELS = 16.0

UpscaleMethod = Literal["lanczos", "nearest", "bilinear", "bicubic", "nearest-exact", "area"]


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain a NUL byte")
    return text


def _inside_model_folders(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError("must be a name inside the model folders: no absolute path and no '..'")
    return name


Text = Annotated[str, Field(min_length=1), AfterValidator(_no_nul)]
VaeModelName = Annotated[Text, AfterValidator(_inside_model_folders)]
Megapixels = Annotated[float, Field(ge=MIN_MEGAPIXELS, le=MAX_MEGAPIXELS, allow_inf_nan=False)]


class EncodeRequest(BaseModel):
    """One image to encode. Fields that it does not know are ignored; no type is converted to another."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    image_path: Text
    vae_model_name: VaeModelName = "qwen_image_vae.safetensors"
    upscale_method: UpscaleMethod = "lanczos"
    megapixels: Megapixels = 1.0
    output_dir: Text = "./output"
    request_id: Text = Field(default_factory=lambda: str(uuid4()))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> EncodeRequest:
        """The request that `fields` describe; a field that is absent or null takes its value from `defaults`.

        Raises:
            InvalidRequest: a field is missing, of the wrong type or out of range; the text names each such field.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        try:
            return cls.model_validate({**defaults, **given})
        except ValidationError as exc:
            raise InvalidRequest(f"Invalid request: {describe(exc)}") from exc


def describe(exc: ValidationError, name: Callable[[str], str] = str) -> str:
    """What pydantic found, as `field: reason (got value)`, one after the other; `name` turns a field into what is shown."""
    return "; ".join(_describe_one(dict(error), name) for error in exc.errors(include_url=False))


def _describe_one(error: Mapping[str, Any], name: Callable[[str], str]) -> str:
    reason = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] != "missing":
        value = repr(error["input"])
        reason += f" (got {value if len(value) <= 80 else value[:79] + '…'})"
    return f"{name(str(error['loc'][0]))}: {reason}"


def request_id_of(fields: Mapping[str, Any]) -> str:
    """The id to answer an invalid request under: its own where it is usable, else a new UUID4."""
    try:
        return EncodeRequest.model_validate({"image_path": "-", "request_id": fields["request_id"]}).request_id
    except (KeyError, ValidationError):
        return str(uuid4())


def utc_timestamp(moment: datetime) -> str:
    """ISO 8601 in UTC to the second, ending in `Z`: `2024-11-06T12:00:00Z`."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Timings(BaseModel):
    """How long each step took, in milliseconds."""

    model_config = ConfigDict(frozen=True)

    load_vae: float
    load_image: float
    scale: float
    encode: float
    save: float


class Metadata(BaseModel):
    """What was done and with what. Shapes of images are `[height, width, 3]`; digests are SHA-256 in hexadecimal."""

    model_config = ConfigDict(frozen=True)

    original_image_shape: tuple[int, int, int]
    scaled_image_shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int, int]
    vae_model_name: str
    processing_time_ms: int
    timestamp: str

    # What follows is ours; the specification has what stands above.
    timings_ms: Timings
    upscale_method: str
    megapixels: float
    crop: tuple[int, int, int, int]
    image_notes: tuple[str, ...]
    latent_dtype: str
    vae_dtype: str
    device: str
    comfyui_version: str
    torch_version: str
    image_sha256: str
    vae_sha256: str | None
    latent_sha256: str


class SuccessResponse(BaseModel):
    """The answer to a request that gave a latent. Paths are absolute; `latent_shape` is `[batch, channels, height, width]`."""

    model_config = ConfigDict(frozen=True)

    status: Literal["success"] = "success"
    request_id: str
    latent_file_path: str
    latent_shape: tuple[int, int, int, int]
    scaled_image_path: str
    metadata: Metadata


class ErrorResponse(BaseModel):
    """The answer to a request that gave no latent."""

    model_config = ConfigDict(frozen=True)

    status: Literal["error"] = "error"
    request_id: str
    error_code: ErrorCode
    error_message: str
    timestamp: str

    @classmethod
    def of(cls, error: RequestError, request_id: str, moment: datetime) -> ErrorResponse:
        return cls(
            request_id=request_id,
            error_code=error.code,
            error_message=str(error),
            timestamp=utc_timestamp(moment),
        )


Response = SuccessResponse | ErrorResponse
