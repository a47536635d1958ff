"""librdkafka's properties: the fixed ones, the ones that can be given, and secrets that stay secret."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer

from config import Settings, SettingsError
from latent_encoder.kafka.properties import (
    CLASSIC_ONLY,
    REFUSED,
    SMALL_FETCHES,
    admin_properties,
    consumer_properties,
    make_client,
    member_properties,
    overridden_properties,
    producer_properties,
)
from tests.helpers import RunMain

SECRET = "hunter2-hunter2"  # noqa: S105


def settings(**given: Any) -> Settings:
    return Settings(_env_file=None, **given)


def properties_file(folder: Path, text: str) -> Path:
    file = folder / "client.properties"
    file.write_text(text)
    return file


def test_guarantees_are_set() -> None:
    """Nothing is committed or stored by itself; responses are idempotent, acknowledged by all, and never given up."""
    consumer, producer = consumer_properties(settings()), producer_properties(settings())
    assert {name: consumer[name] for name in REFUSED if name in consumer} == {
        "bootstrap.servers": "localhost:9092",
        "group.id": "latent-encoder-group",
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "earliest",
        "isolation.level": "read_committed",
        "partition.assignment.strategy": "cooperative-sticky",
        "allow.auto.create.topics": False,
        "statistics.interval.ms": 1000,
    }
    assert {name: producer[name] for name in REFUSED if name in producer} == {
        "bootstrap.servers": "localhost:9092",
        "enable.idempotence": True,
        "acks": "all",
        "message.max.bytes": 1_000_000_000,
        "message.timeout.ms": 0,
    }
    transactional = producer_properties(settings(kafka_transactional_id="worker-1"))
    assert transactional["transactional.id"] == "worker-1"
    assert "message.timeout.ms" not in transactional


def test_security_settings_reach_every_client(tmp_path: Path) -> None:
    """They have librdkafka's names; a secret is passed on and not shown in the settings."""
    given = settings(
        kafka_security_protocol="sasl_ssl",
        kafka_sasl_mechanism="SCRAM-SHA-512",
        kafka_sasl_username="service",
        kafka_sasl_password=SECRET,
        kafka_ssl_ca_location=tmp_path / "ca.pem",
        kafka_ssl_certificate_location=tmp_path / "cert.pem",
        kafka_ssl_key_location=tmp_path / "key.pem",
        kafka_ssl_key_password=SECRET,
    )
    expected = {
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": "service",
        "sasl.password": SECRET,
        "ssl.ca.location": str(tmp_path / "ca.pem"),
        "ssl.certificate.location": str(tmp_path / "cert.pem"),
        "ssl.key.location": str(tmp_path / "key.pem"),
        "ssl.key.password": SECRET,
    }
    for properties in (consumer_properties(given), producer_properties(given), admin_properties(given)):
        assert expected.items() <= properties.items()
    assert SECRET not in repr(given) + str(given)


def test_file_gives_any_other_property(tmp_path: Path) -> None:
    """A value is taken unchanged, comments and blank lines are left out, and a setting of its own wins."""
    text = "# tuned\nsocket.keepalive.enable = true\n\nsasl.password=a=b #c;%d\nsasl.username=file\nclient.id=Mine\n"
    given = settings(kafka_client_config=properties_file(tmp_path, text), kafka_sasl_username="setting")
    for properties in (consumer_properties(given), producer_properties(given)):
        assert properties["socket.keepalive.enable"] == "true"
        assert properties["sasl.password"] == "a=b #c;%d"
        assert properties["sasl.username"] == "setting"
        assert properties["client.id"] == "Mine"


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_property_that_would_break_the_guarantees_is_refused(name: str, tmp_path: Path) -> None:
    """The error has the name of the property and the reason."""
    file = properties_file(tmp_path, f"client.id=x\n{name}=1\n")
    with pytest.raises(SettingsError, match=rf"KAFKA_CLIENT_CONFIG: .* may not set {name} \(.+\)"):
        consumer_properties(settings(kafka_client_config=file))


