"""Dockerfile, Compose file and Kubernetes manifests: that they agree with the settings, with each other and with the files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from config import Settings
from kafka_topics import DLQ_CONFIG, topics_of

PROJECT = Path(__file__).resolve().parent.parent
COMPOSE = yaml.safe_load((PROJECT / "docker-compose.yml").read_text(encoding="utf-8"))
MANIFESTS = list(yaml.safe_load_all((PROJECT / "deploy" / "kubernetes.yaml").read_text(encoding="utf-8")))
# Continuation lines joined, comments left out.
DOCKERFILE = [
    shlex.split(line, comments=True)
    for line in (PROJECT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]

DEFAULTS = Settings.model_construct()


def manifest(kind: str) -> Any:
    """The only manifest of its kind."""
    (found,) = [each for each in MANIFESTS if each["kind"] == kind]
    return found


def instructions(name: str) -> Iterator[list[str]]:
    return (words[1:] for words in DOCKERFILE if words[0] == name)


def without_shell(value: str) -> str:
    """What Compose makes of `${NAME:-default}` where the variable is not set."""
    return re.sub(r"\$\{\w+:?-(.*?)\}", r"\1", value)


def dockerfile_environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for words in instructions("ENV") for pair in words)


def compose_environment() -> dict[str, str]:
    given: dict[str, str] = COMPOSE["services"]["latent-encoder"]["environment"]
    return {name: without_shell(value) for name, value in given.items()}


def kubernetes_environment() -> dict[str, str]:
    (container,) = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    own = {variable["name"]: variable.get("value", "from elsewhere") for variable in container.get("env", [])}
    return {**manifest("ConfigMap")["data"], **manifest("Secret")["stringData"], **own}


ENVIRONMENTS = {
    "Dockerfile": dockerfile_environment(),
    "docker-compose.yml": compose_environment(),
    "kubernetes.yaml": kubernetes_environment(),
}


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The settings that an environment makes, whatever else is set here."""

    def settings_of(environment: dict[str, str]) -> Settings:
        for name in Settings.model_fields:
            monkeypatch.delenv(name.upper(), raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return Settings(_env_file=None)

    return settings_of


@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_every_variable_is_a_setting_and_loads(environment: dict[str, str], settings_of: Any) -> None:
    """Each variable is a setting's name in capitals, and its value is one that the setting takes."""
    assert environment
    assert [name for name in environment if name.lower() not in Settings.model_fields or name != name.upper()] == []
    assert settings_of(environment).model_fields_set == {name.lower() for name in environment}


def test_containers_serve_kafka(settings_of: Any) -> None:
    """Compose and Kubernetes start Kafka mode, and Compose at the listener that its broker has for containers."""
    compose, kubernetes = (settings_of(ENVIRONMENTS[name]) for name in ("docker-compose.yml", "kubernetes.yaml"))
    assert (compose.mode, kubernetes.mode) == ("kafka", "kafka")
    advertised = COMPOSE["services"]["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    assert f"//{compose.kafka_bootstrap_servers}," in advertised
    assert f"//{DEFAULTS.kafka_bootstrap_servers}" in advertised


def created_topics() -> dict[str, dict[str, str]]:
    """The topics that Compose creates, each with its configuration."""
    (script,) = COMPOSE["services"]["topics"]["command"]
    calls = [shlex.split(line)[1:] for line in script.splitlines() if line.startswith("create ")]
    return {name: dict(option.split("=") for option in options if option != "--config") for name, *options in calls}


def test_compose_creates_the_topics_of_the_settings() -> None:
    """The three default names, and for the dead letters what the service itself would configure."""
    assert created_topics() == {name: DLQ_CONFIG if name == DEFAULTS.kafka_dlq_topic else {} for name in topics_of(DEFAULTS)}


def test_keda_scales_by_the_requests_of_the_settings(settings_of: Any) -> None:
    """Brokers, topic and group of the trigger are those of the workers, and all of its values are strings."""
    settings = settings_of(ENVIRONMENTS["kubernetes.yaml"])
    (trigger,) = manifest("ScaledObject")["spec"]["triggers"]
    metadata = trigger["metadata"]
    assert metadata["bootstrapServers"] == settings.kafka_bootstrap_servers
    assert metadata["topic"] == settings.kafka_request_topic == DEFAULTS.kafka_request_topic
    assert metadata["consumerGroup"] == settings.kafka_consumer_group == DEFAULTS.kafka_consumer_group
    assert [name for name, value in metadata.items() if not isinstance(value, str)] == []


def test_no_more_workers_than_partitions() -> None:
    """KEDA's maximum, the partitions that Compose creates and those that the service creates are one number."""
    (script,) = COMPOSE["services"]["topics"]["command"]
    partitions = [int(number) for number in re.findall(r"--partitions (\d+)", script)]
    assert partitions == [manifest("ScaledObject")["spec"]["maxReplicaCount"]] == [DEFAULTS.kafka_topic_partitions]


def test_grace_periods_exceed_the_shutdown_timeout() -> None:
    """Nobody kills a worker before it gave up by itself."""
    compose = int(COMPOSE["services"]["latent-encoder"]["stop_grace_period"].removesuffix("s"))
    kubernetes = manifest("Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert min(compose, kubernetes) > DEFAULTS.shutdown_timeout_s


def test_manifests_refer_to_what_is_there() -> None:
    """Names of ConfigMap, Secret, volumes and Deployment, and the labels by which pods are found, match."""
    pod = manifest("Deployment")["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    sources = {next(iter(source.values()))["name"] for source in container["envFrom"]}
    secret = manifest("Secret")
    assert sources == {manifest("ConfigMap")["metadata"]["name"], secret["metadata"]["name"]}
    for reference in manifest("TriggerAuthentication")["spec"]["secretTargetRef"]:
        assert reference["name"] == secret["metadata"]["name"]
        assert reference["key"] in secret["stringData"]
    claims = {each["metadata"]["name"] for each in MANIFESTS if each["kind"] == "PersistentVolumeClaim"}
    assert claims == {volume["persistentVolumeClaim"]["claimName"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["spec"]["volumes"]}
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert manifest(kind)["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    scaled = manifest("ScaledObject")["spec"]
    assert scaled["scaleTargetRef"]["name"] == manifest("Deployment")["metadata"]["name"]
    assert scaled["triggers"][0]["authenticationRef"]["name"] == manifest("TriggerAuthentication")["metadata"]["name"]


@pytest.mark.parametrize("name", ["docker-compose.yml", "kubernetes.yaml"])
def test_folders_of_the_settings_are_mounted(name: str, settings_of: Any) -> None:
    """Models come from a volume that cannot be written, and answers go to one that can."""
    (container,) = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    volumes = COMPOSE["services"]["latent-encoder"]["volumes"]
    writable = {
        "docker-compose.yml": {volume["target"]: not volume.get("read_only") for volume in volumes},
        "kubernetes.yaml": {mount["mountPath"]: not mount.get("readOnly") for mount in container["volumeMounts"]},
    }[name]
    settings = settings_of(ENVIRONMENTS[name])
    assert writable == {str(settings.model_dir): False, "/data": False, settings.output_dir: True}


def test_copied_paths_exist_and_reach_the_builder() -> None:
    """All that the Dockerfile copies is in the project, and `.dockerignore` excludes nothing of it."""
    sources = [source for *copied, _ in instructions("COPY") for source in copied]
    assert [source for source in sources if not list(PROJECT.glob(source))] == []
    excluding, *sent = [line for line in (PROJECT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert excluding == "*"
    assert {f"!{source}" for source in sources} == {line for line in sent if line.startswith("!")}


def test_image_has_all_that_setting_up_reads() -> None:
    """What `setup_comfyui.sh` names of the project is copied before it runs, and the code after it."""
    steps = [(words[0], " ".join(words[1:])) for words in DOCKERFILE]
    (run,) = [number for number, (name, text) in enumerate(steps) if name == "RUN" and "./setup_comfyui.sh" in text]
    before = [source.rstrip("/") for name, text in steps[:run] if name == "COPY" for source in text.split()[:-1]]
    script = (PROJECT / "setup_comfyui.sh").read_text(encoding="utf-8")
    read = set(re.findall(r"\$project/([\w.-]+)", script)) - {".venv", "comfyui", "tests"}
    assert read | {"setup_comfyui.sh"} == set(before)


def test_entry_point_is_what_setting_up_makes() -> None:
    """Python in the environment beside the code, by its absolute path and without a shell."""
    (folder,) = instructions("WORKDIR")
    (text,) = re.findall(r"^ENTRYPOINT (.*)$", (PROJECT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert yaml.safe_load(text) == [f"{folder[0]}/.venv/bin/python", "main.py"]
