"""What the service counts and measures, for Prometheus; one registry for the process, `prometheus_client`'s own.

Names follow https://prometheus.io/docs/practices/naming: seconds, and `_total` for what only grows.
docs/operating.md lists them.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram, Info, disable_created_metrics

from errors import ErrorCode
from models import Timings

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, of when it began

# A GPU takes 50 ms for a megapixel, two CPU cores ten seconds to a minute, and ten minutes for sixteen of them.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 900)
# Requests may wait for hours.
WAITING_SECONDS = (0.01, 0.05, 0.25, 1, 5, 15, 60, 300, 900, 3600, 14400)

INFO = Info("latent_encoder", "What runs: version of the service, ComfyUI and torch, and the device.")
READY = Gauge("latent_encoder_ready", "Whether this part is ready: model, group, broker.", ["part"])

REQUESTS = Counter(
    "latent_encoder_requests",
    "Requests that ended here: success and error are acknowledged by the broker, dropped are left to another worker.",
    ["outcome", "error_code"],
)
STAGE_SECONDS = Histogram("latent_encoder_stage_seconds", "Time of each step of a request.", ["stage"], buckets=SECONDS)
REQUEST_SECONDS = Histogram(
    "latent_encoder_request_seconds", "From taking a request to the acknowledged answer.", buckets=SECONDS
)
QUEUE_SECONDS = Histogram(
    "latent_encoder_queue_seconds", "From the record's timestamp to taking it from the topic.", buckets=WAITING_SECONDS
)
IN_FLIGHT = Gauge("latent_encoder_in_flight", "Requests that this worker holds.")
RETRIES = Counter("latent_encoder_retries", "Attempts that failed and are made again.")
DEAD_LETTERS = Counter("latent_encoder_dead_letters", "Acknowledged dead letters.", ["error_code"])
REDELIVERIES = Counter("latent_encoder_redeliveries", "Requests answered from the files of an earlier answer, without work.")
COMMITS = Counter("latent_encoder_commits", "Commits of an offset that the broker confirmed or refused.", ["result"])
REBALANCES = Counter("latent_encoder_rebalances", "Partitions were assigned, revoked or lost.", ["event"])
CONSUMER_LAG = Gauge(
    "latent_encoder_consumer_lag",
    "Records that wait in this worker's partitions, those in hand included, as of the last fetch.",
    ["topic", "partition"],
)
VAE_CACHE = Counter("latent_encoder_vae_cache", "Uses of a VAE that was loaded (hit) or had to be loaded (miss).", ["result"])

# Known from the start, so that Prometheus sees them grow from zero.
for _code in ("", *ErrorCode):
    REQUESTS.labels("error" if _code else "success", _code)
for _code in ErrorCode:
    DEAD_LETTERS.labels(_code)
for _metric, _values in (
    (COMMITS, ("ok", "refused")),
    (REBALANCES, ("assigned", "revoked", "lost")),
    (VAE_CACHE, ("hit", "miss")),
    (STAGE_SECONDS, Timings.model_fields),
):
    for _value in _values:
        _metric.labels(_value)
REQUESTS.labels("dropped", "")
