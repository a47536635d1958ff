"""Brokers with authentication: TLS, passwords, access rules. A refusal stops the worker, and no secret is logged."""

from __future__ import annotations

import pytest
from confluent_kafka.admin._acl import AclBinding, AclOperation, AclPermissionType
from confluent_kafka.admin._resource import ResourcePatternType, ResourceType
from pydantic import SecretStr

from config import Settings
from errors import KafkaFailed
from service import LatentEncoder
from tests.broker import ApacheKafka, Broker
from tests.helpers import RunMain
from tests.kafka_tools import Bench, Events, as_environment, read_responses, sasl_settings, wait_until


@pytest.fixture
def secure(broker: Broker) -> ApacheKafka:
    """Return the session's broker, if it has a listener with passwords."""
    if not isinstance(broker, ApacheKafka):
        pytest.skip(f"{broker.name} has no listener that asks for a password")
    return broker


def test_passwords_and_tls(secure: ApacheKafka, bench: Bench) -> None:
    """A request is served over SASL_SSL, and the log has no password even at level DEBUG."""
    bench.send({"request_id": "r"})
    with bench.process(**as_environment(sasl_settings(secure)), LOG_LEVEL="DEBUG") as process:
        assert read_responses(bench.responses, 1)[0]["status"] == "success"
    assert secure.password not in process.log_file.read_text()


def test_client_certificate(secure: ApacheKafka, bench: Bench, encoder: LatentEncoder, settings: Settings) -> None:
    """A request is served by a broker that demands our certificate."""
    changes = {
        "kafka_bootstrap_servers": secure.mutual_tls_bootstrap_servers,
        "kafka_security_protocol": "SSL",
        "kafka_ssl_ca_location": secure.ca_file,
        "kafka_ssl_certificate_location": secure.client_certificate,
        "kafka_ssl_key_location": secure.client_key,
    }
    with bench.worker(encoder, bench.settings(settings, **changes)):
        bench.send({"request_id": "r"})
        assert read_responses(bench.responses, 1)[0]["status"] == "success"


def test_wrong_password_ends_the_service(secure: ApacheKafka, bench: Bench) -> None:
    """The worker stops with status 3 and one message without the password, and nothing is consumed."""
    bench.send({"request_id": "r"})
    with bench.process(**as_environment(sasl_settings(secure, "wrong-secret"))) as process:
        assert process.end() == 3
    last = process.log()[-1]["event"]
    assert last.startswith(f"Error: The broker at {secure.secure_bootstrap_servers} refuses this service: ")
    text = process.log_file.read_text()
    assert "wrong-secret" not in text
    assert "Traceback" not in text
    assert bench.committed() == {}


def test_wrong_password_ends_a_replay(secure: ApacheKafka, bench: Bench, run_main: RunMain) -> None:
    """The error is a refused access, not an unreachable broker."""
    environment = as_environment(sasl_settings(secure, "wrong-secret")) | {"KAFKA_DLQ_TOPIC": bench.dlq_topic}
    done = run_main("--mode", "dlq-replay", env=environment)
    assert done.returncode == 3
    assert done.stderr.startswith(f"Error: The broker at {secure.secure_bootstrap_servers} refuses this service: ")
    assert "wrong-secret" not in done.stderr


def test_certificate_that_is_not_trusted_is_waited_for(
    secure: ApacheKafka, bench: Bench, encoder: LatentEncoder, settings: Settings, events: Events
) -> None:
    """It counts as a broker that is away, logged once with the reason, because certificates are renewed."""
    changes = {"kafka_bootstrap_servers": secure.secure_bootstrap_servers, "kafka_security_protocol": "SSL"}
    with bench.worker(encoder, bench.settings(settings, **changes)):
        wait_until(lambda: bool(events("broker is away, waiting for it")), "the message")
    (event,) = events("broker is away, waiting for it")
    assert "certificate verify failed" in event["reason"]


@pytest.mark.parametrize("topic", ["response_topic", "dlq_topic"])
def test_topic_that_may_not_be_written_ends_the_service(
    secure: ApacheKafka, bench: Bench, encoder: LatentEncoder, settings: Settings, topic: str
) -> None:
    """No request without a response is committed."""
    name = getattr(bench, topic)
    rule = AclBinding(
        ResourceType.TOPIC,
        name,
        ResourcePatternType.LITERAL,
        f"User:{secure.username}",
        "*",
        AclOperation.WRITE,
        AclPermissionType.DENY,
    )
    everything_else = AclBinding(
        ResourceType.TOPIC, name, ResourcePatternType.LITERAL, "User:*", "*", AclOperation.ALL, AclPermissionType.ALLOW
    )
    for created in bench.admin.create_acls([rule, everything_else]).values():
        created.result()
    changes = sasl_settings(secure) | {"kafka_sasl_password": SecretStr(secure.password)}
    with bench.worker(encoder, bench.settings(settings, **changes)) as worker:
        bench.send({"request_id": "r"} if topic == "response_topic" else b"not JSON")
        failure = worker.failure()
    assert isinstance(failure, KafkaFailed)
    assert "TOPIC_AUTHORIZATION_FAILED" in str(failure)
    assert name in str(failure)
    assert bench.committed() == {}
