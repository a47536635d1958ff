"""The steps of a request, measured: each is a metric, a span of the trace, and a field of the response's timings."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from latent_encoder.telemetry import tracing
from latent_encoder.telemetry.metrics import STAGE_SECONDS


@contextmanager
def timed(timings: dict[str, float], step: str) -> Iterator[None]:
    """Measure the block as a step of a request, and put its milliseconds into `timings[step]`."""
    start = time.perf_counter()
    with tracing.step(step), STAGE_SECONDS.labels(step).time():
        yield
    timings[step] = round((time.perf_counter() - start) * 1000, 1)
