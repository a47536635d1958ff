"""The HTTP port of Kafka mode: health for the supervisor of workers, metrics for Prometheus. It is read-only."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from socketserver import ThreadingMixIn
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import make_wsgi_app

from config import Settings
from errors import SetupError
from latent_encoder.telemetry.health import Health, HealthReport
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder.http")

CLIENT_TIMEOUT_S = 10.0
"""Timeout of a connection: a client that sends nothing must not hold a thread for long. Probes wait a second or two."""

ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # the address to ask if the server listens on all


@contextmanager
def http_server(settings: Settings, health: Health) -> Iterator[None]:
    """Serve HTTP_PORT as long as the context lasts; 0 means no port.

    Raises:
        SetupError: the port cannot be listened on.
    """
    if not settings.http_port:
        yield
        return
    try:
        server = _Server(settings.http_host, settings.http_port, application(health))
    except OSError as exc:
        raise SetupError(
            f"Cannot listen on HTTP_PORT={settings.http_port} of HTTP_HOST={settings.http_host} ({exc.strerror or exc}). "
            "Workers on one machine need a port each; 0 turns it off."
        ) from exc
    Thread(target=server.serve_forever, name="http", daemon=True).start()
    log.info("listening", host=settings.http_host, port=settings.http_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def ask(settings: Settings) -> tuple[dict[str, Any], bool]:
    """Return the health that a worker on this machine reports on its HTTP port, and whether it is alive.

    Raises:
        OSError: nothing responds there.
        ValueError: the response is not a worker's.
    """
    host = ANY_ADDRESS.get(settings.http_host, settings.http_host)
    health: dict[str, Any] = {}
    for path in ("/healthz", "/readyz"):
        connection = HTTPConnection(host, settings.http_port, timeout=CLIENT_TIMEOUT_S)
        try:
            connection.request("GET", path)
            health |= json.loads(connection.getresponse().read())
        except HTTPException as exc:
            raise ValueError(str(exc)) from exc
        finally:
            connection.close()
    if not {"alive", "ready"} <= health.keys():
        raise ValueError("another service responds there")
    return health, health["alive"] is True


def application(health: Health) -> WSGIApplication:
    """Return the WSGI application of the port.

    `/healthz` and `/readyz` have status 200 or 503, and the state of each part in JSON; `/metrics` is Prometheus' text.
    """
    metrics: WSGIApplication = make_wsgi_app()

    def respond(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _text(start_response, "405 Method Not Allowed", "Only GET.\n")
        match environ["PATH_INFO"]:
            case "/healthz":
                return _report(start_response, "alive", health.alive())
            case "/readyz":
                return _report(start_response, "ready", health.ready())
            case "/metrics":
                return metrics(environ, start_response)
            case _:
                return _text(start_response, "404 Not Found", "There are /healthz, /readyz and /metrics.\n")

    return respond


def _report(start_response: StartResponse, name: str, report: HealthReport) -> Iterable[bytes]:
    start_response("200 OK" if report.ok else "503 Service Unavailable", [("Content-Type", "application/json")])
    return [json.dumps({name: report.ok, f"{name}_parts": report.parts}).encode() + b"\n"]


def _text(start_response: StartResponse, status: str, text: str) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [text.encode()]


class _Server(ThreadingMixIn, WSGIServer):
    """A server with a thread for each connection."""

    daemon_threads = True

    def __init__(self, host: str, port: int, application: WSGIApplication) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)
        self.set_app(application)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log that a client hung up; its traceback would help nobody."""
        log.debug("http connection failed", client=str(client_address), request=str(request), exc_info=True)


class _Handler(WSGIRequestHandler):
    """A handler that logs no requests, which come every few seconds, and does not wait for a silent client."""

    timeout = CLIENT_TIMEOUT_S

    def log_message(self, *_: Any) -> None:
        """Log nothing."""
