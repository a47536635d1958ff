"""The event `started`: everything about a worker that a person asks for first when it misbehaves."""

from __future__ import annotations

import math
from typing import Any

from confluent_kafka import libversion
from pydantic import SecretStr

from config import VERSION, Settings
from latent_encoder.container import memory_limit
from latent_encoder.kafka.properties import overridden_properties
from latent_encoder.kafka.property_file import read_property_file
from latent_encoder.masking import HIDDEN
from latent_encoder.setting_names import unknown_variables
from latent_encoder.telemetry.logs import get_logger
from service import LatentEncoder

log = get_logger("latent_encoder")

LIMITS = ("kafka_", "max_", "shutdown_timeout_s", "encode_timeout_s", "image_timeout_s", "vae_cache_size")
"""The beginnings of the settings that limit the work of a worker, if their values are numbers."""


def log_start(settings: Settings, encoder: LatentEncoder) -> None:
    """Log that a worker has loaded its parts, and with which settings."""
    log.info(
        "started",
        version=VERSION,
        **encoder.versions,
        librdkafka_version=libversion()[0],
        comfyui_path=str(encoder.runtime.path),
        vae=_default_vae(settings, encoder),
        brokers=settings.kafka_bootstrap_servers,
        request_topic=settings.kafka_request_topic,
        response_topic=settings.kafka_response_topic,
        dlq_topic=settings.kafka_dlq_topic,
        group=settings.kafka_consumer_group,
        limits=limits(settings),
        memory_limit_bytes=None if math.isinf(limit := memory_limit()) else int(limit),
        settings=changed_settings(settings),
        properties=sorted(read_property_file(settings.kafka_client_config)) if settings.kafka_client_config else [],
        unknown_variables=[str(variable) for variable in unknown_variables()],
    )
    if overridden := overridden_properties(settings):
        log.warning("settings win over properties in KAFKA_CLIENT_CONFIG", properties=overridden)


def limits(settings: Settings) -> dict[str, int | float]:
    """Return the settings that limit the work of a worker."""
    values = {name: getattr(settings, name) for name in Settings.model_fields if name.startswith(LIMITS)}
    return {
        name.upper(): value for name, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


def changed_settings(settings: Settings) -> dict[str, str]:
    """Return the settings that differ from their defaults; the values of secrets are stars."""
    return {
        name.upper(): _shown(getattr(settings, name))
        for name, field in Settings.model_fields.items()
        if getattr(settings, name) != field.default
    }


def _default_vae(settings: Settings, encoder: LatentEncoder) -> dict[str, Any]:
    """Return the facts about the VAE for requests that name none; only its name if WARMUP did not load it."""
    vae = encoder.vaes.loaded(settings.vae_model_name)
    facts = {"sha256": vae.sha256, "dtype": vae.dtype, "device": vae.device, "encoder": vae.encoder} if vae else {}
    return {"name": settings.vae_model_name, "loaded": vae is not None, **facts}


def _shown(value: object) -> str:
    if isinstance(value, SecretStr):
        return HIDDEN
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
