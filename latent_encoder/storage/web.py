"""Images from web servers, by Python's own HTTP client.

A server's name is looked up once, and the connection goes to an address that was checked. A redirect is followed only to a URL
that a request may name too. Proxies of the environment are not used: their own look-up of the name could not be checked.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
from contextlib import closing, suppress
from functools import cache, partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from types import TracebackType
from typing import Self

from config import VERSION
from errors import AccessDenied, ImageInvalid, ImageNotFound, one_line
from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.locations import WebUrl
from latent_encoder.storage.retrying import Unavailable, repeated
from latent_encoder.storage.stores import CONNECT_S, TooLarge
from latent_encoder.storage.watching import received

MOST_REDIRECTS = 5
"""Redirects that are followed: browsers follow 20; a file server needs one or two."""

REDIRECTS = (301, 302, 303, 307, 308)
PASSING = (408, 425, 429)
"""Statuses beside 5xx that may pass: a time-out, too early, too many requests."""

CHUNK_BYTES = 1 << 16
"""Bytes that are read at a time. What has come is taken, so a slow server does not hide how much it has sent."""

HEADERS = {
    "User-Agent": f"latent-encoder/{VERSION}",
    "Accept": "image/png, image/jpeg, */*;q=0.5",
    "Accept-Encoding": "identity",
    "Connection": "close",
}


def read(url: WebUrl, limits: AllowedUrls, max_bytes: int) -> bytes:
    """Return the body that a web server has at that URL.

    Raises:
        AccessDenied: the server refuses, its address is private, or a redirect leads out of the allowed URLs.
        ImageNotFound: the server has nothing there.
        ImageInvalid: the server responds in another way than with an image.
        TooLarge: the body has more bytes than `max_bytes`.
        Unavailable: the server cannot be reached or fails, also after repetitions.
    """
    place, named = url, True
    for _ in range(MOST_REDIRECTS + 1):
        found = repeated("get", partial(_fetched, place, limits, max_bytes, named=named), limits, place.shown)
        if isinstance(found, bytes):
            return found
        place, named = _redirected(url, place, found, limits), limits.prefixes is not None
    raise ImageInvalid(f"Image file cannot be read: {url.shown} (more than {MOST_REDIRECTS} redirects)")


def _redirected(url: WebUrl, place: WebUrl, reference: str, limits: AllowedUrls) -> WebUrl:
    """Return the URL that a redirect leads to.

    Raises:
        AccessDenied: a request may not name it.
    """
    try:
        target = place.joined(reference)
    except ValueError:
        raise ImageInvalid(f"Image file cannot be read: {url.shown} (it is redirected to a URL that cannot be used)") from None
    if not limits.allows(target) or (place.scheme, target.scheme) == ("https", "http"):
        # The target is not named: it may hold the answer to a question about a network that only the server sees.
        raise AccessDenied(
            f"Access denied: {url.shown} is redirected to a URL that {limits.setting} does not allow; "
            "name the image by its own URL, or add that prefix there."
        )
    return target


def _fetched(url: WebUrl, limits: AllowedUrls, max_bytes: int, *, named: bool) -> bytes | str:
    """Return the body, or the place that a redirect leads to."""
    with Deadline(limits.timeout_s) as deadline:
        try:
            with closing(_connection(url, limits, deadline, named=named)) as connection:
                connection.request("GET", url.target, headers=HEADERS)
                with connection.getresponse() as response:
                    if response.status in REDIRECTS and (target := response.headers.get("Location")):
                        return target
                    _refuse(url, response)
                    return _body(response, max_bytes, deadline)
        except ssl.SSLCertVerificationError as exc:
            raise ImageInvalid(
                f"Image file cannot be read: {url.shown} (the server's certificate is not valid: {exc.verify_message}; "
                "SSL_CERT_FILE names other authorities)"
            ) from exc
        except (OSError, HTTPException, ValueError) as exc:  # ValueError: Python's client takes a response for none of HTTP
            late = deadline.passed or isinstance(exc, TimeoutError)
            raise Unavailable(_too_late(limits) if late else one_line(exc)) from None


def _too_late(limits: AllowedUrls) -> str:
    return f"no complete response within STORAGE_TIMEOUT_S={limits.timeout_s:g}"


def _refuse(url: WebUrl, response: HTTPResponse) -> None:
    """Raise the error of a response that holds no image."""
    status = f"HTTP status {response.status}"
    if response.status == 200:
        return
    if response.status in (401, 403, 407):
        raise AccessDenied(f"Access denied: the server refuses {url.shown} ({status}); a presigned URL may have expired.")
    if response.status in (404, 410):
        raise ImageNotFound(f"Image file not found: {url.shown}")
    if response.status >= 500 or response.status in PASSING:
        raise Unavailable(status, _retry_after(response))
    raise ImageInvalid(f"Image file cannot be read: {url.shown} ({status})")


def _retry_after(response: HTTPResponse) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isascii() and value.isdigit() else None


def _body(response: HTTPResponse, max_bytes: int, deadline: Deadline) -> bytes:
    stated = response.length  # None if the server does not state it
    if stated is not None and stated > max_bytes:
        raise TooLarge(stated)
    parts, length = [], 0
    while part := response.read1(CHUNK_BYTES):
        parts.append(part)
        length += len(part)
        received(len(part))
        if length > max_bytes:
            raise TooLarge(None)
    if deadline.passed:
        raise TimeoutError
    if stated is not None and length < stated:
        raise Unavailable(f"{length} of {stated} bytes came")
    return b"".join(parts)


class Deadline:
    """A point in time at which a connection is ended, whatever it is doing.

    A time-out of a socket begins anew with each byte, so a server could hold a thread for as long as it likes.
    """

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._ends: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._timer.cancel()
        for end in self._ends:
            end.close()

    def watch(self, connection: socket.socket) -> None:
        """End this connection at that time. A second descriptor of it is kept, because TLS takes the first one over."""
        self._ends.append(connection.dup())

    def _end(self) -> None:
        self.passed = True
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _connection(url: WebUrl, limits: AllowedUrls, deadline: Deadline, *, named: bool) -> HTTPConnection:
    """Return a connection to an address of the server that may be connected to."""
    plain = _connected(url, limits, named=named)
    try:
        deadline.watch(plain)
        if url.scheme == "http":
            connection = HTTPConnection(url.host, url.port)
            connection.sock = plain
        else:
            connection = HTTPSConnection(url.host, url.port)
            connection.sock = _tls().wrap_socket(plain, server_hostname=url.host)
    except BaseException:
        plain.close()
        raise
    return connection


@cache
def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _connected(url: WebUrl, limits: AllowedUrls, *, named: bool) -> socket.socket:
    fault: OSError | None = None
    try:
        found = socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as exc:
        raise Unavailable(f"the name of the server cannot be looked up: {one_line(exc)}") from None
    usable = [entry for entry in found if limits.allows_address(url.host, _address(entry[4][0]), named=named)]
    if not usable:
        raise AccessDenied(
            f"Access denied: {url.shown} leads to a private address; ALLOWED_PRIVATE_NETWORKS names the networks that a "
            "server's name may lead to."
        )
    for family, kind, protocol, _, address in usable:
        try:
            made = socket.socket(family, kind, protocol)
        except OSError as exc:
            fault = exc
            continue
        made.settimeout(min(CONNECT_S, limits.timeout_s))
        try:
            made.connect(address)
        except OSError as exc:
            made.close()
            fault = exc
            continue
        made.settimeout(limits.timeout_s)
        return made
    raise fault or OSError("no address")


def _address(text: str | int) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(str(text).partition("%")[0])  # `%` begins the zone of a link-local address
