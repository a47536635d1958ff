"""A server of object storage as the network shows it: its name, a connection, TLS, a response, and its clock."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from errors import one_line
from latent_encoder.doctor.check import Check, cross, tick, warning
from latent_encoder.storage.locations import WebUrl

REFUSED_S = 900
"""Seconds, 15 minutes: the difference of clocks from which on S3 and Azure refuse a signature."""

NOTABLE_S = 60
"""Seconds. A clock that is set by the network is right to a second; one that is off by a minute is not set by it."""

R = TypeVar("R")


class NotReached(Exception):
    """The server does not respond. The text has the step that failed."""

    def __init__(self, server: str, reason: str, *, has_no_connection: bool) -> None:
        super().__init__(f"{server}: {reason}")
        self.has_no_connection = has_no_connection


@dataclass(frozen=True)
class Reached:
    """A response of the server."""

    steps: str
    """The time of each step, in words."""
    ahead_s: float | None
    """The seconds by which this machine's clock is ahead of the server's; None if the server does not state its time."""


def within(seconds: float, call: Callable[[], R]) -> R:
    """Return the result of a call in a thread of its own, which is left behind if it takes longer.

    Raises:
        TimeoutError: it takes longer.
    """
    result: Future[R] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as exc:
            result.set_exception(exc)

    threading.Thread(target=run, daemon=True, name="doctor").start()
    return result.result(seconds)


def reach(url: WebUrl, timeout_s: float) -> Reached:
    """Look the server up, connect to it, and ask it without credentials. Each step takes `timeout_s` at most.

    Raises:
        NotReached: a step fails.
    """
    clock = Steps(url.netloc)
    found = clock.step("its name cannot be looked up", "name", lambda: within(timeout_s, lambda: _addresses(url)))
    plain = clock.step("no connection", "connection", lambda: _connected(found, timeout_s))
    with closing(plain):
        if url.scheme == "https":
            secure = _tls()
            plain = clock.step("no TLS", "TLS", lambda: secure.wrap_socket(plain, server_hostname=url.host))
        date = clock.step("no response", "response", lambda: _asked(url, plain))
    asked = time.time() - clock.last_s / 2  # the middle of the call
    return Reached(", ".join(clock.shown), None if date is None else asked - date)


class Steps:
    """The steps to a response, with their times."""

    def __init__(self, server: str) -> None:
        self._server = server
        self.shown: list[str] = []
        self.last_s = 0.0

    def step(self, fault: str, name: str, call: Callable[[], R]) -> R:
        """Return the result of a step.

        Raises:
            NotReached: it fails.
        """
        began = time.monotonic()
        try:
            result = call()
        except (OSError, UnicodeError, ValueError, http.client.HTTPException) as exc:
            reason = f"{fault}: {_reason(exc, time.monotonic() - began)}"
            raise NotReached(self._server, reason, has_no_connection=name in ("name", "connection")) from exc
        self.last_s = time.monotonic() - began
        self.shown.append(f"{name} {self.last_s * 1000:.0f} ms")
        return result


def _reason(exc: Exception, seconds: float) -> str:
    if isinstance(exc, TimeoutError):
        return f"nothing within {seconds:.1f} s"
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"the certificate is not valid: {exc.verify_message}"
    return (isinstance(exc, OSError) and exc.strerror) or one_line(exc)


def clock_check(host: str, ahead_s: float) -> Check:
    """Compare the clocks of this machine and of the server."""
    advice = "Set this machine's clock by the network, for example with chrony or systemd-timesyncd."
    found = f"this machine is {_words(abs(ahead_s))} {'ahead of' if ahead_s > 0 else 'behind'} {host}"
    if abs(ahead_s) >= REFUSED_S:
        return cross("storage clock", f"{found}; signatures are refused from 15 minutes on (RequestTimeTooSkewed)", advice)
    if abs(ahead_s) >= NOTABLE_S:
        return warning("storage clock", f"{found}; signatures are refused from 15 minutes on", advice)
    return tick("storage clock", f"as that of {host}, within {max(round(abs(ahead_s)), 1)} s")


def _words(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def _addresses(url: WebUrl) -> list[Any]:
    return socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)


def _connected(found: list[Any], timeout_s: float) -> socket.socket:
    """Return a connection to the first address that accepts one. All of them take `timeout_s` together."""
    fault: OSError = OSError("no address")
    for *_, address in found:
        try:
            return socket.create_connection(address[:2], timeout_s / len(found))
        except OSError as exc:
            fault = exc
    raise fault


def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    if authorities := os.environ.get("AWS_CA_BUNDLE"):
        context.load_verify_locations(authorities)
    return context


def _asked(url: WebUrl, plain: socket.socket) -> float | None:
    """Return the time of the server's response, by its own clock; None if it does not state it."""
    connection = http.client.HTTPConnection(url.host, url.port)
    connection.sock = plain
    connection.request("GET", "/", headers={"Connection": "close"})
    date = connection.getresponse().headers.get("Date")
    try:
        return parsedate_to_datetime(date).timestamp() if date else None
    except ValueError:
        return None
