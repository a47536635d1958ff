"""Web servers with images, by the standard library: with TLS or without, and with responses that no server should give."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self

Respond = Callable[[BaseHTTPRequestHandler], None]


class WebServer:
    """A server whose paths are given; every other one is not found."""

    def __init__(self, certificate: Path | None = None, *, keep_alive: bool = False) -> None:
        """`certificate` is a PEM file with the key and the certificate."""
        self.pages: dict[str, bytes | Respond] = {}
        self.asked: list[str] = []
        self.connections = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1" if keep_alive else "HTTP/1.0"

            def setup(self) -> None:
                server.connections += 1
                super().setup()

            def do_GET(self) -> None:
                server.asked.append(self.path)
                page = server.pages.get(self.path.partition("?")[0])
                with suppress(OSError):
                    if callable(page):
                        page(self)
                    elif page is None:
                        respond(self, 404)
                    else:
                        respond(self, 200, page)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """Be silent: clients of these tests break off."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.scheme = "http" if certificate is None else "https"
        threading.Thread(target=self._server.serve_forever, args=[0.05], daemon=True).start()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


def respond(handler: BaseHTTPRequestHandler, status: int, data: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
    """Send a whole response."""
    handler.send_response(status)
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def redirect(target: str) -> Respond:
    return lambda handler: respond(handler, 302, headers={"Location": target})


def status(number: int, headers: Mapping[str, str] | None = None) -> Respond:
    return lambda handler: respond(handler, number, headers=headers)
