"""The client: requests go out, and each gets a future that ends with its response.

One thread of the client reads the response topic, repeats requests, and ends those whose time is over. `send` may be called
from any thread. With asyncio, await `asyncio.wrap_future(client.send(...))`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack
from uuid import uuid4

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from latent_encoder_client.errors import (
    ClientClosed,
    ClientError,
    DeliveryFailed,
    EncodeFailed,
    ResponseTimeout,
    ResponseUnusable,
)
from latent_encoder_client.pending import Pending
from latent_encoder_client.requests import RequestFields
from latent_encoder_client.response_topic import ResponseTopic, partitions_of
from latent_encoder_client.responses import Success, parse_response
from latent_encoder_client.retries import Retries

log = logging.getLogger("latent_encoder_client")
log.addHandler(logging.NullHandler())  # the program that uses the client decides where logs go

ATTEMPT = "latent-encoder-client-attempt"
"""Header of a request, which comes back in its response: the client's id and the number of the attempt, `<id>/<number>`."""

CONNECT_TIMEOUT_S = 10.0  # the longest wait for the broker's response to each question at the start, in seconds
POLL_S = 0.1  # in seconds: the longest delay of a retry, a time-out or a close
QUEUE_FULL_PAUSE_S = 0.1  # in seconds, until a record is tried again that librdkafka's queue had no room for
CLOSE_S = 5.0  # the longest wait of `close` for records that are on their way to the broker, in seconds


