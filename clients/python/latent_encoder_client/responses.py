"""The responses of the service. Fields and codes that this client does not know are accepted and kept."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import BaseModel, ConfigDict

RETRYABLE = frozenset({"ENCODING_FAILED", "IMAGE_UNREACHABLE", "OUTPUT_DIR_NOT_WRITABLE"})
"""The error codes that API.md marks as worth a retry. A code that this client does not know is not retried."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class LatentStatistics(_Part):
    """Mean and standard deviation of each channel: a diffusion model works on `(latent - mean) / std`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Roundtrip(_Part):
    """Distance of the decoded latent from the image."""

    psnr_db: float | None = None
    ssim: float | None = None
    image_sha256: str


class Metadata(_Part):
    """Facts about a latent that a consumer needs. The other fields of the response are in `model_extra`."""

    original_image_shape: tuple[int, int, int]
    scaled_image_shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int, int]
    vae_model_name: str
    crop: tuple[int, int, int, int]
    image_notes: tuple[str, ...] = ()
    latent_format: str = "pt"
    latent_space: str | None = None
    latent_statistics: LatentStatistics | None = None
    image_sha256: str
    vae_sha256: str | None = None
    latent_sha256: str
    scaled_image_sha256: str
    preview_sha256: str | None = None
    roundtrip: Roundtrip | None = None


class Success(_Part):
    """Response to a request that gave a latent. The paths are those of the service."""

    status: Literal["success"]
    request_id: str
    correlation_id: str | None = None
    latent_file_path: str
    latent_shape: tuple[int, int, int, int]
    scaled_image_path: str
    preview_path: str | None = None
    roundtrip_path: str | None = None
    metadata: Metadata


class Failure(_Part):
    """Response to a request that gave no latent."""

    status: Literal["error"]
    request_id: str
    correlation_id: str | None = None
    error_code: str
    error_message: str

    @property
    def worth_a_retry(self) -> bool:
        """True if the same request may succeed later."""
        return self.error_code in RETRYABLE


def parse_response(value: bytes | None) -> Success | Failure:
    """Return the response in the value of a record.

    Raises:
        ValueError: it holds no response.
    """
    fields = json.loads(value or b"null")
    if not isinstance(fields, dict):
        raise ValueError("it is not a JSON object")  # noqa: TRY004  # pydantic's own error for a wrong type is a ValueError too
    return Failure.model_validate(fields) if fields.get("status") == "error" else Success.model_validate(fields)
