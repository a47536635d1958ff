"""A proxy in front of the S3 server, with the faults of a network and of an overloaded storage."""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal, NamedTuple, Self

Kind = Literal["status", "drop", "lose", "hold"]
"""`status`: respond so without the server; `drop`: close the connection instead; `lose`: close it after the server has done
the call; `hold`: wait for `release`, then close it, without the server."""


class Call(NamedTuple):
    """A call that came, with the status of its response; 0 if it got none."""

    method: str
    path: str
    status: int
    sent: int = 0
    """Bytes of the body that came."""
    received: int = 0
    """Bytes of the body of the response."""


@dataclass
class Fault:
    """A fault of the next calls of that method whose path matches."""

    kind: Kind
    method: str
    path: str
    times: int = 1
    status: int = 503
    met: threading.Event = field(default_factory=threading.Event)
    """Set when a call meets the fault."""
    release: threading.Event = field(default_factory=threading.Event)
    then: Fault | None = None
    """A fault that all calls of its kind meet from then on."""


class FaultyProxy:
    """The proxy; `port` is that of this machine."""

    def __init__(self, target: int) -> None:
        self.latency_s = 0.0
        self.away = False
        """Close each connection without a response."""
        self.date: Callable[[], str] | None = None
        """The time that responses state in place of the server's."""
        self.calls: list[Call] = []
        self.under_way = 0
        self.most_under_way = 0
        """The most calls that were under way at the same time."""
        self._target = target
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._of_path: dict[str, threading.Lock] = defaultdict(threading.Lock)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_one_request(self) -> None:
                with suppress(OSError):
                    super().handle_one_request()
                    return
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

            def __getattr__(self, name: str) -> Callable[[], None]:
                if name.startswith("do_"):
                    return lambda: proxy._counted(self)
                raise AttributeError(name)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=[0.05], daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for fault in self._faults:
            fault.release.set()
        self._server.shutdown()
        self._server.server_close()

    def fault(self, kind: Kind, method: str, path: str, times: int = 1, status: int = 503) -> Fault:
        """Let the next calls of that method meet a fault; `path` is a regular expression that is searched for."""
        fault = Fault(kind, method, path, times, status)
        self._faults.append(fault)
        return fault

    def count(self, method: str, path: str = "") -> int:
        """Return the number of calls so far."""
        return sum(call.method == method and re.search(path, call.path) is not None for call in self.calls)

    def _counted(self, handler: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            self._serve(handler)
        finally:
            with self._lock:
                self.under_way -= 1

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        time.sleep(self.latency_s)
        if self.away:
            self._end(handler, len(body))
            return
        fault = self._next_fault(handler.command, handler.path)
        if fault is not None and fault.kind == "hold":
            fault.release.wait()
        if fault is not None and fault.kind in ("hold", "drop"):
            self._end(handler, len(body))
            return
        if fault is not None and fault.kind == "status":
            self._respond(handler, fault.status, {}, b"", len(body))
            return
        response = None
        with self._of_path[handler.path], suppress(OSError):  # the server looks at conditions and writes in two steps
            response = self._passed_on(handler, body)
        if fault is not None or response is None:
            self._end(handler, len(body))
            return
        self._respond(handler, *response, len(body))

    def _next_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    if fault.then is not None:
                        fault.then.times = 1_000_000
                    fault.met.set()
                    return fault
        return None

    def _passed_on(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = dict(handler.headers.items())
        connection = HTTPConnection("127.0.0.1", self._target, timeout=30)
        try:
            connection.request(handler.command, handler.path, body=body or None, headers=headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def _respond(self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], data: bytes, sent: int) -> None:
        self.calls.append(Call(handler.command, handler.path, status, sent, len(data)))
        handler.send_response_only(status)
        if self.date is not None:
            headers = {name: value for name, value in headers.items() if name.lower() != "date"} | {"Date": self.date()}
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                handler.send_header(name, value)
        length = headers.get("Content-Length") if handler.command == "HEAD" else str(len(data))
        handler.send_header("Content-Length", length or "0")
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(data)

    def _end(self, handler: BaseHTTPRequestHandler, sent: int) -> None:
        self.calls.append(Call(handler.command, handler.path, 0, sent))
        handler.close_connection = True
