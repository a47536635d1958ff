"""Connections to web servers: only to addresses that were checked, ended at a deadline, and used again for a short time."""

from __future__ import annotations

import ipaddress
import select
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from http.client import HTTPConnection, HTTPSConnection
from types import TracebackType
from typing import Any, Self

from errors import AccessDenied, one_line
from latent_encoder.storage.access import Address, AllowedUrls
from latent_encoder.storage.locations import WebUrl
from latent_encoder.storage.retrying import Unavailable
from latent_encoder.storage.stores import CONNECT_S

IDLE_S = 4.0
"""Seconds that an unused connection is kept. Apache and Node.js end one after 5 s, so it is rarely used at its very end."""

LONGEST_USE_S = 60.0
"""Seconds from connecting to the last use, so that a server that moves to another address is followed within a minute."""

MOST_IDLE = 16
"""Unused connections that are kept: as many as images are fetched at a time on a large machine."""

Entry = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]
"""An address, as `socket.getaddrinfo` gives it."""


class Deadline:
    """A point in time at which connections are ended, whatever they are doing.

    A time-out of a socket begins anew with each byte, so a server could hold a thread for as long as it likes.
    """

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._end_at = time.monotonic() + seconds
        self._watched: list[Connection] = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    @property
    def left_s(self) -> float:
        """The seconds until then, at least a thousandth: a socket takes 0 for no time-out."""
        return max(self._end_at - time.monotonic(), 0.001)

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._timer.cancel()
        with self._lock:
            self._watched.clear()

    def watch(self, connection: Connection) -> None:
        """End this connection at that time, unless the deadline is left before."""
        with self._lock:
            self._watched.append(connection)
            if self.passed:
                connection.end()

    def _end(self) -> None:
        with self._lock:
            self.passed = True
            for connection in self._watched:
                connection.end()


@dataclass(eq=False)
class Connection:
    """A connection to a checked address of a server."""

    http: HTTPConnection
    key: tuple[str, str, int]
    """Scheme, host and port."""
    address: Address
    descriptor: socket.socket
    """A second descriptor of the socket, because TLS takes the first one over."""
    since: float = field(default_factory=time.monotonic)
    last_used: float = 0.0
    used: bool = False
    """It has served a request before, so the server may have ended it meanwhile."""

    def end(self) -> None:
        """End it, whatever another thread does with it."""
        with suppress(OSError):
            self.descriptor.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.http.close()
        self.descriptor.close()

    @property
    def is_fresh(self) -> bool:
        """True if it can serve another request: bytes that nobody asked for, or its end, make it unusable."""
        now = time.monotonic()
        if now - self.last_used > IDLE_S or now - self.since > LONGEST_USE_S:
            return False
        waiting = select.poll()
        waiting.register(self.descriptor, select.POLLIN)
        return not waiting.poll(0)


