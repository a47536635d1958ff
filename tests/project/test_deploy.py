"""Dockerfile, Compose file and Kubernetes manifests: they agree with the settings, with each other and with the files."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from dotenv import dotenv_values

from config import VARIABLES, VERSION, Settings
from latent_encoder.env_file import read_env_file
from latent_encoder.installer.download_vae import QWEN_IMAGE_VAE
from latent_encoder.kafka.topics import DLQ_CONFIG, topics_of
from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.credentials import SECRET_VARIABLES
from latent_encoder.storage.locations import ObjectPath, location_of
from tests.helpers import FEWEST_FILES, OUR_FILES, PROJECT

COMPOSE = yaml.safe_load((PROJECT / "docker-compose.yml").read_text(encoding="utf-8"))
MANIFESTS = list(yaml.safe_load_all((PROJECT / "deploy" / "kubernetes.yaml").read_text(encoding="utf-8")))
WITHOUT_DISK = list(yaml.safe_load_all((PROJECT / "deploy" / "kubernetes-object-storage.yaml").read_text(encoding="utf-8")))
# Continuation lines joined, comments left out.
DOCKERFILE = [
    shlex.split(line, comments=True)
    for line in (PROJECT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]

DEFAULTS = Settings.model_construct()


def manifest(kind: str, manifests: list[Any] = MANIFESTS) -> Any:
    """Return the only manifest of its kind."""
    (found,) = [each for each in manifests if each["kind"] == kind]
    return found


def pod_without_disk() -> Any:
    """Return the template of the pods that have images and files in object storage."""
    return manifest("Deployment", WITHOUT_DISK)["spec"]["template"]


def instructions(name: str) -> Iterator[list[str]]:
    """Return the words of each instruction with that name, without options."""
    return ([word for word in words[1:] if not word.startswith("--")] for words in DOCKERFILE if words[0] == name)


def json_form(instruction: str) -> Any:
    """Return the JSON list of the only instruction that begins so and that runs without a shell."""
    text = (PROJECT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    (found,) = re.findall(rf"^{instruction}[^[\n]*(\[.*\])$", text, re.MULTILINE)
    return yaml.safe_load(found)


def copied_from_the_project() -> list[str]:
    """Return the sources that the Dockerfile copies from the project's folder, and not from another stage."""
    copied = [words for words in DOCKERFILE if words[0] == "COPY" and not words[1].startswith("--from")]
    return [source for _, *sources, _ in copied for source in sources]


def container() -> Any:
    """Return the only container of the StatefulSet's pods."""
    (found,) = manifest("StatefulSet")["spec"]["template"]["spec"]["containers"]
    return found


def without_shell(value: str) -> str:
    """Return a value as Compose expands it if no variable is set: `${NAME:-default}` becomes `default`."""
    return re.sub(r"\$\{\w+:?-(.*?)\}", r"\1", value)


def dockerfile_environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for words in instructions("ENV") for pair in words)


def compose_environment(service: str = "latent-encoder") -> dict[str, str]:
    given: dict[str, str] = COMPOSE["services"][service]["environment"]
    return {name: without_shell(value) for name, value in given.items()}


def settings_in(environment: dict[str, str]) -> dict[str, str]:
    """Return an environment without the variables that obstore reads."""
    return {name: value for name, value in environment.items() if not name.startswith(("AWS_", "AZURE_", "GOOGLE_"))}


def kubernetes_environment() -> dict[str, str]:
    own = {variable["name"]: variable.get("value", "from elsewhere") for variable in container().get("env", [])}
    return {**manifest("ConfigMap")["data"], **manifest("Secret")["stringData"], **own}