class Client:
    """A connection to the service's two topics. Use it as a context manager, or call `close`.

    Raises:
        BrokerUnavailable: the broker does not respond, or a topic is missing.
    """

    def __init__(
        self,
        bootstrap_servers: str = "localhost:9092",
        *,
        request_topic: str = "latent-encoder-requests",
        response_topic: str = "latent-encoder-responses",
        retries: Retries | None = None,
        properties: Mapping[str, str | int | float | bool] | None = None,
    ) -> None:
        """`properties` are librdkafka's, for example those of TLS and of a login."""
        self._id = uuid4().hex
        self._request_topic = request_topic
        self._response_topic = response_topic
        self._retries = retries or Retries()
        self._pending: dict[str, Pending] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._last_error = ""
        common: dict[str, Any] = {"client.id": "latent-encoder-client", **(properties or {})}
        common |= {"bootstrap.servers": bootstrap_servers, "error_cb": self._note_error}
        self._producer = Producer({"enable.idempotence": True, "linger.ms": 0, **common}, logger=log)
        try:
            partitions_of(self._producer, request_topic, CONNECT_TIMEOUT_S)
            self._responses = ResponseTopic(
                response_topic, common, f"latent-encoder-client-{self._id}", CONNECT_TIMEOUT_S, log
            )
        finally:
            self._producer.poll(0)  # hands librdkafka's logs to Python; it would write them to standard error at its end
        self._thread = threading.Thread(target=self._run, name="latent-encoder-client", daemon=True)
        self._thread.start()

    @classmethod
    def from_environment(cls, **options: Any) -> Client:
        """Return a client with the broker and topics of the service's variables, or with the service's defaults.

        They are KAFKA_BOOTSTRAP_SERVERS, KAFKA_REQUEST_TOPIC and KAFKA_RESPONSE_TOPIC. `options` are those of the class.
        """
        variables = ("KAFKA_BOOTSTRAP_SERVERS", "KAFKA_REQUEST_TOPIC", "KAFKA_RESPONSE_TOPIC")
        names = ("bootstrap_servers", "request_topic", "response_topic")
        found = {name: os.environ.get(variable) for name, variable in zip(names, variables, strict=True)}
        return cls(**({name: value for name, value in found.items() if value} | options))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def send(
        self,
        image_path: str | os.PathLike[str],
        *,
        timeout_s: float = 600.0,
        request_id: str | None = None,
        correlation_id: str | None = None,
        more: Mapping[str, Any] | None = None,
        **fields: Unpack[RequestFields],
    ) -> Future[Success]:
        """Send a request, and return a future that ends with its success, or with a `ClientError`.

        The future's errors are `EncodeFailed`, `ResponseTimeout`, `DeliveryFailed`, `ResponseUnusable` and `ClientClosed`.

        Args:
            image_path: the path as the service sees it.
            timeout_s: the longest wait for the final response, retries included, in seconds.
            request_id: by default a new UUID. A second request in flight with the same id is refused.
            correlation_id: comes back in the response.
            more: fields that a newer service has.
            fields: the other fields of the request.

        Raises:
            ClientClosed: the client is closed.
            ValueError: a request with this id is in flight, or a field is no JSON.
        """
        request_id = request_id or str(uuid4())
        ids = {"request_id": request_id, "correlation_id": correlation_id}
        value = json.dumps({**(more or {}), **fields, **ids, "image_path": os.fspath(image_path)}, allow_nan=False).encode()
        pending = Pending(request_id, value, timeout_s, deadline=time.monotonic() + timeout_s)
        with self._lock:
            if self._closing.is_set():
                raise ClientClosed("The client is closed.")
            if request_id in self._pending:
                raise ValueError(f"a request with the id {request_id} is in flight")
            self._pending[request_id] = pending
        self._attempt(pending)
        return pending.future

    def encode(
        self,
        image_path: str | os.PathLike[str],
        *,
        timeout_s: float = 600.0,
        request_id: str | None = None,
        correlation_id: str | None = None,
        more: Mapping[str, Any] | None = None,
        **fields: Unpack[RequestFields],
    ) -> Success:
        """Send a request as `send` does, and return its response.

        Raises:
            EncodeFailed: the service responded with an error.
            ClientError: there is no response; the class has the reason.
        """
        ids = {"request_id": request_id, "correlation_id": correlation_id}
        return self.send(image_path, timeout_s=timeout_s, more=more, **ids, **fields).result()

    def close(self) -> None:
        """Close the client. Requests without a response get `ClientClosed`; the service still encodes them."""
        with self._lock:
            self._closing.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _attempt(self, pending: Pending) -> None:
        """Hand a request to librdkafka, which sends it in the background."""
        pending.due = None
        pending.attempts += 1
        try:
            self._producer.produce(
                self._request_topic,
                pending.value,
                key=pending.request_id.encode(),
                headers=[(ATTEMPT, self._token(pending))],
                on_delivery=partial(self._delivered, pending),
            )
        except BufferError:
            pending.attempts -= 1
            pending.due = time.monotonic() + QUEUE_FULL_PAUSE_S
        except KafkaException as exc:
            self._fail(pending, DeliveryFailed(f"The broker cannot take the request {pending.request_id}: {_text(exc)}."))

    def _token(self, pending: Pending) -> bytes:
        return f"{self._id}/{pending.attempts}".encode()

    def _delivered(self, pending: Pending, error: KafkaError | None, _: Message) -> None:
        if error is not None:
            self._fail(pending, DeliveryFailed(f"The broker did not take the request {pending.request_id}: {error.str()}."))

    def _note_error(self, error: KafkaError) -> None:
        self._last_error = error.str()

    def _run(self) -> None:
        """Read responses until the client is closed."""
        reason: ClientError = ClientClosed("The client was closed before the response came.")
        looked_at = 0.0
        try:
            while not self._closing.is_set():
                self._producer.poll(0)
                message = self._responses.poll(POLL_S)
                if message is not None:
                    self._receive(message)
                if time.monotonic() - looked_at >= POLL_S:
                    self._look_at_the_clock()
                    looked_at = time.monotonic()
        except Exception as exc:
            log.exception("the client cannot go on")
            reason = ClientClosed(f"The client had to stop: {type(exc).__name__}: {exc}.")
        finally:
            self._end(reason)

    def _end(self, reason: ClientError) -> None:
        with self._lock:
            self._closing.set()
            left = list(self._pending.values())
        for pending in left:
            self._fail(pending, reason)
        self._producer.flush(CLOSE_S)
        self._responses.close()

    def _receive(self, message: Message) -> None:
        """End or repeat the request that a record of the response topic is for.

        Responses to other clients and repeated ones are ignored. The key of a response is the request's, so those of others
        are not even parsed.
        """
        if (error := message.error()) is not None:
            self._last_error = error.str()
            return
        with self._lock:
            pending = self._pending.get((message.key() or b"").decode(errors="replace"))
        headers: Mapping[str, Any] = dict(message.headers() or ())
        token = headers.get(ATTEMPT)
        if pending is None or (token is not None and not token.startswith(f"{self._id}/".encode())):
            return
        try:
            response = parse_response(message.value())
        except ValueError as exc:
            self._fail(pending, ResponseUnusable(f"The response to the request {pending.request_id} cannot be read: {exc}."))
            return
        if isinstance(response, Success):
            if self._forget(pending):
                pending.succeed(response)
        elif token is None or token == self._token(pending):
            self._failed(pending, EncodeFailed(response, pending.attempts))

    def _failed(self, pending: Pending, error: EncodeFailed) -> None:
        """Plan another attempt after an error response, or end the request.

        A request that waits for its next attempt has had this response already.
        """
        if pending.due is not None:
            return
        pause_s = self._retries.pause_s(pending.attempts)
        due = time.monotonic() + pause_s
        if not error.response.worth_a_retry or pending.attempts >= self._retries.attempts or due >= pending.deadline:
            self._fail(pending, error)
            return
        log.info("request %s failed with %s; next attempt in %.1f s", pending.request_id, error.code, pause_s)
        pending.last_failure = error.response
        pending.due = due

    def _look_at_the_clock(self) -> None:
        """Repeat the requests whose pause is over, and end those whose time is."""
        now = time.monotonic()
        with self._lock:
            all_pending = list(self._pending.values())
        for pending in all_pending:
            if pending.future.cancelled():
                self._forget(pending)
            elif now >= pending.deadline:
                self._fail(pending, ResponseTimeout(self._timeout_text(pending)))
            elif pending.due is not None and now >= pending.due:
                self._attempt(pending)

    def _timeout_text(self, pending: Pending) -> str:
        text = f"No response to the request {pending.request_id} on {self._response_topic} within {pending.timeout_s:g} s"
        if pending.last_failure is not None:
            text += f"; the last one was {pending.last_failure.error_code}: {pending.last_failure.error_message}"
        if self._last_error:
            text += f"; the broker's last error was: {self._last_error}"
        return f"{text}. Check that a worker runs and reads {self._request_topic}."

    def _fail(self, pending: Pending, error: ClientError) -> None:
        if self._forget(pending):
            pending.fail(error)

    def _forget(self, pending: Pending) -> bool:
        """Remove a request from those in flight, and return whether it was there."""
        with self._lock:
            return self._pending.pop(pending.request_id, None) is not None


def _text(exc: KafkaException) -> str:
    error = exc.args[0] if exc.args else exc
    return error.str() if isinstance(error, KafkaError) else str(error)
