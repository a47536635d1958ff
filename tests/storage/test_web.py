"""Images from web servers, with TLS and without, and servers that should not be trusted."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from errors import AccessDenied, ImageInvalid, ImageNotFound, ImageUnreachable
from latent_encoder.storage import connections
from models import EncodeRequest
from service import LatentEncoder
from tests.broker.certificates import Certificates
from tests.helpers import IMAGES
from tests.storage.web_server import WebServer, redirect, respond, status

MakeWorker = Callable[..., LatentEncoder]
Ask = Callable[..., EncodeRequest]
IMAGE = (IMAGES / "astronaut.png").read_bytes()
SIGNATURE = "X-Amz-Signature=0123456789abcdef"
LOCAL = (IPv4Network("127.0.0.0/8"),)


@pytest.fixture
def get(worker: MakeWorker, ask: Ask, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that encodes the image at a URL in Kafka mode; the settings are given."""

    def get(url: str, *prefixes: str, **settings: Any) -> Any:
        settings = {"storage_max_retries": 1, "storage_timeout_s": 5.0, **settings}
        return worker(mode="kafka", allowed_input_urls=prefixes or (url.partition("?")[0],), **settings).encode(
            ask(url, str(tmp_path))
        )

    return get


@pytest.fixture
def tls(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Provide a server whose certificate is signed by an authority that the client trusts."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
    connections.tls.cache_clear()
    with WebServer(certificates.server) as server:
        yield server
    connections.tls.cache_clear()


def test_an_image_by_https(tls: WebServer, get: Callable[..., Any]) -> None:
    """An image by https, with a presigned query, is encoded; the query is in no field and no name."""
    tls.pages["/a%20b.png"] = IMAGE
    response = get(tls.url(f"/a b.png?{SIGNATURE}"))
    assert tls.asked == [f"/a%20b.png?{SIGNATURE}"]
    assert response.metadata.image_path == tls.url("/a%20b.png")
    assert SIGNATURE not in response.model_dump_json()
    assert "a_b" in response.latent_file_path


def test_a_certificate_that_nobody_signed(certificates: Certificates, get: Callable[..., Any]) -> None:
    """A server whose certificate is not trusted gives no image."""
    connections.tls.cache_clear()
    with WebServer(certificates.server) as server:
        server.pages["/a.png"] = IMAGE
        with pytest.raises(ImageInvalid, match="certificate is not valid"):
            get(server.url("/a.png"))


def test_a_certificate_of_another_name(tls: WebServer, get: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate must be that of the name in the URL, although the connection goes to an address."""
    tls.pages["/a.png"] = IMAGE
    lead(monkeypatch, "images.example.org", "127.0.0.1")
    with pytest.raises(ImageInvalid, match="certificate is not valid"):
        get(tls.url("/a.png", "images.example.org"), allowed_private_networks=LOCAL)


@pytest.mark.parametrize(
    ("page", "error", "text"),
    [
        (status(404), ImageNotFound, "not found"),
        (status(410), ImageNotFound, "not found"),
        (status(401), AccessDenied, "HTTP status 401"),
        (status(403), AccessDenied, "may have expired"),
        (status(400), ImageInvalid, "HTTP status 400"),
        (status(204), ImageInvalid, "HTTP status 204"),
        (status(200), ImageInvalid, "is empty"),
        (status(503, {"Retry-After": "0"}), ImageUnreachable, "HTTP status 503"),
        (status(429), ImageUnreachable, "HTTP status 429"),
        (lambda handler: handler.wfile.write(b"HELLO\r\n\r\n"), ImageUnreachable, "cannot be reached"),
        (lambda _: None, ImageUnreachable, "cannot be reached"),
        (b"<html>no image</html>", ImageInvalid, "Image file"),
    ],
)
def test_responses_without_an_image(web: WebServer, get: Callable[..., Any], page: Any, error: Any, text: str) -> None:
    """Each response without an image has its error code, and the query of the URL is in no message."""
    web.pages["/a.png"] = page
    with pytest.raises(error, match=text) as failure:
        get(web.url(f"/a.png?{SIGNATURE}"))
    assert SIGNATURE not in str(failure.value)
    assert len(web.asked) == (2 if error is ImageUnreachable else 1)


def test_a_server_that_recovers(web: WebServer, get: Callable[..., Any]) -> None:
    """A response that is cut off, and an error of the server, are repeated."""

    def page(handler: BaseHTTPRequestHandler) -> None:
        match len(web.asked):
            case 1:
                handler.send_response(200)
                handler.send_header("Content-Length", str(len(IMAGE)))
                handler.end_headers()
                handler.wfile.write(IMAGE[:1000])
            case 2:
                respond(handler, 500)
            case _:
                respond(handler, 200, IMAGE)

    web.pages["/a.png"] = page
    assert get(web.url("/a.png"), storage_max_retries=2).status == "success"


def test_a_body_without_a_length_that_never_ends(web: WebServer, get: Callable[..., Any]) -> None:
    """MAX_IMAGE_BYTES holds for a body without a length: the rest of it is not read."""
    sent = 0

    def page(handler: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(65_536))
            sent += 65_536

    web.pages["/a.png"] = page
    with pytest.raises(ImageInvalid, match="more than MAX_IMAGE_BYTES=1000000"):
        get(web.url("/a.png"), max_image_bytes=1_000_000)
    assert sent < 50_000_000


def test_chunks_that_never_end(web: WebServer, get: Callable[..., Any]) -> None:
    """MAX_IMAGE_BYTES holds for a body in chunks, whatever length a chunk states."""

    def page(handler: BaseHTTPRequestHandler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"FFFFFFFFFF\r\n")
        while True:
            handler.wfile.write(bytes(65_536))

    web.pages["/a.png"] = page
    with pytest.raises(ImageInvalid, match="more than MAX_IMAGE_BYTES=1000000"):
        get(web.url("/a.png"), max_image_bytes=1_000_000)


def test_a_stated_length_of_five_gigabytes(web: WebServer, get: Callable[..., Any]) -> None:
    """A body that states too large a length is refused before it is read, even if that is a lie."""

    def page(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(5 * 10**9))
        handler.end_headers()
        handler.wfile.write(IMAGE)

    web.pages["/a.png"] = page
    with pytest.raises(ImageInvalid, match="has 5000000000 bytes, more than MAX_IMAGE_BYTES"):
        get(web.url("/a.png"))


@pytest.mark.parametrize("part", ["headers", "body"])
def test_a_server_that_drips(web: WebServer, get: Callable[..., Any], part: str) -> None:
    """A server that sends a byte now and then holds a thread no longer than STORAGE_TIMEOUT_S."""

    def page(handler: BaseHTTPRequestHandler) -> None:
        if part == "body":
            handler.send_response(200)
            handler.end_headers()
        while True:
            handler.wfile.write(b"x")
            time.sleep(0.05)

    web.pages["/a.png"] = page
    began = time.monotonic()
    with pytest.raises(ImageUnreachable, match=r"within STORAGE_TIMEOUT_S=0\.5"):
        get(web.url("/a.png"), storage_timeout_s=0.5)
    assert time.monotonic() - began < 20


def test_redirects_inside_of_the_prefixes(web: WebServer, get: Callable[..., Any]) -> None:
    """A redirect to an allowed URL is followed, a relative one too; a loop of redirects ends."""
    web.pages |= {"/in/a.png": redirect("b.png"), "/in/b.png": redirect(web.url("/in/c.png")), "/in/c.png": IMAGE}
    assert get(web.url("/in/a.png"), web.url("/in")).status == "success"
    web.pages["/in/loop.png"] = redirect("loop.png")
    with pytest.raises(ImageInvalid, match="redirects"):
        get(web.url("/in/loop.png"), web.url("/in"))


@pytest.mark.parametrize(
    "target",
    [
        "/secret.png",
        "../secret.png",
        "http://localhost:{port}/in/a.png",
        "http://169.254.169.254/",
        "s3://b/a.png",
        "file:///etc/passwd",
        "gopher://x/",
        "http://[bad",
    ],
)
def test_redirects_out_of_the_prefixes(web: WebServer, get: Callable[..., Any], target: str) -> None:
    """A redirect to another place is not followed, and its target is not told."""
    target = target.format(port=web.port)
    web.pages |= {"/in/a.png": redirect(target), "/secret.png": IMAGE}
    with pytest.raises((AccessDenied, ImageInvalid)) as refused:
        get(web.url("/in/a.png"), web.url("/in"))
    assert web.asked == ["/in/a.png"]
    assert "169.254" not in str(refused.value)


def test_a_redirect_to_a_private_address_at_the_command_line(
    web: WebServer, worker: MakeWorker, ask: Ask, tmp_path: Path
) -> None:
    """A person may name a private address, but a redirect does not lead to one."""
    web.pages |= {"/a.png": IMAGE, "/b.png": redirect(web.url("/a.png"))}
    assert worker().encode(ask(web.url("/a.png"), str(tmp_path))).status == "success"
    with pytest.raises(AccessDenied, match="private address"):
        worker().encode(ask(web.url("/b.png"), str(tmp_path)))


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "::ffff:127.0.0.1", "10.1.2.3"])
def test_a_name_that_leads_to_a_private_address(
    web: WebServer, get: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """A name that an allowed URL has, and that leads to a private address, is refused before anything is sent."""
    web.pages["/a.png"] = IMAGE
    lead(monkeypatch, "images.example.org", address)
    with pytest.raises(AccessDenied, match="private address"):
        get(web.url("/a.png", "images.example.org"))
    assert web.asked == []


def test_a_name_is_looked_up_once(web: WebServer, get: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The address that was checked is connected to: a name that leads elsewhere at the second look-up has no effect."""
    web.pages["/a.png"] = IMAGE
    looked_up = lead(monkeypatch, "images.example.org", "127.0.0.1", "169.254.169.254")
    assert get(web.url("/a.png", "images.example.org"), allowed_private_networks=LOCAL).status == "success"
    assert looked_up == ["images.example.org"]


def test_a_proxy_of_the_environment_is_not_used(
    web: WebServer, get: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTP_PROXY does not change the address that is connected to."""
    web.pages["/a.png"] = IMAGE
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert get(web.url("/a.png")).status == "success"


def lead(monkeypatch: pytest.MonkeyPatch, name: str, *addresses: str) -> list[str]:
    """Let a name lead to an address, and to the next one at each further look-up; return the look-ups so far."""
    real, looked_up = socket.getaddrinfo, list[str]()

    def getaddrinfo(host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        if host != name:
            return real(host, port, *args, **kwargs)
        looked_up.append(host)
        return real(addresses[min(len(looked_up), len(addresses)) - 1], port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return looked_up
