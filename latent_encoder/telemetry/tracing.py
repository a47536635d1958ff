"""OpenTelemetry traces of Kafka mode: a span for each request, joined to the trace in its headers, with a child per step.

They are optional: without `opentelemetry-api` there are no spans, and without configuration spans are not sent. The
configuration is OpenTelemetry's own: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from config import VERSION, SettingsError
from errors import RequestError, one_line
from latent_encoder.masking import masked
from latent_encoder.telemetry.logs import get_logger

if TYPE_CHECKING:
    from opentelemetry.trace import Span

try:
    from opentelemetry import propagate, trace
except ImportError:
    INSTALLED = False
else:
    INSTALLED = True
    # It logs a header that is no valid baggage, with its content. Headers of requests stay out of the log.
    logging.getLogger("opentelemetry.baggage").setLevel(logging.ERROR)

log = get_logger("latent_encoder.tracing")

NAME = "latent-encoder"
CONFIGURED_BY = ("OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
FLUSH_MS = 5000
"""Longest wait for the collector at the end: the worker ends also if the collector does not respond."""

# The entry points of OpenTelemetry's exporters, by the value of OTEL_EXPORTER_OTLP_PROTOCOL.
OTLP = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}


@contextmanager
def exported() -> Iterator[None]:
    """Send spans as OpenTelemetry's environment variables demand; the end of the context flushes the rest.

    Raises:
        SettingsError: the exporter that the variables name is not installed.
    """
    _set_up()
    try:
        yield
    finally:
        if INSTALLED and hasattr(provider := trace.get_tracer_provider(), "force_flush"):
            provider.force_flush(FLUSH_MS)


def _set_up() -> None:
    """Configure the SDK, unless it is configured already, for example by `opentelemetry-instrument`."""
    if not any(os.environ.get(name) for name in CONFIGURED_BY):
        return
    try:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("tracing is configured but not installed: pip install opentelemetry-sdk and an exporter")
        return
    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return
    defaults = Resource({"service.name": NAME, "service.version": VERSION})
    provider = TracerProvider(resource=defaults.merge(OTELResourceDetector().detect()))
    for exporter in _exporters():
        provider.add_span_processor(BatchSpanProcessor(exporter()))
    trace.set_tracer_provider(provider)


def _exporters() -> Iterator[type]:
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "grpc"
    for name in (os.environ.get("OTEL_TRACES_EXPORTER") or "otlp").split(","):
        wanted = OTLP.get(protocol, protocol) if name.strip() == "otlp" else name.strip()
        if wanted == "none":
            continue
        found = next(iter(entry_points(group="opentelemetry_traces_exporter", name=wanted)), None)
        if found is None:
            raise SettingsError(
                f"OTEL_TRACES_EXPORTER: no exporter {wanted!r} is installed; "
                f"pip install opentelemetry-exporter-{wanted.replace('_', '-')}, or set it to none."
            )
        yield found.load()


def begin(name: str, headers: Iterable[tuple[str, bytes | None]], attributes: Mapping[str, str | int]) -> Span | None:
    """Start the span of a request, a child of the one in the headers; return None if OpenTelemetry is not installed."""
    if not INSTALLED:
        return None
    try:
        parent = propagate.extract({key: value.decode("utf-8", "replace") for key, value in headers if value is not None})
    except Exception as exc:  # of the propagator that OTEL_PROPAGATORS names
        log.warning("trace context cannot be read, the request begins a trace of its own", reason=one_line(exc))
        parent = None
    return trace.get_tracer(NAME, VERSION).start_span(name, parent, trace.SpanKind.CONSUMER, dict(attributes))


@contextmanager
def within(span: Span | None) -> Iterator[None]:
    """Make the spans that start in this thread children of that one."""
    if span is None:
        yield
        return
    with trace.use_span(span, record_exception=False, set_status_on_exception=False):
        yield


@contextmanager
def step(name: str) -> Iterator[None]:
    """Start a child span for a step of the current request; an exception marks it as failed."""
    if not INSTALLED or not trace.get_current_span().get_span_context().is_valid:
        yield
        return
    tracer = trace.get_tracer(NAME, VERSION)
    with tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False) as span:
        try:
            yield
        except Exception as exc:
            text = masked("".join(traceback.format_exception(exc)))
            span.record_exception(exc, {"exception.message": masked(str(exc)), "exception.stacktrace": text})
            span.set_status(trace.StatusCode.ERROR, f"{type(exc).__name__}: {masked(str(exc))}")
            raise


@contextmanager
def call(name: str, attributes: Callable[[], Mapping[str, str | int]]) -> Iterator[Span | None]:
    """Start a child span for a call to another service. Yield None, without the attributes, if there is no request's span.

    An exception leaves the span as it is: the caller knows which ones are failures.
    """
    if not INSTALLED or not trace.get_current_span().get_span_context().is_valid:
        yield None
        return
    with trace.get_tracer(NAME, VERSION).start_as_current_span(
        name, kind=trace.SpanKind.CLIENT, attributes=attributes(), record_exception=False, set_status_on_exception=False
    ) as span:
        yield span


def fail(span: Span, reason: str) -> None:
    """Mark a span as failed. `reason` holds no secret."""
    span.set_status(trace.StatusCode.ERROR, reason)


def end(span: Span | None, error: RequestError | None) -> None:
    """End the span of a request, with its error if it failed."""
    if span is None:
        return
    if error is not None:
        span.set_attribute("error.type", error.code)
        span.set_status(trace.StatusCode.ERROR, masked(str(error)))
    span.end()
