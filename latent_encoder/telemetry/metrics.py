"""The metrics of the service for Prometheus, in `prometheus_client`'s registry of the process.

The names follow https://prometheus.io/docs/practices/naming: the unit is seconds, and a counter ends in `_total`.
docs/operating.md lists them.
"""

from __future__ import annotations

from typing import get_args

from prometheus_client import Counter, Gauge, Histogram, Info, disable_created_metrics

from errors import ErrorCode
from models import ImageNote, Timings

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, with its creation time

# Buckets of encodes: a megapixel takes a GPU 50 ms and two CPU cores up to a minute; sixteen take these ten minutes.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 900)
# Buckets of waiting in the topic, which may take hours.
WAITING_SECONDS = (0.01, 0.05, 0.25, 1, 5, 15, 60, 300, 900, 3600, 14400)
# Buckets of calls to storage: some milliseconds in one region, and STORAGE_TIMEOUT_S, 30 seconds by default, at most.
CALL_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

INFO = Info("latent_encoder", "Versions of the service, ComfyUI and torch, and the device.")
READY = Gauge("latent_encoder_ready", "1 if this part of the worker is ready, else 0.", ["part"])

REQUESTS = Counter(
    "latent_encoder_requests",
    "Requests that ended here: success and error are acknowledged by the broker, dropped are left to another worker.",
    ["outcome", "error_code"],
)
STAGE_SECONDS = Histogram("latent_encoder_stage_seconds", "Time of each step of a request.", ["stage"], buckets=SECONDS)
REQUEST_SECONDS = Histogram(
    "latent_encoder_request_seconds", "From taking a request to the acknowledged response.", buckets=SECONDS
)
QUEUE_SECONDS = Histogram(
    "latent_encoder_queue_seconds", "From the record's timestamp to taking it from the topic.", buckets=WAITING_SECONDS
)
IN_FLIGHT = Gauge("latent_encoder_in_flight", "Requests that this worker holds.")
RETRIES = Counter("latent_encoder_retries", "Attempts that failed and are made again.")
DEAD_LETTERS = Counter("latent_encoder_dead_letters", "Acknowledged dead letters.", ["error_code"])
REDELIVERIES = Counter("latent_encoder_redeliveries", "Requests that got the stored response of an earlier delivery.")
BREAKER_OPEN = Gauge("latent_encoder_breaker_open", "1 while the machine counts as broken and no requests are taken, else 0.")
COMMITS = Counter("latent_encoder_commits", "Commits of an offset that the broker confirmed or refused.", ["result"])
REBALANCES = Counter("latent_encoder_rebalances", "Partitions were assigned, revoked or lost.", ["event"])
CONSUMER_LAG = Gauge(
    "latent_encoder_consumer_lag",
    "Requests without a response in this worker's partitions, those in flight included.",
    ["topic", "partition"],
)
OLDEST_REQUEST = Gauge(
    "latent_encoder_oldest_request_seconds",
    "Age of the oldest request without a response in this worker's partitions; 0 if there is none.",
    ["topic", "partition"],
)
RECORDS_MISSED = Counter(
    "latent_encoder_records_missed", "Offsets of the request topic that the broker deleted before they were read."
)
IMAGE_NOTES = Counter(
    "latent_encoder_image_notes",
    "Requests that were encoded with this note, for example alpha_dropped: colours under transparency were encoded.",
    ["note"],
)
EXPIRED_SETS = Counter("latent_encoder_expired_sets", "Sets of output files that were removed after OUTPUT_TTL_DAYS.")
EXPIRED_BYTES = Counter("latent_encoder_expired_bytes", "Bytes of the output files that were removed after OUTPUT_TTL_DAYS.")
VAE_CACHE = Counter("latent_encoder_vae_cache", "Uses of a VAE that was loaded (hit) or had to be loaded (miss).", ["result"])
STORAGE_CALLS = Counter(
    "latent_encoder_storage_calls",
    "Calls to object storage and web servers, each attempt once.",
    ["storage", "operation", "outcome"],
)
STORAGE_SECONDS = Histogram(
    "latent_encoder_storage_call_seconds",
    "Time of an attempt of a call with its body.",
    ["storage", "operation"],
    buckets=CALL_SECONDS,
)
STORAGE_BYTES = Counter(
    "latent_encoder_storage_bytes",
    "Bytes of objects and images that were read (in), or handed over to be written (out), in each attempt.",
    ["storage", "direction"],
)
STORAGE_RETRIES = Counter(
    "latent_encoder_storage_retries", "Attempts of a call that failed and are made again.", ["storage", "reason"]
)
STORAGE_CLAIMS = Counter(
    "latent_encoder_storage_claims",
    "Claims in a bucket that another process held (waited), that it no longer renewed (taken_over), or that this worker lost.",
    ["event"],
)

# Every label is known from the start, so that Prometheus sees its counter grow from zero. Those of storage are known from the
# first call to it.
for _code in ("", *ErrorCode):
    REQUESTS.labels("error" if _code else "success", _code)
for _code in ErrorCode:
    DEAD_LETTERS.labels(_code)
for _metric, _values in (
    (COMMITS, ("ok", "refused")),
    (REBALANCES, ("assigned", "revoked", "lost")),
    (IMAGE_NOTES, get_args(ImageNote)),
    (VAE_CACHE, ("hit", "miss")),
    (STORAGE_CLAIMS, ("waited", "taken_over", "lost")),
    (STAGE_SECONDS, Timings.model_fields),
):
    for _value in _values:
        _metric.labels(_value)
REQUESTS.labels("dropped", "")