ENVIRONMENTS = {
    "Dockerfile": dockerfile_environment(),
    "docker-compose.yml": compose_environment(),
    "kubernetes.yaml": kubernetes_environment(),
    "worker-s3 of docker-compose.yml": settings_in(compose_environment("worker-s3")),
    "kubernetes-object-storage.yaml": settings_in(
        manifest("ConfigMap", WITHOUT_DISK)["data"] | manifest("Secret", WITHOUT_DISK)["stringData"]
    ),
}
IN_OBJECT_STORAGE = ("worker-s3 of docker-compose.yml", "kubernetes-object-storage.yaml")


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that loads the settings from an environment, without the variables of the test process."""

    def settings_of(environment: dict[str, str]) -> Settings:
        for name in Settings.model_fields:
            monkeypatch.delenv(name.upper(), raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return Settings(_env_file=None)

    return settings_of


@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_every_variable_is_a_setting_and_loads(environment: dict[str, str], settings_of: Any) -> None:
    """Each variable is a setting's name in capitals, and its value is valid for that setting."""
    assert environment
    assert [name for name in environment if name.lower() not in VARIABLES or name != name.upper()] == []
    assert settings_of(environment).model_fields_set == {name.lower() for name, value in environment.items() if value}


def test_containers_serve_kafka(settings_of: Any) -> None:
    """Compose and Kubernetes start Kafka mode, Compose with the listener that its broker has for containers."""
    compose, kubernetes = (settings_of(ENVIRONMENTS[name]) for name in ("docker-compose.yml", "kubernetes.yaml"))
    assert (compose.mode, kubernetes.mode) == ("kafka", "kafka")
    advertised = COMPOSE["services"]["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    assert f"//{compose.kafka_bootstrap_servers}," in advertised
    assert f"//{DEFAULTS.kafka_bootstrap_servers}" in advertised


def compose_settings(folder: Path, env_file: str) -> dict[str, str]:
    """Return the environment of Compose's worker beside a `.env` with that content.

    Compose reads the file with the rules that python-dotenv has for quotes and comments. It expands `$NAME` too, except
    between single quotes: the files here have no other `$`.
    """
    (folder / ".env").write_text(env_file)
    given = {name: value or "" for name, value in dotenv_values(folder / ".env", interpolate=False).items()}

    def expanded(value: str) -> str:
        return re.sub(r"\$\{(\w+):-(.*?)\}", lambda part: given.get(part[1]) or part[2], value)

    (entry,) = COMPOSE["services"]["latent-encoder"]["env_file"]
    assert entry == {"path": ".env", "required": False}
    own = COMPOSE["services"]["latent-encoder"]["environment"]
    return given | {name: expanded(value) for name, value in own.items()}


def test_compose_takes_every_setting_of_the_env_file(settings_of: Any, tmp_path: Path) -> None:
    """A `.env` reaches the worker whole, except for the settings that the container decides."""
    example = (PROJECT / ".env.example").read_text(encoding="utf-8")
    changed = {
        "LOG_LEVEL": "DEBUG",
        "MEGAPIXELS": "0.5",
        "CUSTOM_NODES": "a,b",
        "KAFKA_MAX_RETRIES": "7",
        "OUTPUT_TTL_DAYS": "1.5",
        "VAE_MODEL_NAME": "'my vae $5 #1.safetensors'",
        "KAFKA_CONSUMER_GROUP": "'a \"b\" $c ${d} # e'",
    }
    for name, value in changed.items():
        example, line, rest = re.split(rf"(?m)^(#{name}=.*)$", example)
        assert line
        example += f"{name}={value}{rest}"
    environment = compose_settings(tmp_path, example)
    settings = settings_of(environment)
    expected = {name.lower(): value.strip("'") for name, value in changed.items()}
    shown = {name: getattr(settings, name) for name in expected} | {"custom_nodes": ",".join(settings.custom_nodes)}
    assert {name: str(value) for name, value in shown.items()} == expected
    ours = read_env_file(tmp_path / ".env", VARIABLES)
    assert ours.faults == []
    assert {name: ours.variables[name] for name in expected} == expected


def test_settings_of_the_host_do_not_reach_composes_worker(settings_of: Any, tmp_path: Path) -> None:
    """Folders, files, addresses and access of the host are replaced by those of the container, or by nothing."""
    host = {
        name.upper(): "/of/the/host" for name in VARIABLES if name.endswith(("_dir", "_dirs", "_path", "_location", "_file"))
    }
    host |= {"KAFKA_CLIENT_CONFIG": "/of/the/host", "KAFKA_BOOTSTRAP_SERVERS": "localhost:9092", "HTTP_HOST": "127.0.0.1"}
    host |= {"KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "KAFKA_SASL_MECHANISM": "PLAIN", "HTTP_PORT": "9999", "MODE": "standalone"}
    text = "".join(f"{name}={value}\n" for name, value in host.items())
    environment = compose_settings(tmp_path, text)
    assert {name: value for name, value in environment.items() if value and value == host.get(name)} == {}
    assert settings_of(environment) == settings_of(compose_settings(tmp_path, ""))


def test_compose_downloads_the_vae_on_demand() -> None:
    """The one-off service runs the installer's download into the folder that the worker has its models in."""
    vae, worker = (COMPOSE["services"][name] for name in ("vae", "latent-encoder"))
    assert (vae["profiles"], vae["image"], vae["build"]) == (["setup"], worker["image"], worker["build"])
    assert_downloads(vae["entrypoint"])
    ((source, target, read_only),) = ((each["source"], each["target"], each.get("read_only")) for each in vae["volumes"])
    assert (source, target, read_only) == ("./models", worker["environment"]["MODEL_DIR"], None)
    hardened = ("user", "read_only", "cap_drop", "security_opt")
    assert {name: vae[name] for name in hardened} == {name: worker[name] for name in hardened}


def test_kubernetes_downloads_the_vae() -> None:
    """A Job runs the installer's download into the volume of the models, for the VAE that the settings name."""
    pod = manifest("Job")["spec"]["template"]["spec"]
    (download,) = pod["containers"]
    assert_downloads(download["command"])
    assert download["image"] == container()["image"]
    assert download["securityContext"] == container()["securityContext"]
    assert pod["securityContext"] == manifest("StatefulSet")["spec"]["template"]["spec"]["securityContext"]
    assert download["volumeMounts"] == [{"name": "models", "mountPath": manifest("ConfigMap")["data"]["MODEL_DIR"]}]
    (volume,) = pod["volumes"]
    (of_workers,) = [each for each in worker_volumes() if each["name"] == "models"]
    assert volume["persistentVolumeClaim"] == {"claimName": of_workers["persistentVolumeClaim"]["claimName"]}
    assert manifest("ConfigMap")["data"]["VAE_MODEL_NAME"] == QWEN_IMAGE_VAE.name


def worker_volumes() -> Any:
    return manifest("StatefulSet")["spec"]["template"]["spec"]["volumes"]


def assert_downloads(command: list[str]) -> None:
    """Check that a command runs the installer's script in the image with the folder of the models."""
    (folder,) = {words[0] for words in instructions("WORKDIR")}
    script = Path("latent_encoder/installer/download_vae.py")
    assert command == [f"{folder}/.venv/bin/python", f"{folder}/{script}", ENVIRONMENTS["Dockerfile"]["MODEL_DIR"]]
    assert any(f"{script}".startswith(source) for source in copied_from_the_project() if source.endswith("/"))
    done = subprocess.run([sys.executable, PROJECT / script], capture_output=True, text=True, cwd="/", check=False)
    assert (done.returncode, done.stderr[:7]) == (1, "Usage: ")


def created_topics() -> dict[str, dict[str, str]]:
    """Return the topics that Compose creates, each with its configuration."""
    service = COMPOSE["services"]["topics"]
    (script,) = service["command"]
    script = re.sub(r"\$\$(\w+)", lambda variable: without_shell(service["environment"][variable[1]]), script)
    calls = [shlex.split(line)[1:] for line in script.splitlines() if line.startswith("create ")]
    return {name: dict(option.split("=") for option in options if option != "--config") for name, *options in calls}


def test_compose_creates_the_topics_of_the_settings() -> None:
    """Compose creates the three default topics, that of the dead letters with the service's own configuration."""
    assert created_topics() == {name: DLQ_CONFIG if name == DEFAULTS.kafka_dlq_topic else {} for name in topics_of(DEFAULTS)}


def test_keda_scales_by_the_requests_of_the_settings(settings_of: Any) -> None:
    """The trigger has the brokers, topic and group of the workers, and all of its values are strings."""
    settings = settings_of(ENVIRONMENTS["kubernetes.yaml"])
    (trigger,) = manifest("ScaledObject")["spec"]["triggers"]
    metadata = trigger["metadata"]
    assert metadata["bootstrapServers"] == settings.kafka_bootstrap_servers
    assert metadata["topic"] == settings.kafka_request_topic == DEFAULTS.kafka_request_topic
    assert metadata["consumerGroup"] == settings.kafka_consumer_group == DEFAULTS.kafka_consumer_group
    assert [name for name, value in metadata.items() if not isinstance(value, str)] == []


def test_ids_of_a_worker_are_its_pods_name() -> None:
    """Transactional id and instance id come from the name of a pod, which a pod of a StatefulSet keeps."""
    named = {"fieldRef": {"fieldPath": "metadata.name"}}
    from_pod = {variable["name"] for variable in container()["env"] if variable["valueFrom"] == named}
    assert from_pod == {"KAFKA_TRANSACTIONAL_ID", "KAFKA_GROUP_INSTANCE_ID"}
    assert manifest("StatefulSet")["spec"]["podManagementPolicy"] == "Parallel"


def test_no_more_workers_than_partitions() -> None:
    """KEDA's maximum equals the number of partitions that Compose creates and that the service creates."""
    (script,) = COMPOSE["services"]["topics"]["command"]
    partitions = [int(number) for number in re.findall(r"--partitions (\d+)", script)]
    assert partitions == [manifest("ScaledObject")["spec"]["maxReplicaCount"]] == [DEFAULTS.kafka_topic_partitions]


def test_grace_periods_exceed_the_shutdown_timeout() -> None:
    """Compose and Kubernetes wait longer than the service's own shutdown timeout before they kill a worker."""
    compose = int(COMPOSE["services"]["latent-encoder"]["stop_grace_period"].removesuffix("s"))
    kubernetes = manifest("StatefulSet")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert min(compose, kubernetes) > DEFAULTS.shutdown_timeout_s


def test_manifests_refer_to_what_is_there() -> None:
    """Each reference to a ConfigMap, Secret, volume or StatefulSet, and each selector of pods, has its target."""
    pod = manifest("StatefulSet")["spec"]["template"]
    sources = {next(iter(source.values()))["name"] for source in container()["envFrom"]}
    secret = manifest("Secret")
    assert sources == {manifest("ConfigMap")["metadata"]["name"], secret["metadata"]["name"]}
    for reference in manifest("TriggerAuthentication")["spec"]["secretTargetRef"]:
        assert reference["name"] == secret["metadata"]["name"]
        assert reference["key"] in secret["stringData"]
    claims = {each["metadata"]["name"] for each in MANIFESTS if each["kind"] == "PersistentVolumeClaim"}
    claimed = [volume["persistentVolumeClaim"] for volume in pod["spec"]["volumes"] if "persistentVolumeClaim" in volume]
    assert claims == {claim["claimName"] for claim in claimed}
    assert {mount["name"] for mount in container()["volumeMounts"]} == {volume["name"] for volume in pod["spec"]["volumes"]}
    for kind in ("StatefulSet", "PodDisruptionBudget"):
        assert manifest(kind)["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    scaled = manifest("ScaledObject")["spec"]
    assert scaled["scaleTargetRef"] == {"kind": "StatefulSet", "name": manifest("StatefulSet")["metadata"]["name"]}
    assert scaled["triggers"][0]["authenticationRef"]["name"] == manifest("TriggerAuthentication")["metadata"]["name"]


@pytest.mark.parametrize("name", ["docker-compose.yml", "kubernetes.yaml"])
def test_folders_of_the_settings_are_mounted(name: str, settings_of: Any) -> None:
    """The model folder is mounted read-only and the output folder writable."""
    volumes = COMPOSE["services"]["latent-encoder"]["volumes"]
    writable = {
        "docker-compose.yml": {volume["target"]: not volume.get("read_only") for volume in volumes},
        "kubernetes.yaml": {mount["mountPath"]: not mount.get("readOnly") for mount in container()["volumeMounts"]},
    }[name]
    settings = settings_of(ENVIRONMENTS[name])
    writable.pop("/tmp", None)  # noqa: S108  # in memory, and gone with the container
    assert writable == {str(settings.model_dir): False, "/data": False, settings.output_dir: True}


def test_image_has_every_file_of_the_product() -> None:
    """Each Python file of the product is one that the Dockerfile copies, itself or by its folder."""
    copied = {path for source in copied_from_the_project() for path in PROJECT.glob(source)}
    assert len(OUR_FILES) > FEWEST_FILES
    assert [str(file) for file in OUR_FILES if not copied & {file, *file.parents}] == []


def test_copied_paths_exist_and_reach_the_builder() -> None:
    """Each source that the Dockerfile copies exists, and `.dockerignore` excludes everything else and nothing of it."""
    sources = copied_from_the_project()
    assert [source for source in sources if not list(PROJECT.glob(source))] == []
    excluding, *sent = [line for line in (PROJECT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert excluding == "*"
    outermost = {source for source in sources if not any(source != other and source.startswith(other) for other in sources)}
    assert {f"!{source}" for source in outermost} == {line for line in sent if line.startswith("!")}


def test_image_has_all_that_setting_up_reads() -> None:
    """The image has the files that `setup_comfyui.sh` names before it runs, and the code, which tries ComfyUI, after it."""
    steps = [(words[0], " ".join(words[1:])) for words in DOCKERFILE]
    (run,) = [number for number, (name, text) in enumerate(steps) if name == "RUN" and "./setup_comfyui.sh --no-trial" in text]
    (code,) = [number for number, (name, text) in enumerate(steps) if name == "COPY" and "*.py" in text]
    (trial,) = [number for number, (name, text) in enumerate(steps) if name == "RUN" and "try_comfyui.py comfyui" in text]
    assert run < code < trial
    before = [source.rstrip("/") for name, text in steps[:run] if name == "COPY" for source in text.split()[:-1]]
    script = (PROJECT / "setup_comfyui.sh").read_text(encoding="utf-8")
    read = set(re.findall(r"\$project/((?:latent_encoder/)?[\w.-]+)", script)) - {".venv", "comfyui", "tests"}
    imported = {"latent_encoder/__init__.py", "latent_encoder/releases.py"}  # by fill_comfyui.py
    assert read | {"setup_comfyui.sh"} | imported == set(before)


def test_venv_stays_where_it_was_made() -> None:
    """Both stages have the same folder and base image, because a venv depends on both, and two folders are handed over."""
    stages = [words for words in DOCKERFILE if words[0] == "FROM"]
    assert [words[1] for words in stages] == ["${BASE}", "${BASE}"]
    (folder,) = {words[0] for words in instructions("WORKDIR")}
    taken = [words for words in DOCKERFILE if words[0] == "COPY" and words[1].startswith("--from")]
    assert [words[1:] for words in taken] == [[f"--from={stages[0][3]}", f"{folder}/{it}", it] for it in (".venv", "comfyui")]


def test_image_runs_python_under_an_init_and_asks_it_for_its_health() -> None:
    """Entry point and health check run the venv's Python by absolute paths, as a user with a number."""
    (folder,) = {words[0] for words in instructions("WORKDIR")}
    service = [f"{folder}/.venv/bin/python", f"{folder}/main.py"]
    assert json_form("ENTRYPOINT") == ["/usr/bin/tini", "--", *service]
    assert json_form("HEALTHCHECK") == [*service, "--mode", "health"]
    pod = manifest("StatefulSet")["spec"]["template"]["spec"]["securityContext"]
    assert list(instructions("USER")) == [[f"{pod['runAsUser']}:{pod['runAsGroup']}"]]


def test_image_tests_itself(settings_of: Any) -> None:
    """The image has the VAE that its settings name, and a sample image in a folder that may be read."""
    settings = settings_of(ENVIRONMENTS["Dockerfile"])
    assert (PROJECT / "tiny_vae" / settings.vae_model_name).is_file()
    (sample,) = [words[-1] for words in instructions("COPY") if words[-1].endswith(".png")]
    assert str(Path(sample).parent) == ENVIRONMENTS["Dockerfile"]["ALLOWED_INPUT_DIRS"]
    assert set(json_form("VOLUME")) == {str(settings.model_dir), settings.output_dir}


def test_versions_are_the_services() -> None:
    """The image's label and the tag of the image in Kubernetes have the version of the service."""
    assert [words[0] for words in instructions("ARG") if words[0].startswith("VERSION")] == [f"VERSION={VERSION}"]
    assert container()["image"].split(":") == ["latent-encoder", VERSION]  # the other manifest's is compared with this one


def test_port_is_one_everywhere() -> None:
    """Setting, Kubernetes' probes, Prometheus' annotation and Compose have one port, which Compose publishes only locally."""
    port = ENVIRONMENTS["Dockerfile"]["HTTP_PORT"]
    assert ENVIRONMENTS["kubernetes.yaml"]["HTTP_PORT"] == port
    assert list(instructions("EXPOSE")) == [[port]]
    assert COMPOSE["services"]["latent-encoder"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert container()["ports"] == [{"name": "http", "containerPort": int(port)}]
    annotations = manifest("StatefulSet")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == port


@pytest.mark.parametrize(("probe", "path"), [("startup", "/healthz"), ("liveness", "/healthz"), ("readiness", "/readyz")])
def test_probes_ask_the_port(probe: str, path: str) -> None:
    """Only readiness depends on the broker and the model, so that Kubernetes kills no worker for these."""
    assert container()[f"{probe}Probe"]["httpGet"] == {"path": path, "port": container()["ports"][0]["name"]}


def test_containers_have_no_rights_to_spare() -> None:
    """The root file system is read-only, no capability is left, and none can be gained."""
    compose = COMPOSE["services"]["latent-encoder"]
    assert (compose["read_only"], compose["cap_drop"], compose["security_opt"]) == (True, ["ALL"], ["no-new-privileges:true"])
    assert container()["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }


@pytest.mark.parametrize("name", IN_OBJECT_STORAGE)
def test_files_go_to_urls_alone(name: str, settings_of: Any) -> None:
    """Images and files are in one bucket, at URLs that are allowed, and no folder may be read or written but an empty one."""
    settings = settings_of(ENVIRONMENTS[name])
    assert settings.mode == "kafka"
    assert AllowedUrls.of_outputs(settings).allows(location_of(settings.output_dir))
    assert not AllowedUrls.of_inputs(settings).allows(location_of(settings.output_dir))
    assert [str(folder) for folder in (*settings.allowed_input_dirs, *settings.allowed_output_dirs)] == ["/mnt", "/mnt"]


def test_workers_with_object_storage_share_no_volume() -> None:
    """A worker mounts the VAEs and memory, and in Kubernetes no claim is left."""
    assert [volume["target"] for volume in COMPOSE["services"]["worker-s3"]["volumes"]] == ["/models"]
    assert [each for each in WITHOUT_DISK if each["kind"] == "PersistentVolumeClaim"] == []
    pod = pod_without_disk()["spec"]
    assert {volume["name"]: [*volume.keys() - {"name"}] for volume in pod["volumes"]} == {
        "models": ["emptyDir"],
        "tmp": ["emptyDir"],
    }
    (worker,) = pod["containers"]
    assert {mount["mountPath"]: bool(mount.get("readOnly")) for mount in worker["volumeMounts"]} == {
        "/models": True,
        "/tmp": False,  # noqa: S108  # in memory, and gone with the pod
    }


def test_pods_with_object_storage_are_those_with_volumes_else() -> None:
    """Image, probes, resources and rights are the same in both manifests, and the VAE is there before the worker starts."""
    pod = pod_without_disk()["spec"]
    (worker,), (download,) = pod["containers"], pod["initContainers"]
    same = ("image", "ports", "resources", "startupProbe", "livenessProbe", "readinessProbe", "securityContext")
    assert {name: worker[name] for name in same} == {name: container()[name] for name in same}
    assert pod["securityContext"] == manifest("StatefulSet")["spec"]["template"]["spec"]["securityContext"]
    assert pod["terminationGracePeriodSeconds"] > DEFAULTS.shutdown_timeout_s
    assert (download["image"], download["securityContext"]) == (worker["image"], worker["securityContext"])
    assert_downloads(download["command"])
    assert download["volumeMounts"] == [{"name": "models", "mountPath": "/models"}]


def test_pods_have_the_rights_of_an_account_of_the_cloud() -> None:
    """The pods run as the ServiceAccount that names an account of one cloud, and no key of a storage is stored."""
    account = manifest("ServiceAccount", WITHOUT_DISK)
    assert pod_without_disk()["spec"]["serviceAccountName"] == account["metadata"]["name"]
    assert len(account["metadata"]["annotations"]) == 1
    secret = manifest("Secret", WITHOUT_DISK)
    assert [name for name in secret["stringData"] if not name.startswith("KAFKA_")] == []
    assert manifest("ConfigMap", WITHOUT_DISK)["data"].keys().isdisjoint(SECRET_VARIABLES)


def test_manifests_with_object_storage_refer_to_what_is_there(settings_of: Any) -> None:
    """ConfigMap, Secret, labels and the scaled Deployment are those of the file, and KEDA looks at the workers' topic."""
    pod, settings = pod_without_disk(), settings_of(ENVIRONMENTS["kubernetes-object-storage.yaml"])
    sources = [next(iter(source.values()))["name"] for source in pod["spec"]["containers"][0]["envFrom"]]
    assert sources == [manifest(kind, WITHOUT_DISK)["metadata"]["name"] for kind in ("ConfigMap", "Secret")]
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert manifest(kind, WITHOUT_DISK)["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    (spread,) = pod["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == pod["metadata"]["labels"]
    scaled = manifest("ScaledObject", WITHOUT_DISK)["spec"]
    assert scaled["scaleTargetRef"] == {"kind": "Deployment", "name": manifest("Deployment", WITHOUT_DISK)["metadata"]["name"]}
    (trigger,) = scaled["triggers"]
    assert trigger == manifest("ScaledObject")["spec"]["triggers"][0]
    assert trigger["metadata"]["bootstrapServers"] == settings.kafka_bootstrap_servers
    assert manifest("TriggerAuthentication", WITHOUT_DISK) == manifest("TriggerAuthentication")


def test_the_policy_permits_the_prefixes_of_the_settings_and_no_more(settings_of: Any) -> None:
    """The policy for S3 reads below the allowed input URL, writes below the output URL, and lists only these."""
    settings = settings_of(ENVIRONMENTS["kubernetes-object-storage.yaml"])
    (read,), (written,) = settings.allowed_input_urls, settings.allowed_output_urls
    policy = json.loads((PROJECT / "deploy" / "s3-policy.json").read_text(encoding="utf-8"))
    reading, writing, listing = policy["Statement"]
    arn = "arn:aws:s3:::"
    assert reading["Resource"] == f"{arn}{read.removeprefix('s3://')}/*"
    assert writing["Resource"] == f"{arn}{written.removeprefix('s3://')}/*"
    bucket, _, folder = written.removeprefix("s3://").partition("/")
    assert listing["Resource"] == f"{arn}{bucket}"
    assert listing["Condition"] == {"StringLike": {"s3:prefix": [f"{read.rpartition('/')[2]}/*", f"{folder}/*"]}}
    page = (PROJECT / "docs" / "object-storage.md").read_text(encoding="utf-8")
    (of_files,) = re.findall(r"^\| write files \| ([^|]*) \|", page, re.MULTILINE)
    assert {*writing["Action"], listing["Action"]} == set(re.findall(r"s3:\w+", of_files))


def test_compose_has_an_s3_server_on_demand(settings_of: Any) -> None:
    """Server, bucket and worker are in a profile, agree in keys, bucket and port, and the host reaches S3 alone."""
    server, bucket, worker = (COMPOSE["services"][name] for name in ("s3", "bucket", "worker-s3"))
    assert [each["profiles"] for each in (server, bucket, worker)] == [["object-storage"]] * 3
    assert server["environment"].items() <= worker["environment"].items()
    port = worker["environment"]["AWS_ENDPOINT_URL"].rpartition(":")[2]
    assert worker["environment"]["AWS_ENDPOINT_URL"] == f"http://s3:{port}"
    assert server["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert f"127.0.0.1:{port}/" in server["healthcheck"]["test"][-1]
    assert server["image"] == bucket["image"]
    output = location_of(settings_of(ENVIRONMENTS["worker-s3 of docker-compose.yml"]).output_dir)
    assert isinstance(output, ObjectPath)
    (script,) = bucket["command"]
    assert f"s3.bucket.create -name {output.bucket}'" in script
    assert f"grep -qw {output.bucket};" in script
    assert worker["depends_on"]["bucket"] == {"condition": "service_completed_successfully"}
    page = (PROJECT / "docs" / "operating.md").read_text(encoding="utf-8")
    assert all(f"{name}={worker['environment'][name]}" in page for name in (*server["environment"], "AWS_REGION"))
    assert f"--endpoint-url http://localhost:{port} s3 cp cat.png s3://{output.bucket}/images/" in page
    same = ("image", "build", "env_file", "user", "read_only", "cap_drop", "security_opt", "stop_grace_period")
    assert {name: worker[name] for name in same} == {name: COMPOSE["services"]["latent-encoder"][name] for name in same}


@pytest.mark.parametrize("tries", [0, 3, 99])
def test_the_bucket_is_made_or_the_worker_does_not_start(tmp_path: Path, tries: int) -> None:
    """The one-off ends with success when the list has the bucket, also after failures, and with an error if it never has."""
    (script,) = COMPOSE["services"]["bucket"]["command"]
    made = tmp_path / "made"
    listed = f'[ $(grep -c create {made}) -lt {tries} ] || echo "  latent-encoder  size:0"'
    commands = {"weed": f'read -r line; echo "$line" >> {made}; {listed}', "sleep": ""}
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", "-ec", script.replace("$$", "$")],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode == 0) is (tries < 30)
    assert made.read_text().count("create") == min(tries, 30)


def test_image_has_the_library_for_object_storage() -> None:
    """The image is built with the option that installs obstore."""
    (run,) = [" ".join(words) for words in DOCKERFILE if words[0] == "RUN" and "./setup_comfyui.sh" in words]
    assert "--object-storage" in run.split()
    assert "requirements/" in copied_from_the_project()


KUBERNETES_OWN = [each for each in [*MANIFESTS, *WITHOUT_DISK] if not each["apiVersion"].startswith("keda.sh/")]


@pytest.mark.parametrize("document", KUBERNETES_OWN, ids=lambda document: document["kind"])
def test_manifests_are_what_kubernetes_takes(document: Any) -> None:
    """Each manifest is valid by the schemas of the newest known release, which refuse unknown fields."""
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
