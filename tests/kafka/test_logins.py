"""Logins that are refused for a while: they end a worker only before its first success, or if they go on for too long."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from confluent_kafka import KafkaError
from confluent_kafka.admin._scram import ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion
from pydantic import SecretStr

from config import Settings
from errors import KafkaFailed
from latent_encoder.kafka.connection import BrokerState
from service import LatentEncoder
from tests.broker import ApacheKafka, Broker
from tests.broker.behind_proxy import BehindProxy
from tests.kafka_tools import Bench, Events, MakeBench, client_config, read_responses, wait_until

REFUSED = KafkaError(KafkaError.SASL_AUTHENTICATION_FAILED, "wrong password")
UP = {"broker": {"state": "UP"}}


class Clock:
    """A clock that is set by hand, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture(scope="module")
def behind(broker: Broker) -> Iterator[BehindProxy]:
    """Provide a broker whose handshakes can be broken off, if this machine runs Apache Kafka."""
    if not isinstance(broker, ApacheKafka):
        pytest.skip(f"{broker.name} has no listener that asks for a password")
    with BehindProxy() as behind:
        yield behind


def login(behind: BehindProxy, **changes: Any) -> dict[str, Any]:
    """Return the settings for the listener with passwords."""
    return {
        "kafka_bootstrap_servers": behind.secure_bootstrap_servers,
        "kafka_security_protocol": "SASL_SSL",
        "kafka_sasl_mechanism": "SCRAM-SHA-512",
        "kafka_sasl_username": behind.username,
        "kafka_sasl_password": SecretStr(behind.password),
        "kafka_ssl_ca_location": behind.ca_file,
        **changes,
    }


def test_first_login_that_is_refused_is_final() -> None:
    """Before a broker was reached, a refused login ends the worker at once, whichever client it is."""
    for refuse in (BrokerState.on_error, BrokerState.on_producer_error):
        broker = BrokerState("b:9092", auth_timeout_s=120)
        refuse(broker, REFUSED)
        with pytest.raises(KafkaFailed, match="refuses this service: wrong password"):
            broker.check()


@pytest.mark.parametrize("refuse", [BrokerState.on_error, BrokerState.on_producer_error])
def test_login_that_is_refused_for_too_long_is_final(refuse: Any) -> None:
    """The time begins with the first refusal, and ends with a connection or with other troubles."""
    clock = Clock()
    broker = BrokerState("b:9092", 120, clock)

    def pass_time(until: int) -> None:
        while clock.seconds < until:
            clock.seconds += 30
            refuse(broker, REFUSED)
            broker.check()

    broker.on_statistics(UP)
    pass_time(90)
    broker.on_statistics(UP)
    broker.on_producer_statistics(json.dumps({"brokers": UP}))
    pass_time(210)
    clock.seconds += 600  # the broker is away, and refuses nothing
    broker.check()
    refuse(broker, REFUSED)
    broker.check()
    with pytest.raises(KafkaFailed, match="wrong password"):
        pass_time(960)


def test_access_that_is_refused_is_final() -> None:
    """An access rule does not pass by itself, so it ends the worker at once."""
    broker = BrokerState("b:9092", 120)
    broker.on_statistics(UP)
    broker.on_error(KafkaError(KafkaError.GROUP_AUTHORIZATION_FAILED))
    with pytest.raises(KafkaFailed, match="GROUP_AUTHORIZATION_FAILED"):
        broker.check()


def test_refused_producer_is_not_ready() -> None:
    """A worker whose consumer is connected and whose producer is refused has a fault, until the producer is connected."""
    broker = BrokerState("b:9092", 120)
    broker.on_statistics(UP)
    broker.settle()
    assert broker.fault is None
    broker.on_producer_error(REFUSED)
    assert broker.fault == "b:9092 refuses the producer (wrong password)"
    broker.on_producer_statistics(json.dumps({"brokers": UP}))
    assert broker.fault is None


@pytest.mark.parametrize("transactional", [False, True], ids=["at-least-once", "exactly-once"])
def test_handshake_that_breaks_off_is_waited_for(
    behind: BehindProxy, make_bench: MakeBench, encoder: LatentEncoder, settings: Settings, events: Events, transactional: bool
) -> None:
    """The worker is not ready while handshakes break off, logs one warning, and serves requests afterwards."""
    bench = make_bench(servers=behind.bootstrap_servers)
    changes = login(behind) | ({"kafka_transactional_id": f"{bench.group}-worker"} if transactional else {})
    with bench.worker(encoder, bench.settings(settings, **changes)) as worker:
        bench.send({"request_id": "before"})
        read_responses(bench.responses, 1)
        behind.proxy.break_logins()
        wait_until(lambda: bool(events("login refused, waiting for it")), "the warning")
        wait_until(lambda: not worker.handler.health.ready().ok, "not ready")
        bench.send({"request_id": "meanwhile"})
        time.sleep(5)  # handshakes break off for some seconds
        assert worker.is_alive()
        behind.proxy.let_through()
        assert [response["request_id"] for response in read_responses(bench.responses, 2)] == ["before", "meanwhile"]
        wait_until(lambda: worker.handler.health.ready().ok, "ready")
    assert len(events("login refused, waiting for it")) == 1


