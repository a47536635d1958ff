"""Responses of a storage to a read that hold no object, and the errors that they become."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from errors import AccessDenied, ImageInvalid, ImageNotFound, ImageUnreachable, InvalidRequest, RequestError
from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.images import read_from_url
from tests.storage.conftest import Bucket, set_cloud
from tests.storage.web_server import WebServer, respond

SECRET = "secret-key-of-this-test"  # noqa: S105
DATES = {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT", "ETag": '"x"'}


@pytest.fixture
def storage(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> WebServer:
    """Provide a server that obstore takes for S3; its bucket has the number of the port in its name."""
    environment = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": web.url("")}
    set_cloud(monkeypatch, {**environment, "AWS_ALLOW_HTTP": "true"})
    return web


def read(storage: WebServer, *, retries: int = 0, timeout_s: float = 5.0) -> bytes:
    url = f"s3://bucket-{storage.port}/a.png"
    return read_from_url(url, AllowedUrls("image_path", retries=retries, timeout_s=timeout_s), 1000)


def page(storage: WebServer, page: Callable[[BaseHTTPRequestHandler], None]) -> None:
    storage.pages[f"/bucket-{storage.port}/a.png"] = page


def error(status: int, code: str) -> Callable[[BaseHTTPRequestHandler], None]:
    """Return a page with an error as S3 and Azure state it."""
    return lambda handler: respond(handler, status, f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode())


def cut(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    for name, value in {**DATES, "Content-Length": "100"}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(b"x" * 50)


@pytest.mark.parametrize(
    ("response", "kind", "text", "certain"),
    [
        (error(503, "SlowDown"), ImageUnreachable, "503 Service Unavailable, SlowDown", True),
        (error(429, "TooManyRequests"), ImageUnreachable, "429", True),
        (error(502, "X"), ImageUnreachable, "502", True),
        (error(504, "X"), ImageUnreachable, "504", True),
        (lambda _: None, ImageUnreachable, "ended the connection without a response", True),
        (error(500, "InternalError"), ImageUnreachable, "InternalError", False),
        (error(400, "RequestTimeout"), ImageUnreachable, "RequestTimeout", False),
        (cut, ImageUnreachable, "body", False),
        (error(400, "ExpiredToken"), AccessDenied, "credentials of the service", True),
        (error(403, "InvalidAccessKeyId"), AccessDenied, "credentials of the service", True),
        (error(403, "RequestTimeTooSkewed"), AccessDenied, "credentials of the service", True),
        (error(403, "SignatureDoesNotMatch"), AccessDenied, "credentials of the service", False),
        (error(403, "AuthenticationFailed"), AccessDenied, "credentials of the service", False),
        (error(401, "Unauthorized"), AccessDenied, "credentials of the service", False),
        (error(403, "AccessDenied"), AccessDenied, "need the permission", None),
        (error(404, "NoSuchKey"), ImageNotFound, "a.png$", None),
        (error(404, "NoSuchBucket"), ImageNotFound, "bucket does not exist", None),
        (error(404, "ContainerNotFound"), ImageNotFound, "bucket does not exist", None),
        (error(301, "PermanentRedirect"), ImageInvalid, "another region than AWS_REGION", None),
        (error(400, "InvalidArgument"), ImageInvalid, "InvalidArgument", None),
        (error(501, "NotImplemented"), ImageInvalid, "NotImplemented", None),
        (
            lambda handler: respond(handler, 200, bytes(1001), DATES),
            ImageInvalid,
            "1001 bytes, more than MAX_IMAGE_BYTES",
            None,
        ),
        (lambda handler: respond(handler, 200, b"", DATES), ImageInvalid, "is empty", None),
    ],
)
def test_a_response_without_an_object(
    storage: WebServer, response: Any, kind: type[RequestError], text: str, certain: bool | None
) -> None:
    """Each response has its error code, and tells if the storage or the credentials are at fault."""
    page(storage, response)
    with pytest.raises(kind, match=text) as failed:
        read(storage)
    fault = failed.value.storage_fault
    assert (None if fault is None else fault.certain) == certain
    assert len(storage.asked) == 1


def test_a_storage_that_hangs(storage: WebServer) -> None:
    """A storage that does not respond in time is out of reach, but one slow object may be the cause."""
    release = threading.Event()

    def hanging(_: BaseHTTPRequestHandler) -> None:
        release.wait(10)

    page(storage, hanging)
    with pytest.raises(ImageUnreachable, match="no complete response within the time-out") as failed:
        read(storage, timeout_s=0.5)
    release.set()
    assert failed.value.storage_fault == (f"s3://bucket-{storage.port}", False)


def test_passing_faults_are_repeated(storage: WebServer) -> None:
    """Throttling, time-outs of the server and cut bodies are repeated."""
    faults = iter((error(503, "SlowDown"), error(400, "RequestTimeout"), cut))

    def recovering(handler: BaseHTTPRequestHandler) -> None:
        fault = next(faults, None)
        if fault is None:
            respond(handler, 200, b"data", DATES)
        else:
            fault(handler)

    page(storage, recovering)
    assert read(storage, retries=3) == b"data"


def test_no_secret_is_logged(storage: WebServer, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the secret key nor a signature is in the log, at its finest level."""
    caplog.set_level(logging.DEBUG)
    page(storage, error(503, "SlowDown"))
    with pytest.raises(ImageUnreachable):
        read(storage, retries=1)
    assert "call to storage is repeated" in caplog.text
    assert SECRET not in caplog.text
    assert "Signature" not in caplog.text


def test_a_folder_is_no_image(bucket: Bucket) -> None:
    """The URL of a folder in a bucket is an invalid request, also if an object has its name."""
    bucket.add(key="in/folder")
    with pytest.raises(InvalidRequest, match="must name an object, not a folder"):
        read_from_url(f"{bucket.url}/in/folder/", AllowedUrls("image_path"), 1_000_000)
    assert bucket.proxy.calls == []
