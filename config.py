"""The settings, read once: command line over environment over `.env` over the defaults below."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from errors import LatentEncoderError
from models import Megapixels, Text, UpscaleMethod, VaeModelName, describe

VERSION = "0.1.0"
PROJECT_DIR = Path(__file__).resolve().parent


class SettingsError(LatentEncoderError):
    """A setting has a value that cannot be used; the text names the variable."""


def _split_names(value: object) -> object:
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


class Settings(BaseSettings):
    """Everything that can be set. The environment variable is the field's name in capitals; empty means not set."""

    model_config = SettingsConfigDict(
        frozen=True, env_file=".env", env_file_encoding="utf-8", env_ignore_empty=True, extra="ignore"
    )

    mode: Literal["standalone", "kafka"] = Field(
        "standalone", description="`standalone` encodes one image and exits; `kafka` serves a topic."
    )

    kafka_bootstrap_servers: str = Field("localhost:9092", description="Kafka brokers, `host:port`, comma-separated.")
    kafka_request_topic: str = Field("latent-encoder-requests", description="Topic that requests are consumed from.")
    kafka_response_topic: str = Field("latent-encoder-responses", description="Topic that answers are produced to.")
    kafka_consumer_group: str = Field("latent-encoder-group", description="Consumer group of the service.")

    model_dir: Path | None = Field(
        None, description="Folder searched first for VAE files, directly and in its `vae/` (TAESD pairs: `vae_approx/`)."
    )
    vae_model_name: VaeModelName = Field("qwen_image_vae.safetensors", description="VAE file for requests that name none.")
    output_dir: Text = Field("./output", description="Folder for the files of requests that name none.")

    comfyui_path: Path = Field(
        PROJECT_DIR / "comfyui", description="ComfyUI tree to run; the one that `setup_comfyui.sh` filled where not set."
    )
    custom_nodes: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_names)] = Field(
        (), description="Packages in ComfyUI's `custom_nodes/` to load at start, comma-separated."
    )

    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_upper)] = Field(
        "INFO", description="Least severe level that is logged: `DEBUG`, `INFO`, `WARNING` or `ERROR`."
    )
    log_format: Literal["json", "text"] = Field("json", description="`json`, one object a line, or `text` for people.")

    upscale_method: UpscaleMethod = Field(
        "lanczos",
        description="`lanczos`, `nearest`, `bilinear`, `bicubic`, `nearest-exact` or `area`, for requests that name none.",
    )
    megapixels: Megapixels = Field(
        1.0, description="Size to scale to, 0.01 to 16.0 (one is 1024 x 1024), for requests that name none."
    )

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="`auto` takes the accelerator that torch finds, else the CPU; `cpu` or `cuda` insist."
    )
    vae_precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="Precision that the VAE runs in; `auto` leaves it to ComfyUI (float32 on a CPU)."
    )
    vae_cache_size: int = Field(2, ge=1, description="How many VAEs stay loaded; the least recently used goes first.")
    max_image_pixels: int = Field(
        89_478_485,
        ge=1,
        description="Largest input image, in pixels, judged from its header; the default is Pillow's own warning limit.",
    )

    @property
    def request_defaults(self) -> dict[str, Any]:
        """What a request gets for the fields that it leaves out."""
        names = ("vae_model_name", "upscale_method", "megapixels", "output_dir")
        return {name: getattr(self, name) for name in names}


def load_settings(overrides: Mapping[str, Any]) -> Settings:
    """The settings in force; `overrides` are those of the command line, None where it said nothing.

    Raises:
        SettingsError: a value cannot be used; the text names the variable.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as exc:
        raise SettingsError(describe(exc, name=str.upper)) from exc