def test_group_protocol_and_static_membership_are_the_workers_alone() -> None:
    """A member has both properties, librdkafka takes them, and the readers of tools have neither, nor small fetches."""
    given = settings(kafka_group_protocol="consumer", kafka_group_instance_id="worker-0")
    member, reader = member_properties(given), consumer_properties(given)
    own = {"group.protocol": "consumer", "group.instance.id": "worker-0"}
    without = {"partition.assignment.strategy"}
    assert member == {name: value for name, value in reader.items() if name not in without} | SMALL_FETCHES | own
    make_client(Consumer, member, given).close()
    assert member_properties(settings()) == consumer_properties(settings()) | SMALL_FETCHES


@pytest.mark.parametrize("name", sorted(CLASSIC_ONLY))
def test_property_of_the_classic_protocol_is_refused_with_the_other(name: str, tmp_path: Path) -> None:
    """The error has the names of the file, the property and the setting; with the classic protocol it is allowed."""
    value = "consumer" if name == "group.protocol.type" else "3000"
    file = properties_file(tmp_path, f"{name}={value}\n")
    expected = rf"KAFKA_CLIENT_CONFIG: {file} may not set {name} \(.+\) together with KAFKA_GROUP_PROTOCOL=consumer"
    with pytest.raises(SettingsError, match=expected):
        member_properties(settings(kafka_client_config=file, kafka_group_protocol="consumer"))
    classic = settings(kafka_client_config=file)
    make_client(Consumer, member_properties(classic), classic).close()


def test_assignor_of_the_broker_can_be_chosen(tmp_path: Path) -> None:
    """The assignor is a property of the protocol `consumer`, and librdkafka takes it."""
    file = properties_file(tmp_path, "group.remote.assignor=range\n")
    given = settings(kafka_client_config=file, kafka_group_protocol="consumer")
    make_client(Consumer, member_properties(given), given).close()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no equals sign", "is not a file of name=value lines"),
        ("a=1\na=2", "is not a file of name=value lines"),
        (None, "cannot be read"),
    ],
)
def test_file_that_cannot_be_used_is_named(text: str | None, reason: str, tmp_path: Path) -> None:
    """A file that is broken, ambiguous or missing is an error that names it."""
    file = tmp_path / "none.properties" if text is None else properties_file(tmp_path, text)
    with pytest.raises(SettingsError, match=f"KAFKA_CLIENT_CONFIG: {file} {reason}"):
        producer_properties(settings(kafka_client_config=file))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("client.id=x\n  client.rack=y", "line 2: begins with a space; a value cannot go on in the next line"),
        ("client.id=x\n\tclient.rack=y", "line 2: begins with a space"),
        ("[consumer]\nclient.id=x", r"line 1: sections in \[brackets\] are not known"),
        ("; a comment", "line 1: a comment begins with #, not with ;"),
        ("! a comment", "line 1: a comment begins with #, not with !"),
        ("client.id: x", "line 1: has no ="),
        ("=x", "line 1: the part before = is no property"),
        ("Client.Id=x", "line 1: Client.Id is no property: names have lower-case letters"),
        ("SGVsbG8K==", "line 1: the part before = is no property"),
        ("client.id=x\n# again\nclient.id=x", "line 3: client.id was set in line 1"),
        ("sasl.mechanism=PLAIN\nsasl.mechanisms=GSSAPI", "line 2: sasl.mechanisms was set in line 1"),
        ("client.id=", "line 1: client.id has no value"),
        ("client.id=x \\\n", "line 1: client.id ends with a backslash"),
        ("client.id=x # mine", "line 1: client.id has a comment behind its value"),
        ("client.id=x ; mine", "line 1: client.id has a comment behind its value"),
        ("client.id=x\0y", "line 1: has a control character"),
        ("client.id=x\rclient.rack=y", "line 1: has a control character"),
        ("max.poll.interval.ms=300s", "line 1: max.poll.interval.ms must be a whole number without a unit"),
        ("max.poll.interval.ms=300000.5", "line 1: max.poll.interval.ms must be a whole number"),
        ("max.poll.interval.ms=4295267296", "line 1: max.poll.interval.ms must be a whole number without a unit, at most"),
        ("session.timeout.ms=0x10", "line 1: session.timeout.ms must be a whole number"),
        ("session.timeout.ms=45_000", "line 1: session.timeout.ms must be a whole number"),
        ("x\n" * 5, "line 1: has no =; line 2: has no =; line 3: has no =; and 2 more"),
    ],
)
def test_no_line_is_left_out_or_read_in_another_way(text: str, reason: str, tmp_path: Path) -> None:
    """A line that is no `name=value`, or whose value would be read differently, is refused with its number and the reason."""
    file = properties_file(tmp_path, text)
    with pytest.raises(SettingsError, match=rf"^KAFKA_CLIENT_CONFIG: {file} .*: {reason}"):
        consumer_properties(settings(kafka_client_config=file))


