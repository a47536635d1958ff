"""Connections to web servers: names that are looked up for long, connections that are used again, and hostile responses."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from ipaddress import IPv4Network
from typing import Any

import pytest

from errors import AccessDenied, ImageInvalid, ImageUnreachable
from latent_encoder.storage import connections
from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.connections import POOL
from latent_encoder.storage.images import read_from_url
from latent_encoder.storage.locations import WebUrl
from latent_encoder.storage.retrying import Unavailable
from latent_encoder.storage.web import read
from tests.broker.certificates import Certificates
from tests.kafka_tools import wait_until
from tests.storage.web_server import WebServer, redirect, respond

BODY = b"not looked at"
LOCAL = (IPv4Network("127.0.0.0/8"),)


@pytest.fixture(autouse=True)
def own_pool() -> Iterator[None]:
    """Begin and end without kept connections."""
    POOL.clear()
    yield
    POOL.clear()


@pytest.fixture
def keeping() -> Iterator[WebServer]:
    """Provide a server that keeps connections."""
    with WebServer(keep_alive=True) as server:
        server.pages["/a.png"] = BODY
        yield server


def get(url: str, *, retries: int = 0, timeout_s: float = 5.0, max_bytes: int = 100_000, **limits: Any) -> bytes:
    """Return the body at a URL that is allowed."""
    prefix = url.partition("?")[0].rpartition("/")[0] + "/"
    return read_from_url(url, AllowedUrls("image_path", (prefix,), timeout_s=timeout_s, retries=retries, **limits), max_bytes)


# Names


def test_a_resolver_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up that hangs ends with the call's time-out, and holds one thread however many images wait for it."""
    release, asked = threading.Event(), list[str]()

    def getaddrinfo(host: str, *_: Any, **__: Any) -> Any:
        asked.append(host)
        release.wait(30)
        raise socket.gaierror("too late")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    began = time.monotonic()
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(get, "http://images.example.org/a.png", timeout_s=0.5) for _ in range(4)]
        faults = [str(each.exception(10)) for each in waiting]
    assert time.monotonic() - began < 5
    assert asked == ["images.example.org"]
    release.set()
    assert all("was not looked up within" in fault or "no complete response within" in fault for fault in faults), faults
    wait_until(lambda: not connections._look_ups, "the end of the look-up")


def test_a_name_that_is_unknown_is_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed look-up is not remembered: the next one asks again."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(socket.gaierror("unknown")))
    for _ in range(2):
        with pytest.raises(ImageUnreachable, match="cannot be looked up"):
            get("http://images.example.org/a.png")
    assert not connections._look_ups


# Kept connections