class Pool:
    """The unused connections of this process."""

    def __init__(self) -> None:
        self._idle: list[Connection] = []
        self._lock = threading.Lock()

    def take(self, url: WebUrl, limits: AllowedUrls, *, named: bool) -> Connection | None:
        """Return an unused connection to that server, if its address is one that these limits allow."""
        with self._lock:
            fresh = [each for each in self._idle if each.is_fresh]
            stale = [each for each in self._idle if each not in fresh]
            usable = [each for each in fresh if each.key == _key(url) and _may_use(each, url, limits, named=named)]
            self._idle = [each for each in fresh if each not in usable[-1:]]
        for each in stale:
            each.close()
        return usable[-1] if usable else None

    def give_back(self, connection: Connection) -> None:
        """Keep a connection whose response was read to its end."""
        connection.used, connection.last_used = True, time.monotonic()
        with self._lock:
            self._idle.append(connection)
            oldest = self._idle.pop(0) if len(self._idle) > MOST_IDLE else None
        if oldest is not None:
            oldest.close()

    def clear(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for each in idle:
            each.close()


POOL = Pool()


def connect(url: WebUrl, limits: AllowedUrls, deadline: Deadline, *, named: bool) -> Connection:
    """Return a new connection to an address of the server that may be connected to.

    Raises:
        AccessDenied: the server has only addresses that may not.
        Unavailable: its name cannot be looked up in time.
        OSError: no address accepts a connection.
    """
    found = look_up(url.host, url.port, min(CONNECT_S, deadline.left_s))
    usable = [entry for entry in found if limits.allows_address(url.host, _address(entry), named=named)]
    if not usable:
        raise AccessDenied(
            f"Access denied: {url.shown} leads to a private address; ALLOWED_PRIVATE_NETWORKS names the networks that a "
            "server's name may lead to."
        )
    plain, entry = _first_that_accepts(usable, deadline)
    https = url.scheme == "https"
    http = HTTPSConnection(url.host, url.port, context=tls()) if https else HTTPConnection(url.host, url.port)
    http.auto_open = 0  # else it would look the name up again, and connect to an address that nobody checked
    http.sock = plain
    connection = Connection(http, _key(url), _address(entry), plain.dup())
    try:
        deadline.watch(connection)
        if https:
            http.sock = tls().wrap_socket(plain, server_hostname=url.host)
    except BaseException:
        plain.close()
        connection.close()
        raise
    return connection


@cache
def tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


_look_ups: dict[tuple[str, int], Future[Sequence[Entry]]] = {}
_looking_up = threading.Lock()


def look_up(host: str, port: int, timeout_s: float) -> Sequence[Entry]:
    """Return the addresses of a server.

    The system's function knows no time-out, so a thread of its own calls it: one for each name, however many wait for it.

    Raises:
        Unavailable: the name is unknown, or its look-up takes longer than `timeout_s`.
    """
    key = (host, port)
    with _looking_up:
        found = _look_ups.get(key)
        if found is None:
            found = _look_ups[key] = Future()
            try:
                threading.Thread(target=_look_up, args=(key, found), daemon=True, name="look-up").start()
            except RuntimeError:  # the system has no further thread
                del _look_ups[key]
                raise
    try:
        return found.result(timeout_s)
    except TimeoutError:
        raise Unavailable(f"the name of the server was not looked up within {timeout_s:.3g} s") from None
    except (OSError, UnicodeError) as exc:
        raise Unavailable(f"the name of the server cannot be looked up: {one_line(exc)}") from None


def _look_up(key: tuple[str, int], found: Future[Sequence[Entry]]) -> None:
    entries: Sequence[Entry] = ()
    fault: Exception | None = None
    try:
        entries = socket.getaddrinfo(*key, type=socket.SOCK_STREAM)
    except Exception as exc:
        fault = exc
    with _looking_up:
        del _look_ups[key]
    if fault is None:
        found.set_result(entries)
    else:
        found.set_exception(fault)


def _first_that_accepts(entries: Sequence[Entry], deadline: Deadline) -> tuple[socket.socket, Entry]:
    fault: OSError | None = None
    for entry in entries:
        family, kind, protocol, _, address = entry
        try:
            made = socket.socket(family, kind, protocol)
        except OSError as exc:
            fault = exc
            continue
        made.settimeout(min(CONNECT_S, deadline.left_s))
        try:
            made.connect(address)
        except OSError as exc:
            made.close()
            fault = exc
            continue
        return made, entry
    raise fault or OSError("no address")


def _address(entry: Entry) -> Address:
    return ipaddress.ip_address(str(entry[4][0]).partition("%")[0])  # `%` begins the zone of a link-local address


def _may_use(connection: Connection, url: WebUrl, limits: AllowedUrls, *, named: bool) -> bool:
    """Return whether these limits, which may not be those of the connection's first request, allow its address."""
    return limits.allows_address(url.host, connection.address, named=named)


def _key(url: WebUrl) -> tuple[str, str, int]:
    return url.scheme, url.host, url.port
