"""The faults of the thread that polls: one that concerns the service stops it in good order, one of a report stops nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec

from confluent_kafka import KafkaException

from errors import one_line
from latent_encoder.kafka.connection import kafka_failed
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder.kafka")

P = ParamSpec("P")


@contextmanager
def client_faults() -> Iterator[None]:
    """Stop the worker with one line if a Kafka client refuses a call. Faults of one record do not get here.

    Raises:
        KafkaFailed: a call inside raised KafkaException.
    """
    try:
        yield
    except KafkaException as exc:
        raise kafka_failed("The Kafka client cannot go on", exc.args[0]) from exc


def harmless(event: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Return a decorator that logs an exception of a report, the first time, and goes on."""

    def decorate(call: Callable[P, None]) -> Callable[P, None]:
        reported = False

        @wraps(call)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
            nonlocal reported
            try:
                call(*args, **kwargs)
            except Exception as exc:
                if not reported:
                    log.warning(event, reason=f"{type(exc).__name__}: {one_line(exc)}")
                reported = True

        return guarded

    return decorate