def test_one_handshake_for_several_images(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of one server come over one TLS connection, one after the other."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
    connections.tls.cache_clear()
    with WebServer(certificates.server, keep_alive=True) as server:
        server.pages |= {"/a.png": BODY, "/b.png": redirect("/a.png")}
        assert [get(server.url(path)) for path in ("/a.png", "/b.png", "/a.png")] == [BODY] * 3
        assert server.connections == 1
        assert len(server.asked) == 4
    connections.tls.cache_clear()


@pytest.mark.parametrize("moment", ["after the response", "at the next request"])
def test_a_server_that_ends_an_unused_connection(keeping: WebServer, moment: str) -> None:
    """If a server ends a connection that it promised to keep, the next image comes over a new one, without a repetition."""

    def page(handler: BaseHTTPRequestHandler) -> None:
        if len(keeping.asked) == 2 and moment == "at the next request":
            handler.close_connection = True
            return
        respond(handler, 200, BODY)
        handler.close_connection = moment == "after the response"

    keeping.pages["/a.png"] = page
    assert [get(keeping.url("/a.png")) for _ in range(3)] == [BODY] * 3
    assert keeping.connections == (3 if moment == "after the response" else 2)


def test_bytes_that_nobody_asked_for(keeping: WebServer) -> None:
    """Bytes behind a body are no response to the next request."""

    def page(handler: BaseHTTPRequestHandler) -> None:
        respond(handler, 200, BODY)
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong" * (len(keeping.asked) == 1))

    keeping.pages["/a.png"] = page
    assert [get(keeping.url("/a.png")) for _ in range(3)] == [BODY] * 3


def test_a_kept_connection_is_checked_for_each_request(keeping: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to an address that one request may use is not used for one that may not."""
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda _, port, **kinds: real("127.0.0.1", port, **kinds))
    url = keeping.url("/a.png", "images.example.org")
    assert get(url, networks=LOCAL) == BODY
    with pytest.raises(AccessDenied, match="private address"):
        get(url)
    assert get(url, networks=LOCAL) == BODY
    assert keeping.connections == 1


@pytest.mark.parametrize("limit", ["IDLE_S", "LONGEST_USE_S"])
def test_an_old_connection_is_not_used(keeping: WebServer, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """A connection that was unused for long, or was made long ago, is closed."""
    monkeypatch.setattr(connections, limit, 0.0)
    assert [get(keeping.url("/a.png")) for _ in range(2)] == [BODY] * 2
    assert keeping.connections == 2
    assert len(POOL._idle) == 1


def test_a_deadline_ends_with_its_call(keeping: WebServer) -> None:
    """The time-out of a call does not end the connection that it has given back."""
    get(keeping.url("/a.png"), timeout_s=0.2)
    (kept,) = POOL._idle
    ended = threading.Event()
    threading.Timer(0.4, ended.set).start()
    ended.wait(5)
    assert kept.is_fresh
    assert get(keeping.url("/a.png")) == BODY
    assert keeping.connections == 1


def test_a_failed_response_is_not_followed_by_another(keeping: WebServer) -> None:
    """A connection with a body that was refused or cut off is closed."""
    keeping.pages["/large.png"] = bytes(200_000)
    with pytest.raises(ImageInvalid, match="MAX_IMAGE_BYTES"):
        get(keeping.url("/large.png"))
    assert POOL._idle == []


# Responses that no server should give


def raw(data: bytes, *, endless: bytes = b"") -> Callable[[BaseHTTPRequestHandler], None]:
    """Return a page that sends these bytes, then further ones without an end, and closes the connection."""

    def page(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.wfile.write(data)
        while endless:
            handler.wfile.write(endless)

    return page


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("page", "error", "text"),
    [
        (raw(OK, endless=b"X-Header: " + b"x" * 60_000 + b"\r\n"), ImageUnreachable, "headers"),
        (raw(OK + b"X: ", endless=b"x" * 65_536), ImageUnreachable, "more than"),
        (raw(b"", endless=b"HTTP/1.1 100 Continue\r\n\r\n"), ImageUnreachable, "within STORAGE_TIMEOUT_S=1"),
        (
            raw(OK + b"Content-Encoding: gzip\r\nContent-Length: 9\r\n\r\n" + b"x" * 9),
            ImageInvalid,
            "Content-Encoding is 'gzip'",
        ),
        (raw(OK + b"Content-Encoding: br\r\n\r\n"), ImageInvalid, "Content-Encoding is 'br'"),
        (raw(OK + b"Content-Length: 9\r\n\r\n" + b"x" * 5), ImageUnreachable, "5 of 9 bytes came"),
        (raw(OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nxxxxx\r\n"), ImageUnreachable, "IncompleteRead"),
        (raw(OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nxxxxx\r\n"), ImageUnreachable, "cannot be reached"),
        (
            raw(OK + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 100_000, endless=b"x" * 65_536),
            ImageUnreachable,
            "cannot be reached",
        ),
        (
            raw(OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", endless=b"X-Trailer: y\r\n"),
            ImageUnreachable,
            "within STORAGE_TIMEOUT_S=1",
        ),
        (raw(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 1\r\n\r\nx"), ImageInvalid, "HTTP status 206"),
        (raw(b"HTTP/1.1 304 Not Modified\r\n\r\n"), ImageInvalid, "HTTP status 304"),
        (raw(b"HTTP/1.1 300 Multiple Choices\r\nLocation: /b.png\r\n\r\n"), ImageInvalid, "HTTP status 300"),
        (raw(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n"), ImageInvalid, "HTTP status 302"),
        (raw(b"HTTP/1.1 302 Found\r\nLocation: http://u:p@127.0.0.1/\r\n\r\n"), ImageInvalid, "cannot be used"),
        (raw(b"HTTP/1.1 302 Found\r\nLocation: #top\r\nContent-Length: 0\r\n\r\n"), ImageInvalid, "5 redirects"),
        (raw(b"HTTP/1.1 302 Found\r\nLocation: //evil.example/a.png\r\n\r\n"), AccessDenied, "is redirected"),
        (raw(b"HTTP/1.1 302 Found\r\nLocation: http://2130706433/a.png\r\n\r\n"), ImageInvalid, "cannot be used"),
        (raw(b"HTTP/1.1 302 Found\r\nLocation: https://[::ffff:7f00:1]/a.png\r\n\r\n"), AccessDenied, "is redirected"),
        (raw(b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n"), ImageUnreachable, "HTTP status 999"),
        (raw(b"HTTP/1.1 000 Odd\r\nContent-Length: 0\r\n\r\n"), ImageUnreachable, "cannot be reached"),
    ],
)
def test_a_hostile_response(keeping: WebServer, page: Any, error: type[Exception], text: str) -> None:
    """A response that is wrong or has no end gets an error code in time, and its connection is not used again."""
    keeping.pages["/a.png"] = page
    began = time.monotonic()
    with pytest.raises(error, match=text):
        get(keeping.url("/a.png"), timeout_s=1)
    assert time.monotonic() - began < 5
    assert all(kept.used for kept in POOL._idle)


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 13\r\nTransfer-Encoding: chunked\r\n\r\nd\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"Content-Length: -5\r\n\r\n" + BODY,
        b"Content-Length: thirteen\r\n\r\n" + BODY,
        b"Content-Encoding: identity\r\nContent-Length: 13\r\n\r\n" + BODY + b"and more",
    ],
)
def test_lengths_that_lie(keeping: WebServer, headers: bytes) -> None:
    """A length that cannot be is not used, and a stated one ends the body."""
    keeping.pages["/a.png"] = raw(OK + headers)
    assert get(keeping.url("/a.png")) == BODY


def test_redirects_share_one_time_out(keeping: WebServer) -> None:
    """Slow redirects take no longer together than one call may."""
    release = threading.Event()
    followed: list[str] = []

    def page(handler: BaseHTTPRequestHandler) -> None:
        followed.append(handler.path)
        release.wait(0.4)
        redirect("/a.png")(handler)

    keeping.pages["/a.png"] = page
    with pytest.raises(ImageUnreachable, match="within STORAGE_TIMEOUT_S=1"):
        get(keeping.url("/a.png"), timeout_s=1)
    assert len(followed) <= 3, "a fourth call would begin after 1.2 s"


@pytest.mark.parametrize(
    ("value", "pause_s"),
    [
        ("0", 0.0),
        ("7", 7.0),
        ("9" * 5000, 999_999_999.0),
        ("-1", None),
        ("1e3", None),
        ("", None),
        ("Fri, 32 Foo 2026 99:99:99 GMT", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 21 Oct 2015 07:28:00 -0000", 0.0),
    ],
)
def test_the_pause_that_a_server_asks_for(keeping: WebServer, value: str, pause_s: float | None) -> None:
    """Retry-After is read in seconds and as a date; other values count as none."""
    keeping.pages["/a.png"] = lambda handler: respond(handler, 503, headers={"Retry-After": value})
    with pytest.raises(Unavailable) as fault:
        read(WebUrl.parse(keeping.url("/a.png")), AllowedUrls("image_path", retries=0), 100)
    assert fault.value.pause_s == pause_s


def test_an_absurd_pause_is_cut(keeping: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause of years is one of LONGEST_PAUSE_S."""
    monkeypatch.setattr("latent_encoder.storage.retrying.LONGEST_PAUSE_S", 0.01)
    keeping.pages["/a.png"] = lambda handler: respond(
        handler, 503 if len(keeping.asked) == 1 else 200, BODY, {"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}
    )
    assert get(keeping.url("/a.png"), retries=1) == BODY
