"""The check of a request against the settings and the ComfyUI in use, before any of its files is opened."""

from __future__ import annotations

from typing import TYPE_CHECKING

from config import Settings
from errors import InvalidRequest
from latent_encoder.access import AllowedFolders
from models import EncodeRequest

if TYPE_CHECKING:
    from latent_encoder.comfy_runtime import ComfyRuntime


def admit(
    request: EncodeRequest, settings: Settings, runtime: ComfyRuntime, inputs: AllowedFolders, outputs: AllowedFolders
) -> None:
    """Refuse a request that the settings or this ComfyUI do not allow.

    Raises:
        InvalidRequest: more megapixels than MAX_OUTPUT_MEGAPIXELS, or an exact fit that this ComfyUI cannot make.
        AccessDenied: a path leads out of the allowed folders.
    """
    refuse_more_megapixels(request, settings)
    if request.fit == "exact" and not runtime.can_fit_exactly:
        raise InvalidRequest(
            "Invalid request: fit: 'exact' takes a ComfyUI whose ImageScaleToTotalPixels has the input resolution_steps, "
            f"and {runtime.version} lacks it; use 'crop', or another ComfyUI"
        )
    inputs.check(request.image_path)
    outputs.check(request.output_dir)


def refuse_more_megapixels(request: EncodeRequest, settings: Settings) -> None:
    """Refuse a request for more megapixels than MAX_OUTPUT_MEGAPIXELS.

    Raises:
        InvalidRequest: it asks for more.
    """
    limit = settings.max_output_megapixels
    if request.megapixels > limit:
        raise InvalidRequest(
            f"Invalid request: megapixels: must be at most MAX_OUTPUT_MEGAPIXELS={limit} (got {request.megapixels})"
        )
