"""The fields of a request beside the path of its image and its ids."""

from __future__ import annotations

from typing import Literal, TypedDict


class RequestFields(TypedDict, total=False):
    """Fields that the service gives its defaults if they are absent. API.md has their meaning."""

    vae_model_name: str
    upscale_method: Literal["lanczos", "nearest", "bilinear", "bicubic", "nearest-exact", "area"]
    megapixels: float
    fit: Literal["crop", "exact"]
    alpha: Literal["drop", "black", "white", "grey"]
    output_dir: str
    latent_format: Literal["pt", "safetensors", "comfy"]
