"""Metrics, spans and log lines of calls to storage, compared with the log of the proxy that the calls went through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import REGISTRY

from errors import RequestError
from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.locations import ObjectPath
from latent_encoder.storage.retrying import Unavailable
from latent_encoder.storage.stores import store_of
from latent_encoder.storage.watching import Direction, Operation, Outcome, Reason
from latent_encoder.telemetry import tracing
from models import EncodeRequest
from service import LatentEncoder
from tests.helpers import IMAGES
from tests.kafka_tools import Events
from tests.storage.conftest import Bucket
from tests.storage.faulty_proxy import Call
from tests.storage.s3_server import SECRET_KEY
from tests.storage.test_buckets import taken_over
from tests.storage.web_server import WebServer, redirect, status

MakeWorker = Callable[..., LatentEncoder]
Ask = Callable[..., EncodeRequest]
Value = Callable[..., float]
IMAGE = (IMAGES / "astronaut.png").read_bytes()
CALLS, SECONDS = "latent_encoder_storage_calls_total", "latent_encoder_storage_call_seconds_count"
BYTES, RETRIES = "latent_encoder_storage_bytes_total", "latent_encoder_storage_retries_total"
CLAIMS = "latent_encoder_storage_claims_total"
OUTCOMES = {0: "unavailable", 200: "ok", 204: "ok", 403: "refused", 404: "absent", 412: "conflict", 503: "unavailable"}


def operation_of(call: Call) -> str:
    return "list" if "list-type=2" in call.path else call.method.lower()


def counted(grown: Value, storage: str = "s3") -> dict[tuple[str, str], float]:
    """Return the growth of the calls by operation and outcome, without those that did not grow."""
    pairs = ((operation, outcome) for operation in get_args(Operation) for outcome in get_args(Outcome))
    return {pair: growth for pair in pairs if (growth := grown(CALLS, storage, *pair))}


def expected(calls: list[Call]) -> dict[tuple[str, str], int]:
    return Counter((operation_of(call), OUTCOMES[call.status]) for call in calls)


@contextmanager
def traced() -> Iterator[None]:
    """Provide the span of a request, as Kafka mode begins one."""
    span = tracing.begin("request", (), {})
    with tracing.within(span):
        yield
    tracing.end(span, None)


def test_every_call_of_an_image_is_counted_once(bucket: Bucket, worker: MakeWorker, ask: Ask, grown: Value) -> None:
    """Calls, their times and their bytes are those that the server saw, the removed claim included."""
    request = ask(bucket.add(), f"{bucket.url}/out")
    each = worker()
    assert each.stored_response(request) is None
    each.encode(request)
    assert each.stored_response(request) is not None
    calls = bucket.proxy.calls
    assert {"get", "head", "put", "delete"} <= {operation_of(call) for call in calls}
    assert counted(grown) == expected(calls)
    timed = {operation: grown(SECONDS, "s3", operation) for operation in get_args(Operation)}
    assert {name: count for name, count in timed.items() if count} == Counter(map(operation_of, calls))
    read = sum(call.received for call in calls if operation_of(call) == "get" and call.status == 200)
    assert (grown(BYTES, "s3", "in"), grown(BYTES, "s3", "out")) == (read, sum(call.sent for call in calls))
    assert read > len(IMAGE)
    assert grown(RETRIES, "s3", "throttled") == grown(CLAIMS, "waited") == 0


@pytest.mark.parametrize(
    ("kind", "status", "reason"),
    [
        ("status", 503, "throttled"),
        ("status", 429, "throttled"),
        ("status", 500, "server_error"),
        ("drop", 0, "connection"),
        ("lose", 0, "connection"),
        ("hold", 0, "timeout"),
    ],
)
def test_retries_are_counted_by_their_reason(bucket: Bucket, grown: Value, kind: Any, status: int, reason: str) -> None:
    """An attempt that fails is a call of its own, and one retry with its reason; the last failure is no retry."""
    url = ObjectPath(bucket.add())
    store = store_of(url, AllowedUrls("image_path", timeout_s=1.0, retries=1))
    bucket.proxy.fault(kind, "GET", "astronaut", times=3, status=status)
    with pytest.raises(Unavailable):
        store.read(url.key)
    assert counted(grown) == {("get", "unavailable"): 2}
    assert store.read(url.key).data == IMAGE
    assert counted(grown) == {("get", "unavailable"): 3, ("get", "ok"): 1}
    assert {each: grown(RETRIES, "s3", each) for each in get_args(Reason)} == {
        each: 2 if each == reason else 0 for each in get_args(Reason)
    }
    assert grown(BYTES, "s3", "in") == len(IMAGE)


def test_each_write_is_counted_with_its_outcome(bucket: Bucket, grown: Value, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conflict, a refusal, a bucket that is absent, and a list are outcomes of their own."""
    limits = AllowedUrls("output_dir", retries=0)
    store = store_of(ObjectPath(f"{bucket.url}/x"), limits)
    version = store.put("x1", b"12345", "", None)
    for wrong in (None, {**version, "e_tag": '"other"'}):
        with pytest.raises(Exception, match="412"):
            store.put("x1", b"123", "", wrong)
    assert [found.name for found in store.names_from("", "x")] == ["x1"]
    with pytest.raises(Exception, match="404"):
        store_of(ObjectPath("s3://no-such-bucket"), limits).put("x", b"1", "", None)
    store.remove_once("x1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(Exception, match="403"):
        store_of(ObjectPath(bucket.url), AllowedUrls("output_dir", retries=1)).facts("x1")
    assert counted(grown) == {
        ("put", "ok"): 1,
        ("put", "conflict"): 2,
        ("put", "absent"): 1,
        ("list", "ok"): 1,
        ("delete", "ok"): 1,
        ("head", "refused"): 1,
    }
    assert grown(BYTES, "s3", "out") == 5 + 3 + 3 + 1


def test_an_image_that_is_too_large_is_no_failure_of_the_storage(
    bucket: Bucket, worker: MakeWorker, ask: Ask, grown: Value
) -> None:
    """An object of more than MAX_IMAGE_BYTES has an outcome of its own, and none of its bytes counts."""
    with pytest.raises(RequestError):
        worker(max_image_bytes=1000).encode(ask(bucket.add(), f"{bucket.url}/out"))
    assert grown(CALLS, "s3", "get", "too_large") == 1
    assert grown(BYTES, "s3", "in") == 0


@pytest.mark.parametrize(
    ("page", "outcomes"),
    [
        (IMAGE, {"ok": 1}),
        (redirect("/b.png"), {"ok": 2}),
        (status(404), {"absent": 1}),
        (status(403), {"refused": 1}),
        (status(418), {"unusable": 1}),
        (status(503), {"unavailable": 2}),
    ],
)
def test_calls_to_web_servers(
    web: WebServer, worker: MakeWorker, ask: Ask, tmp_path: Path, grown: Value, page: Any, outcomes: dict[str, int]
) -> None:
    """Web servers are counted in the same way, each redirect as a call."""
    web.pages |= {"/a.png": page, "/b.png": IMAGE}
    client = worker(mode="kafka", allowed_input_urls=(web.url("/"),), storage_max_retries=1)
    client.respond(ask(web.url("/a.png?sig=secret"), str(tmp_path)))
    assert counted(grown, "http") == {("get", outcome): count for outcome, count in outcomes.items()}
    assert grown(SECONDS, "http", "get") == len(web.asked)
    assert grown(BYTES, "http", "in") == (len(IMAGE) if "ok" in outcomes else 0)
    assert grown(RETRIES, "http", "throttled") == outcomes.get("unavailable", 1) - 1


def test_a_claim_that_is_taken_over_is_counted_and_logged_once(
    bucket: Bucket, worker: MakeWorker, ask: Ask, monkeypatch: pytest.MonkeyPatch, grown: Value, events: Events
) -> None:
    """A worker that waits, takes a claim over, and one that loses its claim are counted; one warning names the files."""
    taken_over(bucket, worker, ask, monkeypatch)
    assert {event: grown(CLAIMS, event) for event in ("waited", "taken_over")} == {"waited": 1, "taken_over": 1}
    assert grown(CLAIMS, "lost") >= 1
    (event,) = events("claim of another process is taken over, because it was not renewed")
    assert event["levelname"] == "WARNING"
    assert event["place"].startswith(f"{bucket.url}/out/")
    assert SECRET_KEY not in str(event)


def test_spans_of_calls_are_in_the_trace_of_the_request(
    bucket: Bucket, worker: MakeWorker, ask: Ask, spans: InMemorySpanExporter
) -> None:
    """Each call is a span below the request's, also those of other threads, with the names of OpenTelemetry."""
    request = ask(bucket.add(), f"{bucket.url}/out")
    bucket.proxy.fault("status", "GET", "astronaut.png", status=503)
    with traced():
        each = worker()
        assert each.stored_response(request) is None
        each.encode(request)
    finished = {context.span_id: span for span in spans.get_finished_spans() if (context := span.get_span_context())}
    (root,) = [span for span in finished.values() if span.name == "request"]
    calls = [span for span in finished.values() if span.kind is SpanKind.CLIENT]
    assert Counter(span.name for span in calls) == Counter(f"s3 {operation_of(call)}" for call in bucket.proxy.calls)
    assert {top(span, finished) for span in calls} == {root.name}
    failed, fetched = [span for span in calls if attributes(span)["url.full"] == request.image_path]
    assert failed.status.status_code is StatusCode.ERROR
    assert failed.status.description == "503 Service Unavailable"
    assert attributes(failed)["error.type"] == "unavailable"
    assert attributes(fetched) == {
        "http.request.method": "GET",
        "http.request.resend_count": 1,
        "http.response.body.size": len(IMAGE),
        "url.full": request.image_path,
        "rpc.system": "aws-api",
        "rpc.service": "S3",
        "rpc.method": "GetObject",
        "aws.s3.bucket": bucket.name,
        "aws.s3.key": "in/astronaut.png",
    }
    (metadata,) = [span for span in calls if attributes(span)["url.full"].endswith(".json") and span.name == "s3 put"]
    assert attributes(metadata)["http.request.body.size"] > 0
    absent = [span for span in calls if attributes(span).get("error.type") == "absent"]
    assert {span.status.status_code for span in absent} == {StatusCode.UNSET}


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def top(span: ReadableSpan, finished: dict[int, ReadableSpan]) -> str:
    """Return the name of the span that all ancestors lead to."""
    while span.parent is not None:
        span = finished[span.parent.span_id]
    return span.name


def test_spans_of_web_servers_have_no_query(
    web: WebServer, worker: MakeWorker, ask: Ask, tmp_path: Path, spans: InMemorySpanExporter
) -> None:
    """The span of a presigned URL has its server and its path, and nothing of its query."""
    web.pages["/a.png"] = status(403)
    with traced():
        worker().respond(ask(web.url("/a.png?X-Amz-Signature=hunter2"), str(tmp_path)))
    (call,) = [span for span in spans.get_finished_spans() if span.kind is SpanKind.CLIENT]
    assert attributes(call) == {
        "http.request.method": "GET",
        "url.full": web.url("/a.png"),
        "server.address": "127.0.0.1",
        "server.port": web.port,
        "error.type": "refused",
    }
    assert all("hunter2" not in span.to_json() for span in spans.get_finished_spans())


def test_without_a_trace_a_call_makes_no_span(bucket: Bucket, spans: InMemorySpanExporter) -> None:
    """A call outside of a request's span makes none of its own."""
    url = ObjectPath(bucket.add())
    store_of(url, AllowedUrls("image_path")).read(url.key)
    assert spans.get_finished_spans() == ()


def test_labels_are_of_closed_sets(bucket: Bucket, web: WebServer, worker: MakeWorker, ask: Ask) -> None:
    """No bucket, key or server is a label, and each storage that was used has all of its series, from zero on."""
    web.pages["/a.png"] = IMAGE
    worker().respond(ask(web.url("/a.png"), f"{bucket.url}/out"))
    known = {
        "storage": {"s3", "gs", "az", "http", "https"},
        "operation": set(get_args(Operation)),
        "outcome": set(get_args(Outcome)),
        "reason": set(get_args(Reason)),
        "direction": set(get_args(Direction)),
        "event": {"waited", "taken_over", "lost"},
    }
    samples = [s for family in REGISTRY.collect() if family.name.startswith("latent_encoder_storage_") for s in family.samples]
    for sample in samples:
        assert all(value in known[label] for label, value in sample.labels.items() if label != "le"), sample
    calls = [tuple(sample.labels.values()) for sample in samples if sample.name == CALLS and sample.labels["storage"] == "s3"]
    assert len(calls) == len(known["operation"]) * len(known["outcome"])
