"""Images from web servers, by Python's own HTTP client.

A redirect is followed only to a URL that a request may name too. A body is never unpacked. Proxies of the environment are not
used: their own look-up of the name could not be checked.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import partial
from http.client import HTTPException, HTTPResponse

from config import VERSION
from errors import AccessDenied, ImageInvalid, ImageNotFound, one_line
from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.connections import POOL, Connection, Deadline, connect
from latent_encoder.storage.locations import WebUrl
from latent_encoder.storage.retrying import Unavailable, repeated
from latent_encoder.storage.stores import TooLarge
from latent_encoder.storage.watching import received, watched

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
}


def read(url: WebUrl, limits: AllowedUrls, max_bytes: int) -> bytes:
    """Return the body that a web server has at that URL. An attempt ends with STORAGE_TIMEOUT_S, redirects included.

    Raises:
        AccessDenied: the server refuses, its address is private, or a redirect leads out of the allowed URLs.
        ImageNotFound: the server has nothing there.
        ImageInvalid: the server responds in another way than with an image.
        TooLarge: the body has more bytes than `max_bytes`.
        Unavailable: the server cannot be reached or fails, also after repetitions.
    """
    return repeated(partial(_followed, url, limits, max_bytes), limits, url.shown)


def _followed(url: WebUrl, limits: AllowedUrls, max_bytes: int, repetition: int) -> bytes:
    """Return the body at a URL, or at the one that its redirects lead to."""
    place, named = url, True
    with Deadline(limits.timeout_s) as deadline:
        for _ in range(MOST_REDIRECTS + 1):
            with watched("get", place.shown, repetition), _explained(url, limits, deadline):
                found = _fetched(place, limits, max_bytes, deadline, named=named)
            if isinstance(found, bytes):
                return found
            place, named = _redirected(url, place, found, limits), limits.prefixes is not None
    raise ImageInvalid(f"Image file cannot be read: {url.shown} (more than {MOST_REDIRECTS} redirects)")


@contextmanager
def _explained(url: WebUrl, limits: AllowedUrls, deadline: Deadline) -> Iterator[None]:
    """Turn the errors of a connection inside into ours."""
    try:
        yield
    except ssl.SSLCertVerificationError as exc:
        raise ImageInvalid(
            f"Image file cannot be read: {url.shown} (the server's certificate is not valid: {exc.verify_message}; "
            "SSL_CERT_FILE names other authorities)"
        ) from exc
    except (OSError, HTTPException, ValueError) as exc:  # ValueError: Python's client takes a response for none of HTTP
        late = deadline.passed or isinstance(exc, TimeoutError)
        raise Unavailable(_too_late(limits) if late else one_line(exc)) from None


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


def _fetched(url: WebUrl, limits: AllowedUrls, max_bytes: int, deadline: Deadline, *, named: bool) -> bytes | str:
    """Return the body, or the place that a redirect leads to. A connection whose response was read to its end is kept."""
    connection, response = _asked(url, limits, deadline, named=named)
    reusable = False
    try:
        with response:
            if response.status in REDIRECTS and (target := response.headers.get("Location")):
                reusable = _short_body_read(response)
                return target
            _refuse(url, response)
            body = _body(response, max_bytes, deadline)
            reusable = not response.will_close
            return body
    finally:
        if reusable:
            POOL.give_back(connection)
        else:
            connection.close()


def _short_body_read(response: HTTPResponse) -> bool:
    """Read the body of a redirect if it is short, and return whether another response can follow."""
    if response.will_close or response.length is None or response.length > CHUNK_BYTES:
        return False
    response.read()
    return True


def _asked(url: WebUrl, limits: AllowedUrls, deadline: Deadline, *, named: bool) -> tuple[Connection, HTTPResponse]:
    """Return a response whose headers have come. If the server has ended an unused connection, a new one is made."""
    kept = POOL.take(url, limits, named=named)
    if kept is not None:
        deadline.watch(kept)
        try:
            return kept, _sent(kept, url, limits)
        except (OSError, HTTPException):
            if deadline.passed:
                raise
    connection = connect(url, limits, deadline, named=named)
    return connection, _sent(connection, url, limits)


def _sent(connection: Connection, url: WebUrl, limits: AllowedUrls) -> HTTPResponse:
    try:
        connection.http.sock.settimeout(limits.timeout_s)
        connection.http.request("GET", url.target, headers=HEADERS)
        return connection.http.getresponse()
    except BaseException:
        connection.close()
        raise


def _too_late(limits: AllowedUrls) -> str:
    return f"no complete response within STORAGE_TIMEOUT_S={limits.timeout_s:g}"


def _refuse(url: WebUrl, response: HTTPResponse) -> None:
    """Raise the error of a response that holds no image."""
    status = f"HTTP status {response.status}"
    if response.status == 200:
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):  # it was not asked for, and unpacked it may have any size
            raise ImageInvalid(
                f"Image file cannot be read: {url.shown} (Content-Encoding is {encoding[:40]!r}; send the file as it is)"
            )
        return
    if response.status in (401, 403, 407):
        raise AccessDenied(f"Access denied: the server refuses {url.shown} ({status}); a presigned URL may have expired.")
    if response.status in (404, 410):
        raise ImageNotFound(f"Image file not found: {url.shown}")
    if response.status >= 500 or response.status in PASSING:
        raise Unavailable(status, _retry_after(response))
    raise ImageInvalid(f"Image file cannot be read: {url.shown} ({status})")


def _retry_after(response: HTTPResponse) -> float | None:
    """Return the seconds that the server asks to wait, stated as such or as a date; None if it states none that is usable."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])  # longer ones are years too
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(date.replace(tzinfo=date.tzinfo or UTC).timestamp() - time.time(), 0.0)


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
