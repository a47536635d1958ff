"""What the documents show is run here as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from errors import ErrorCode
from kafka_records import DLQ_HEADERS
from models import EncodeRequest, Metadata, ResponseMessage, SuccessResponse
from tests.broker.ports import free_ports
from tests.helpers import PROJECT, clean_environment

README = (PROJECT / "README.md").read_text(encoding="utf-8")
API = (PROJECT / "API.md").read_text(encoding="utf-8")
DIFFERS_BY_MACHINE = {
    "processing_time_ms",
    "timestamp",
    "timings_ms",
    "torch_version",
    "device",
    "latent_sha256",
    "scaled_image_sha256",
    "fingerprint",
}


def blocks(document: str, language: str) -> list[str]:
    """The code blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", document, re.DOTALL)


def section(document: str, heading: str) -> str:
    """What stands under that heading of the second level."""
    return re.split(r"^## ", document.split(f"\n## {heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project's folder as a reader has it, but with an `output/` of its own."""
    for entry in PROJECT.iterdir():
        if entry.name not in ("output", ".env", ".venv"):
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = clean_environment() | {"VENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def stable(document: dict[str, Any]) -> dict[str, Any]:
    """The document without what another machine or moment changes, and with file names for paths."""
    kept: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and key != "timings_ms":
            kept[key] = stable(value)
        elif key in DIFFERS_BY_MACHINE:
            kept[key] = sorted(value) if isinstance(value, dict) else type(value).__name__
        elif key.endswith("_path"):
            kept[key] = Path(value).name
        else:
            kept[key] = value
    return kept


def test_readmes_first_command_encodes_the_portrait(project: Path) -> None:
    """It ends with a success response, and the files are those of the table below it."""
    done = run(blocks(README, "bash")[0], project)
    assert done.returncode == 0, done.stderr
    response = SuccessResponse.model_validate_json(done.stdout[done.stdout.index("{") :])
    assert response.latent_shape == (1, 16, 128, 128)
    shown = re.findall(r"^\| `(.*_astronaut_<request id>.*?)` \|", README, re.MULTILINE)
    expected = {name.replace("<request id>", response.request_id) for name in shown}
    assert {path.name for path in (project / "output").iterdir()} == expected


def test_api_examples_are_what_happens(project: Path) -> None:
    """Each command gives the JSON below it, but for times, versions and folders; the Python snippet runs on its files."""
    outputs, usage = section(API, "Outputs"), section(API, "Example usage")
    commands, answers = blocks(outputs, "bash"), blocks(outputs, "json")
    assert len(commands) == len(answers) == 2
    for command, answer in zip(commands, answers, strict=True):
        done = run(command, project)
        assert stable(json.loads(done.stdout)) == stable(json.loads(answer))
    assert json.loads(run(blocks(usage, "bash")[0], project).stdout)["status"] == "success"
    (snippet,) = blocks(API, "python")
    done = subprocess.run([sys.executable, "-c", snippet], cwd=project, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_code_is_documented_in_both() -> None:
    """Each error code has a row in API.md and one in the README's troubleshooting."""
    for document in (README, API):
        assert set(re.findall(r"^\| `([A-Z_]+)` \|", document, re.MULTILINE)) >= set(ErrorCode)


def test_every_metadata_field_is_documented() -> None:
    """API.md names each field and each note."""
    notes = re.findall(r'yield "(\w+)"', (PROJECT / "images.py").read_text())
    assert len(notes) == 4
    for name in [*Metadata.model_fields, *notes]:
        assert f"`{name}`" in API or f'"{name}"' in API


def test_file_structure_is_the_projects() -> None:
    """API.md lists each module, and nothing that is not there."""
    listed = re.findall(r"^([\w./]+) {2,}\S", blocks(API, "text")[-1], re.MULTILINE)
    assert all((PROJECT / name).exists() for name in listed)
    assert {path.name for path in PROJECT.glob("*.py")} <= set(listed)


def test_links_lead_somewhere() -> None:
    """Files and headings that the documents link to exist."""
    for document in (README, API):
        for target in re.findall(r"\]\((?!http)([^)]+)\)", document):
            file, _, anchor = target.partition("#")
            text = (PROJECT / file).read_text(encoding="utf-8") if anchor and file else document
            assert not file or (PROJECT / file).exists(), target
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings], target


def test_messages_of_the_api_are_the_models() -> None:
    """The request, and a response of each kind, have the fields that the service reads and writes, in its order."""
    request, *responses = map(json.loads, blocks(section(API, "Kafka integration"), "json"))
    assert EncodeRequest.from_fields(request, {}).model_dump() == request
    assert request.keys() == EncodeRequest.model_fields.keys()
    for response in responses:
        assert list(response) == list(ResponseMessage.model_fields)
        ResponseMessage.model_validate(response)
    assert {response["status"] for response in responses} == {"success", "error"}


def test_headers_of_dead_letters_are_documented() -> None:
    """In the order in which they are added."""
    assert tuple(re.findall(r"^\| `(dlq\.[\w.]+)` \|", API, re.MULTILINE)) == DLQ_HEADERS


def test_readmes_kafka_example_works(project: Path) -> None:
    """The three commands, each in its terminal: a broker, the service, and requests that are answered."""
    commands = [command.strip() for command in blocks(section(README, "Kafka"), "bash")]
    port, http_port = free_ports(2)
    commands[0] += f" --port {port}"
    environment = clean_environment() | {"KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{port}", "HTTP_PORT": f"{http_port}"}
    started: list[subprocess.Popen[str]] = []
    try:
        for command, sign in zip(commands, ("Kafka", '"event": "ready"', ""), strict=True):
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=project,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if sign else subprocess.PIPE,
                text=True,
            )
            started.append(process)
            assert process.stdout is not None
            if sign:
                assert any(sign in line for line in process.stdout)
        stdout, stderr = started[-1].communicate(timeout=120)
        assert started[-1].returncode == 0, stdout + stderr
        assert [json.loads(line)["status"] for line in stdout.splitlines()] == ["success", "success"]
    finally:
        for process in reversed(started):
            process.terminate()
            process.communicate(timeout=30)
    assert [process.returncode for process in started] == [0, 0, 0]