def test_password_that_stays_wrong_ends_the_service(
    behind: BehindProxy, make_bench: MakeBench, encoder: LatentEncoder, settings: Settings
) -> None:
    """A password that is changed on the broker alone ends the worker after KAFKA_AUTH_TIMEOUT_S."""
    bench = make_bench(servers=behind.bootstrap_servers)

    def set_password(password: str) -> None:
        info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        change = UserScramCredentialUpsertion("changing", info, password.encode())
        bench.admin.alter_user_scram_credentials([change])["changing"].result()

    set_password("right-secret")
    changes = login(behind, kafka_sasl_username="changing", kafka_sasl_password=SecretStr("right-secret"))
    with bench.worker(encoder, bench.settings(settings, **changes, kafka_auth_timeout_s=4)) as worker:
        wait_until(lambda: worker.handler.health.ready().ok, "ready")
        set_password("other-secret")
        behind.proxy.break_logins()
        behind.proxy.let_through()
        wait_until(lambda: "uthentication" in worker.handler.health.ready().parts["broker"], "the refusal")
        assert worker.is_alive()
        failure = worker.failure()
    assert isinstance(failure, KafkaFailed)
    assert "refuses this service" in str(failure)
    assert "secret" not in str(failure)


class TokenEndpoint(HTTPServer):
    """An endpoint that gives out unsigned tokens, and can be away."""

    LIFETIME_S = 20
    """Lifetime of a token. librdkafka asks for the next one when four of these seconds are left."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _TokenHandler)
        self.away = False
        self.expirations: list[int] = []
        """Times, in seconds since 1970, at which the tokens that were given out expire."""
        self.url = f"http://127.0.0.1:{self.server_port}/token"


class _TokenHandler(BaseHTTPRequestHandler):
    server: TokenEndpoint

    def do_POST(self) -> None:
        now = int(time.time())
        expires = now + TokenEndpoint.LIFETIME_S
        parts = ({"alg": "none"}, {"sub": "service", "iat": now, "exp": expires, "scope": []})
        encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
        body = json.dumps({"access_token": ".".join([*encoded, ""]), "token_type": "bearer", "expires_in": 20}).encode()
        if not self.server.away:
            self.server.expirations.append(expires)
        self.send_response(503 if self.server.away else 200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b"" if self.server.away else body)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@contextmanager
def token_endpoint() -> Iterator[TokenEndpoint]:
    with TokenEndpoint() as endpoint:
        threading.Thread(target=endpoint.serve_forever, daemon=True).start()
        yield endpoint
        endpoint.shutdown()


def test_token_endpoint_that_is_away_is_waited_for(
    behind: BehindProxy, make_bench: MakeBench, encoder: LatentEncoder, settings: Settings, events: Events
) -> None:
    """The worker is ready as long as its token is good, waits for the next one after that, and goes on when it has it."""
    bench: Bench = make_bench(servers=behind.bootstrap_servers)
    with token_endpoint() as endpoint:
        config = client_config(
            bench.folder,
            sasl_oauthbearer_method="oidc",
            sasl_oauthbearer_client_id="service",
            sasl_oauthbearer_client_secret="endpoint-secret",  # noqa: S106  # the endpoint does not look at it
            sasl_oauthbearer_token_endpoint_url=endpoint.url,
        )
        changes = login(behind, kafka_sasl_mechanism="OAUTHBEARER", kafka_sasl_username=None, kafka_sasl_password=None)
        with bench.worker(encoder, bench.settings(settings, **changes, kafka_client_config=config)) as worker:
            wait_until(lambda: worker.handler.health.ready().ok, "ready")
            endpoint.away = True
            wait_until(lambda: bool(events("login refused, waiting for it")), "the warning")
            wait_until(lambda: not worker.handler.health.ready().ok, "the end of the token")
            assert time.time() >= min(endpoint.expirations)
            bench.send({"request_id": "meanwhile"})
            endpoint.away = False
            read_responses(bench.responses, 1)
    assert worker.outcome is True
    assert len(events("login refused, waiting for it")) == 1
