"""The commands of docs/kafka.md for topics and access rules: with these rules the service works, and with none less."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin._acl import AclBindingFilter, AclOperation, AclPermissionType
from confluent_kafka.admin._config import ConfigResource
from confluent_kafka.admin._resource import ResourcePatternType, ResourceType
from pydantic import SecretStr

from config import Settings
from errors import KafkaFailed
from service import LatentEncoder
from tests.broker import ApacheKafka
from tests.broker.maven import class_path, java_and_maven_are_here
from tests.helpers import PROJECT, RunMain
from tests.kafka_tools import Bench, MakeBench, as_environment, read_responses, sasl_settings, wait_until

pytestmark = pytest.mark.skipif(not java_and_maven_are_here(), reason="needs Java 17 or newer and Maven")

PAGE = (PROJECT / "docs" / "kafka.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("\n## Topics and access rules\n")[2].partition("\n## ")[0]
TOPICS, WORKER, TRANSACTIONS, CREATION, REPLAY = re.findall(r"^```console\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
RULE = WORKER[: WORKER.index("}\n") + 2]
"""The shell function that the blocks after the worker's use, too."""

TOOLS = {"kafka-topics.sh": "org.apache.kafka.tools.TopicCommand", "kafka-acls.sh": "org.apache.kafka.tools.AclCommand"}

Shell = Callable[[str, Bench], None]


@pytest.fixture(scope="module")
def strict() -> Iterator[ApacheKafka]:
    """Provide a broker that refuses users everything that no rule allows; only clients without a name may do anything."""
    with ApacheKafka(properties={"allow.everyone.if.no.acl.found": "false"}) as broker:
        yield broker


@pytest.fixture
def shell(strict: ApacheKafka, tmp_path: Path) -> Shell:
    """Return a function that runs commands of the page, with the broker, the user and the topics of a test."""
    tools = tmp_path / "kafka"
    tools.mkdir()
    for name, main_class in TOOLS.items():
        script = tools / name
        script.write_text(f'#!/bin/sh\nexec java -XX:TieredStopAtLevel=1 -cp "{class_path()}" {main_class} "$@"\n')
        script.chmod(0o755)

    def run(commands: str, bench: Bench) -> None:
        names = {
            "latent-encoder-requests-dlq": bench.dlq_topic,
            "latent-encoder-requests": bench.request_topic,
            "latent-encoder-responses": bench.response_topic,
            "latent-encoder-group": bench.group,
            "User:latent-encoder": f"User:{strict.username}",
            "--transactional-id latent-encoder": f"--transactional-id {bench.group}",
            "--topic latent-encoder": f"--topic {bench.group.removesuffix('group')}",
            "kafka:9092": strict.bootstrap_servers,
            "--replication-factor 3": "--replication-factor 1",
        }
        for name, own in names.items():
            commands = commands.replace(name, own)
        environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-euc", commands],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout

    return run


@pytest.fixture
def credentials(strict: ApacheKafka) -> dict[str, Any]:
    """Return the settings of a worker that is a process."""
    return sasl_settings(strict)


@pytest.fixture
def login(strict: ApacheKafka) -> dict[str, Any]:
    """Return the settings of a worker in this process."""
    return sasl_settings(strict) | {"kafka_sasl_password": SecretStr(strict.password)}


def test_worker_and_replay_work_with_the_rules(
    strict: ApacheKafka, make_bench: MakeBench, shell: Shell, credentials: dict[str, Any], run_main: RunMain
) -> None:
    """The topics of the page and the rules of the page suffice for a request, a dead letter, and its replay."""
    bench = make_bench(partitions=8, create=False, servers=strict.bootstrap_servers)
    shell(TOPICS, bench)
    shell(WORKER + TRANSACTIONS + REPLAY, bench)
    environment = as_environment(credentials) | {"KAFKA_TRANSACTIONAL_ID": f"{bench.group}-0"}
    with bench.process(**environment) as worker:
        bench.send({"request_id": "good"})
        assert read_responses(bench.responses, 1)[0]["status"] == "success"
        bench.send(b"not JSON")
        bench.dead_letters.take(1)
        topics = {
            "KAFKA_DLQ_TOPIC": bench.dlq_topic,
            "KAFKA_CONSUMER_GROUP": bench.group,
            "KAFKA_REQUEST_TOPIC": bench.request_topic,
        }
        done = run_main("--mode", "dlq-replay", "--error-code", "MESSAGE_UNUSABLE", env=as_environment(credentials) | topics)
        assert done.returncode == 0, done.stderr
        bench.dead_letters.take(2)
        assert worker.popen.poll() is None
    resource = ConfigResource(ConfigResource.Type.TOPIC, bench.dlq_topic)
    limits = bench.admin.describe_configs([resource])[resource].result()
    assert {name: limits[name].value for name in ("retention.ms", "max.message.bytes", "min.insync.replicas")} == {
        "retention.ms": "-1",
        "max.message.bytes": "10485760",
        "min.insync.replicas": "2",
    }


