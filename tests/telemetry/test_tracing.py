"""Spans of requests, as OpenTelemetry's SDK exports them."""

from __future__ import annotations

import re
import signal

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from config import Settings
from service import LatentEncoder
from tests.kafka_tools import Bench, read_responses, wait_until

TRACE_ID, PARENT_ID = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
TRACEPARENT = f"00-{TRACE_ID:032x}-{PARENT_ID:016x}-01".encode()


def children(spans: InMemorySpanExporter, of: ReadableSpan) -> list[str]:
    """Return the names of a span's children, in the order of their ends."""
    context = of.get_span_context()
    assert context is not None
    return [
        each.name for each in spans.get_finished_spans() if each.parent is not None and each.parent.span_id == context.span_id
    ]


def test_request_is_a_span_of_the_trace_in_its_headers(
    bench: Bench, encoder: LatentEncoder, settings: Settings, spans: InMemorySpanExporter
) -> None:
    """The span has a child for each step that the request reached, and its error; without a trace it begins one."""
    with bench.worker(encoder, bench.settings(settings)):
        bench.send({"request_id": "good"}, headers=(("traceparent", TRACEPARENT), ("odd", b"\xff"), ("none", None)))
        bench.send({"request_id": "bad", "image_path": "/no"})
        read_responses(bench.responses, 2)

        def requests() -> list[ReadableSpan]:
            return [each for each in spans.get_finished_spans() if each.kind is SpanKind.CONSUMER]

        wait_until(lambda: len(requests()) == 2, "both spans")
    good, bad = requests()
    assert good.name == f"process {bench.request_topic}"
    assert good.parent is not None
    assert (good.parent.trace_id, good.parent.span_id) == (TRACE_ID, PARENT_ID)
    assert good.attributes is not None
    assert good.attributes["messaging.destination.name"] == bench.request_topic
    assert good.attributes["messaging.kafka.offset"] == 0
    assert good.status.status_code is StatusCode.UNSET
    assert children(spans, good) == ["load_vae", "load_image", "scale", "encode", "save"]
    assert bad.parent is None
    assert bad.attributes is not None
    assert bad.attributes["error.type"] == "IMAGE_NOT_FOUND"
    assert bad.status.status_code is StatusCode.ERROR
    assert children(spans, bad) == ["load_vae", "load_image"]


def test_worker_exports_as_the_environment_says(bench: Bench) -> None:
    """OpenTelemetry's own variables configure it; spans for the console do not go to standard output."""
    with bench.process(OTEL_TRACES_EXPORTER="console", OTEL_RESOURCE_ATTRIBUTES="service.name=mine") as process:
        bench.send({"request_id": "r"}, headers=(("traceparent", TRACEPARENT),))
        read_responses(bench.responses, 1)
        process.signal(signal.SIGTERM)
        assert process.end() == 0
        text = process.log_file.read_text()
    names = ["load_vae", "load_image", "scale", "encode", "save", f"process {bench.request_topic}"]
    assert re.findall(r'^    "name": "(.*)",$', text, re.MULTILINE) == names
    assert set(re.findall(r'"trace_id": "0x(\w+)"', text)) == {f"{TRACE_ID:032x}"}
    assert set(re.findall(r'"service.name": "(.*)"', text)) == {"mine"}


def test_exporter_that_is_not_installed_is_wrong_usage(bench: Bench) -> None:
    """The error names the package to install."""
    with bench.process(OTEL_EXPORTER_OTLP_ENDPOINT="http://localhost:4317", OTEL_TRACES_EXPORTER="zipkin_json") as process:
        assert process.end() == 2
        assert "pip install opentelemetry-exporter-zipkin-json" in process.log_file.read_text()


def test_worker_without_opentelemetry(bench: Bench) -> None:
    """A worker without it serves requests, and logs the lack only if tracing is configured."""
    (bench.folder / "opentelemetry.py").write_text("raise ImportError('not installed')")
    environment = {"PYTHONPATH": str(bench.folder), "OTEL_TRACES_EXPORTER": "console"}
    with bench.process(**environment) as process:
        bench.send({"request_id": "r"}, headers=(("traceparent", TRACEPARENT),))
        (response,) = read_responses(bench.responses, 1)
        process.signal(signal.SIGTERM)
        assert process.end() == 0
    assert response["status"] == "success"
    assert len(process.events("tracing is configured but not installed: pip install opentelemetry-sdk and an exporter")) == 1