def test_lines_that_are_read(tmp_path: Path) -> None:
    """A byte order mark, Windows' line ends, spaces around a name, indented comments and a missing last newline are fine."""
    file = tmp_path / "client.properties"
    file.write_bytes("\ufeffclient.id = Mine \r\n\r\n  # indented\r\nlinger.ms=0.5\nclient.rack=ä=b\u2028c".encode())
    properties = producer_properties(settings(kafka_client_config=file))
    assert (properties["client.id"], properties["linger.ms"], properties["client.rack"]) == ("Mine", "0.5", "ä=b\u2028c")


def test_property_that_a_setting_overrides_is_told(tmp_path: Path) -> None:
    """The setting wins, also over the other name of its property, and the property can be reported."""
    file = properties_file(tmp_path, "sasl.mechanisms=GSSAPI\nsasl.username=same\n")
    given = settings(kafka_client_config=file, kafka_sasl_mechanism="plain", kafka_sasl_username="same")
    assert "sasl.mechanisms" not in consumer_properties(given)
    assert overridden_properties(given) == ["sasl.mechanisms"]


def test_line_of_a_refused_property_is_named(tmp_path: Path) -> None:
    """The message has the file, the line and the property, and not the value."""
    file = properties_file(tmp_path, f"client.id=x\nsecurity.protocol={SECRET}\n")
    given = settings(kafka_client_config=file)
    with pytest.raises(SettingsError, match=rf"security.protocol, line 2 of KAFKA_CLIENT_CONFIG={file}\)") as caught:
        make_client(Consumer, consumer_properties(given), given)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("line", ["no.such.property=1", "session.timeout.ms=long", "compression.codec=rar"])
def test_property_that_librdkafka_refuses_is_named(line: str, tmp_path: Path) -> None:
    """The message names the property and has no traceback."""
    given = settings(kafka_client_config=properties_file(tmp_path, line))
    with pytest.raises(SettingsError, match=f"Kafka client: .*{line.split('=', maxsplit=1)[0]}"):
        make_client(Producer, producer_properties(given), given)


def test_secret_in_librdkafkas_message_is_masked(tmp_path: Path) -> None:
    """A password in the place of another property, for example after a slip of a line, is masked."""
    file = properties_file(tmp_path, f"security.protocol={SECRET}\n")
    given = settings(kafka_client_config=file, kafka_sasl_password=SECRET)
    with pytest.raises(SettingsError) as caught:
        make_client(Consumer, consumer_properties(given), given)
    assert SECRET not in str(caught.value)
    assert "security.protocol" in str(caught.value)


def test_wrong_property_is_wrong_usage(run_main: RunMain, tmp_path: Path) -> None:
    """Kafka mode ends before ComfyUI is loaded, with status 2, one message and no traceback."""
    file = properties_file(tmp_path, "enable.auto.commit=true\n")
    done = run_main("--mode", "kafka", env={"KAFKA_CLIENT_CONFIG": str(file)})
    assert done.returncode == 2
    assert "may not set enable.auto.commit" in done.stderr
    assert "Traceback" not in done.stderr


def test_topics_must_differ(run_main: RunMain) -> None:
    """Otherwise the worker would take its own responses for requests."""
    done = run_main("--mode", "kafka", "--request-topic", "same", "--response-topic", "same")
    assert done.returncode == 2
    assert "KAFKA_REQUEST_TOPIC, KAFKA_RESPONSE_TOPIC, KAFKA_DLQ_TOPIC: must be three different topics" in done.stderr
