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
from models import Metadata, SuccessResponse
from tests.conftest import PROJECT, clean_environment

README = (PROJECT / "README.md").read_text(encoding="utf-8")
API = (PROJECT / "API.md").read_text(encoding="utf-8")
DIFFERS_BY_MACHINE = {"processing_time_ms", "timestamp", "timings_ms", "torch_version", "device", "latent_sha256"}


def blocks(document: str, language: str) -> list[str]:
    """The code blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", document, re.DOTALL)


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
    *commands, last = blocks(API, "bash")
    answers = blocks(API, "json")
    assert len(commands) == len(answers) == 2
    for command, answer in zip(commands, answers, strict=True):
        done = run(command, project)
        assert stable(json.loads(done.stdout)) == stable(json.loads(answer))
    assert json.loads(run(last, project).stdout)["status"] == "success"
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
