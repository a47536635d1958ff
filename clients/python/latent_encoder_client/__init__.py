"""Client of the Latent Encoder: it sends requests over Kafka, awaits their responses, and loads the latents.

`Client.send` returns a future, `Client.encode` waits for it. `load_latent` verifies and loads the file of a response, and
`normalise` scales the latent for a diffusion model.
"""

from latent_encoder_client.client import Client
from latent_encoder_client.errors import (
    BrokerUnavailable,
    ChecksumMismatch,
    ClientClosed,
    ClientError,
    DeliveryFailed,
    EncodeFailed,
    FileUnusable,
    ResponseTimeout,
    ResponseUnusable,
    StatisticsMissing,
)
from latent_encoder_client.latents import denormalise, load_latent, load_numpy_latent, normalise, verify_files
from latent_encoder_client.requests import RequestFields
from latent_encoder_client.responses import Failure, LatentStatistics, Metadata, Success
from latent_encoder_client.retries import Retries

__all__ = [
    "BrokerUnavailable",
    "ChecksumMismatch",
    "Client",
    "ClientClosed",
    "ClientError",
    "DeliveryFailed",
    "EncodeFailed",
    "Failure",
    "FileUnusable",
    "LatentStatistics",
    "Metadata",
    "RequestFields",
    "ResponseTimeout",
    "ResponseUnusable",
    "Retries",
    "StatisticsMissing",
    "Success",
    "denormalise",
    "load_latent",
    "load_numpy_latent",
    "normalise",
    "verify_files",
]
