"""The start of Kafka mode, with one event that describes the worker, and its end if something outside of it is broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from config import VERSION, Settings
from latent_encoder.setting_names import unknown_variables
from latent_encoder.start_event import changed_settings
from tests.helpers import COMFYUI, VAE, RunMain
from tests.kafka_tools import Bench, client_config


def test_one_event_describes_the_worker(bench: Bench, tmp_path: Path) -> None:
    """It has versions, device, VAE, topics, limits, changed settings, and variables that are probably misspelt."""
    file = client_config(tmp_path, client_rack="r", sasl_username="file")
    (tmp_path / ".env").write_text("KAFKA_PREFETCH=3\nMEGAPIXEL=2\nKAFKA_CLIENTID=x\nCOMPOSE_PROJECT_NAME=y\n")
    environment = {
        "KAFKA_SASL_PASSWORD": "hunter2-start",
        "KAFKA_SASL_USERNAME": "setting",
        "KAFKA_CLIENT_CONFIG": str(file),
        "KAFKA_BOOTSTRAP_SERVER": "elsewhere:9092",
    }
    with bench.process(**environment) as process:
        process.wait_for("started")
    (event,) = process.events("started")
    assert (event["version"], event["device"], event["comfyui_path"]) == (VERSION, "cpu", str(COMFYUI))
    assert event.keys() >= {"comfyui_version", "torch_version", "librdkafka_version", "memory_limit_bytes"}
    assert (event["vae"]["name"], event["vae"]["dtype"], event["vae"]["loaded"]) == (VAE, "float32", True)
    assert len(event["vae"]["sha256"]) == 64
    assert (event["brokers"], event["group"], event["request_topic"]) == (bench.servers, bench.group, bench.request_topic)
    assert event["limits"].keys() >= {"KAFKA_PREFETCH", "KAFKA_MAX_RETRIES", "SHUTDOWN_TIMEOUT_S", "MAX_IMAGE_BYTES"}
    assert event["settings"]["KAFKA_PREFETCH"] == "3"
    assert event["settings"]["KAFKA_SASL_PASSWORD"] == "***"  # noqa: S105
    assert "KAFKA_MAX_RETRIES" not in event["settings"]
    assert event["properties"] == ["client.rack", "sasl.username"]
    unknown = [
        "KAFKA_CLIENTID (.env)",
        "MEGAPIXEL (.env), did you mean MEGAPIXELS?",
        "KAFKA_BOOTSTRAP_SERVER (environment), did you mean KAFKA_BOOTSTRAP_SERVERS?",
    ]
    assert [name.replace(", did you mean KAFKA_CLIENT_CONFIG?", "") for name in event["unknown_variables"]] == unknown
    (warning,) = process.events("variables are no settings")
    assert warning["variables"] == event["unknown_variables"]
    assert process.events("settings win over properties in KAFKA_CLIENT_CONFIG")[0]["properties"] == ["sasl.username"]
    assert "hunter2" not in process.log_file.read_text()


def test_variables_of_other_programs_are_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is full of names that begin as ours; a name is reported only if it is almost a setting's."""
    monkeypatch.chdir(tmp_path)
    for name in ("HTTP_PROXY", "KAFKA_HOME", "KAFKA_PORT", "KAFKA_TOPIC", "LOG_DIR", "MODEL_PATH", "KAFKA_SASL_PASSWORD_FILE"):
        monkeypatch.setenv(name, "x")
    assert unknown_variables() == []


def test_standalone_mode_warns_of_a_misspelt_variable(tmp_path: Path, run_main: RunMain) -> None:
    """An image would be encoded at another size without a word."""
    (tmp_path / ".env").write_text("MEGAPIXEL=2\n")
    done = run_main("none.png", env={"COMFYUI_PATH": "/nowhere"})
    first = json.loads(done.stderr.splitlines()[0])
    assert first["variables"] == ["MEGAPIXEL (.env), did you mean MEGAPIXELS?"]


def test_changed_settings_have_their_values_as_they_are_set() -> None:
    """Lists are joined by commas, and a default is left out."""
    settings = Settings(_env_file=None, custom_nodes="a,b", vae_cache_size=2, megapixels=2.5)
    changed = changed_settings(settings)
    assert (changed["CUSTOM_NODES"], changed["MEGAPIXELS"]) == ("a,b", "2.5")
    assert "VAE_CACHE_SIZE" not in changed


@pytest.mark.parametrize(("limit", "reason"), [("-n 12", "Too many open files"), ("-v 900000", "memory ran out")])
def test_exhausted_machine_is_one_line_and_no_bug(limit: str, reason: str, run_main: RunMain) -> None:
    """A limit of the machine ends the start with status 3, one line with the reason, and no request to report it."""
    prefix = ["bash", "-c", f'ulimit {limit}; exec "$@"', "bash"]
    done = run_main("--mode", "kafka", env={"HTTP_PORT": "0", "OPENBLAS_NUM_THREADS": "1"}, prefix=prefix)
    assert done.returncode == 3, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert reason in line
    assert "report" not in done.stderr
    assert "Traceback" not in done.stderr


def test_error_of_ours_is_one_line_and_an_event(run_main: RunMain, tmp_path: Path) -> None:
    """An error of ours is one line for people, and an event with the traceback, without values of variables."""
    hook = tmp_path / "sitecustomize.py"
    hook.write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'latent_encoder.start_event' or name == 'service':\n"
        "            password = ''.join(reversed('2retnuh'))\n"
        "            raise KeyError('a bug')\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    done = run_main("--mode", "kafka", env={"HTTP_PORT": "0", "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 3
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert line.startswith("Error: Unexpected error, please report it with the log: KeyError: 'a bug'.")
    (event,) = [json.loads(line) for line in done.stderr.splitlines() if "stopped by an unexpected error" in line]
    assert event["exception"][0]["exc_type"] == "KeyError"
    assert "hunter2" not in done.stderr