def test_topics_are_created_with_the_rule_for_it(
    strict: ApacheKafka,
    make_bench: MakeBench,
    encoder: LatentEncoder,
    settings: Settings,
    shell: Shell,
    login: dict[str, Any],
) -> None:
    """With the rule, a worker creates the topics and serves a request; without it, it ends with a line that names one."""
    bench = make_bench(partitions=1, create=False, servers=strict.bootstrap_servers)
    shell(WORKER, bench)
    changes = login | {"kafka_create_topics": True, "kafka_topic_partitions": 1}
    with bench.worker(encoder, bench.settings(settings, **changes)) as worker:
        failure = worker.failure()
    assert isinstance(failure, KafkaFailed)
    assert re.search(
        rf"Topic {bench.request_topic.removesuffix('requests')}\S+ cannot be created: Authorization", str(failure)
    )
    shell(RULE + CREATION, bench)
    with bench.worker(encoder, bench.settings(settings, **changes)):
        wait_until(lambda: bench.request_topic in bench.admin.list_topics(timeout=10).topics, "the topics")
        bench.send({"request_id": "r"})
        assert read_responses(bench.responses, 1)[0]["status"] == "success"


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_each_rule_is_needed(
    strict: ApacheKafka,
    make_bench: MakeBench,
    encoder: LatentEncoder,
    settings: Settings,
    shell: Shell,
    login: dict[str, Any],
    protocol: str,
) -> None:
    """Without one of the rules the worker ends with a line that names the refused thing, and commits nothing."""
    bench = make_bench(servers=strict.bootstrap_servers)
    shell(WORKER + TRANSACTIONS, bench)
    changes = login | {"kafka_group_protocol": protocol}
    transactional: dict[str, str] = {"kafka_transactional_id": f"{bench.group}-0"}
    bench.send({"request_id": "r"})

    def failure_without(kind: ResourceType, name: str, operation: AclOperation, **own: str) -> str:
        """Return the error with which a worker ends while there is no rule for that operation."""
        any_pattern, user = ResourcePatternType.ANY, f"User:{strict.username}"
        rules = AclBindingFilter(kind, name, any_pattern, user, "*", operation, AclPermissionType.ALLOW)
        taken = bench.admin.delete_acls([rules])[rules].result()
        assert len(taken) == 1
        with bench.worker(encoder, bench.settings(settings, **changes | own)) as worker:
            failure = worker.failure()
        for restored in bench.admin.create_acls(taken).values():
            restored.result()
        assert isinstance(failure, KafkaFailed)
        return str(failure)

    topic, group = ResourceType.TOPIC, ResourceType.GROUP
    for name in (bench.request_topic, bench.response_topic, bench.dlq_topic):
        operation = AclOperation.READ if name == bench.request_topic else AclOperation.WRITE
        assert f"Topic {name} cannot be looked for: " in failure_without(topic, name, operation)
    for own in ({}, transactional):
        assert f"in group {bench.group}: " in failure_without(group, bench.group, AclOperation.READ, **own)
    failure = failure_without(ResourceType.TRANSACTIONAL_ID, bench.group, AclOperation.WRITE, **transactional)
    assert "Transactional Id authorization failed" in failure
    assert bench.committed() == {}


def test_refused_group_is_noticed_before_the_topics_exist(
    strict: ApacheKafka,
    make_bench: MakeBench,
    encoder: LatentEncoder,
    settings: Settings,
    shell: Shell,
    login: dict[str, Any],
) -> None:
    """A worker that waits for its topics ends if its group is refused, because librdkafka reports that only once."""
    bench = make_bench(create=False, servers=strict.bootstrap_servers)
    shell("\n".join(line for line in WORKER.splitlines() if "--group" not in line), bench)
    with bench.worker(encoder, bench.settings(settings, **login)) as worker:
        failure = worker.failure()
    assert f"in group {bench.group}: " in str(failure)
