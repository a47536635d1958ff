"""What the documents show is run here as it stands there.

Each page is one shell in a copy of the project's folder: its blocks of `bash` and `python` are run from top to bottom, and one
finds what those before it wrote. A block has to exit with status 0, or with the one that the text below it names ("exits with
status 1."), or the one above it ("exits with status 1:"). A block of `json` or `text` that follows directly is what it prints,
but for times, versions, folders and fractions, and `...` for anything.
"""

from __future__ import annotations

import doctest
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

from config import Settings
from errors import ErrorCode
from latent_encoder.images.features import ImageNote
from latent_encoder.installer.download_vae import QWEN_IMAGE_VAE
from latent_encoder.kafka.records import DLQ_HEADERS
from latent_encoder.requests import parse_request
from main import main
from models import EncodeRequest, Metadata, ResponseMessage, SuccessResponse
from tests import pages
from tests.broker.ports import free_ports
from tests.helpers import OUR_FILES, PROJECT, TINY_VAE, clean_environment
from tests.pages import Step, section, steps_of

PAGES = {page.name: page for page in pages.all_pages()}
README, API = PAGES["README.md"].text, PAGES["API.md"].text
TROUBLESHOOTING = section(PAGES["docs/getting-started.md"].text, "Troubleshooting")

# Whose blocks have a test of their own, since they want packages and models beside ours.
TESTED_ELSEWHERE = {"docs/latents.md": "tests/project/test_latent_docs.py"}

# Whose commands need what those of another page have started.
FOLLOWS = {"docs/operating.md": "docs/kafka.md"}

# What runs until it is stopped: by what its command contains, what it writes when it is ready.
SERVERS = {"tests.broker": " at ", "--mode kafka --vae": '"event": "ready"'}

# What takes minutes, or another broker: it is only seen to that the options are known.
ONLY_PARSED = ("-m benchmarks.", "-m fuzz", "-m pip", "--mode kafka --kafka-bootstrap-servers")

# What is not run, and why.
NOT_RUN = {
    "./setup_comfyui.sh --dev && scripts/check.sh": "it runs these tests; CI runs it, see below",
    "scripts/supply_chain.sh": "it asks PyPI and OSV, and changes the locks; test_setup.py checks those",
    "docker ": "there is no container engine here; see below for the arguments",
}

SHELL_COMMANDS = re.compile(
    r"^(\$ |\w+=\S+ )*((\./|\.venv/|scripts/)\w\S*|python|pip|docker|kubectl|curl|echo|export|cd) \S", re.MULTILINE
)

PAGE_TIMEOUT_S = 500
pytestmark = pytest.mark.timeout(PAGE_TIMEOUT_S + 60)

VARIES = re.compile(r"-?\d+\.\d+|\b[0-9a-f]{64}\b")

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


DOWNLOAD = "latent_encoder/installer/download_vae.py"


def link_all_but(source: Path, target: Path, own: str) -> None:
    """Make the folders above `own` in `target`, and link the rest of their entries to those of `source`."""
    *folders, _ = parts = Path(own).parts
    for number in range(len(folders)):
        folder = Path(*parts[: number + 1])
        (target / folder).mkdir()
        for entry in (source / folder).iterdir():
            if entry.name != parts[number + 1]:
                (target / folder / entry.name).symlink_to(entry)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project's folder as a reader has it, but with an `output/` and VAE files of its own."""
    for entry in PROJECT.iterdir():
        if entry.name not in ("output", ".env", ".venv", "comfyui", "latent_encoder"):
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for own in ("comfyui/models", DOWNLOAD):
        link_all_but(PROJECT, tmp_path, own)
    for kind in ("vae", "vae_approx"):
        (tmp_path / "comfyui" / "models" / kind).mkdir(parents=True)
    return tmp_path


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keep quiet."""


@pytest.fixture
def hub(project: Path) -> Iterator[str]:
    """A stand-in for Hugging Face with the tiny VAE in the place of the real one, and a project that expects just that."""
    tiny, url = PROJECT / "tiny_vae" / TINY_VAE, Path(urlsplit(QWEN_IMAGE_VAE.url).path)
    script = (PROJECT / DOWNLOAD).read_text(encoding="utf-8")
    content = tiny.read_bytes()
    for theirs, ours in {f"{QWEN_IMAGE_VAE.size:_}": len(content), QWEN_IMAGE_VAE.sha256: sha256(content).hexdigest()}.items():
        assert theirs in script
        script = script.replace(theirs, str(ours))
    (project / DOWNLOAD).write_text(script, encoding="utf-8")
    folder = project / "hub"
    (folder / url.relative_to("/")).parent.mkdir(parents=True)
    (folder / url.relative_to("/")).symlink_to(tiny)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def not_run(text: str) -> bool:
    return any(text.startswith(start) for start in NOT_RUN)


def sign_of(step: Step) -> str | None:
    """What a server writes when it is ready; None for what is none."""
    return next((sign for part, sign in SERVERS.items() if part in step.text), None)


def command_of(step: Step, broker_port: int) -> str:
    """The shell code for a step: in the background where it serves, `:` where it is not run."""
    text = step.text.strip()
    if step.language == "python":
        return pages.run(step)
    if not_run(text):
        return ":"
    if any(part in text for part in ONLY_PARSED):
        return pages.only_parse(step)
    if sign := sign_of(step):
        return pages.serve(f"{text} --port {broker_port}" if "tests.broker" in text else text, sign)
    return pages.run(step)


def run_pages(names: list[str], project: Path, hub: str) -> list[tuple[Step, str]]:
    """Run the commands of those pages in one shell; each of them with what it printed."""
    steps = [step for name in names for step in steps_of(PAGES[name])]
    broker_port, http_port = free_ports(2)
    environment = clean_environment() | {
        "VENV": sys.prefix,
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
        "HF_ENDPOINT": hub,
    }
    if any("--download-vae" in step.text for step in steps):  # or it would be searched in the folder that is linked to
        environment["MODEL_DIR"] = str(project / "comfyui" / "models")
    if any(map(sign_of, steps)):
        environment |= {"KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{broker_port}", "HTTP_PORT": f"{http_port}"}
    command = ["bash", "-c", pages.program([command_of(step, broker_port) for step in steps])]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=project, env=environment, start_new_session=True, **pipes) as shell:
        try:
            stdout, stderr = shell.communicate(timeout=PAGE_TIMEOUT_S)
        finally:  # what it started ends with it
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGTERM)
    assert shell.returncode == 0, f"{names}: the last one of these failed:\n{stdout}\n{stderr[-5000:]}"
    return list(zip(steps, pages.printed(stdout), strict=True))


def stable(document: dict[str, Any]) -> dict[str, Any]:
    """The document without what another machine or moment changes, and with file names for paths."""
    kept: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and key != "timings_ms":
            kept[key] = stable(value)
        elif key in DIFFERS_BY_MACHINE:
            kept[key] = sorted(value) if isinstance(value, dict) else type(value).__name__
        elif key.endswith("_path"):
            kept[key] = value and Path(value).name
        else:
            kept[key] = value
    return kept


def assert_shown(step: Step, printed: str) -> None:
    """What it printed is what the page shows."""
    assert step.shown is not None
    if step.shown.language == "json":
        assert stable(json.loads(printed)) == stable(json.loads(step.shown.text))
    else:
        shown, printed = (VARIES.sub("#", text) for text in (step.shown.text, printed))
        options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert doctest.OutputChecker().check_output(shown, printed, options), f"{shown}\nis not\n{printed}"


ALONE = [name for name in PAGES if steps_of(PAGES[name]) and name not in ("README.md", *FOLLOWS, *TESTED_ELSEWHERE)]


@pytest.mark.parametrize("name", ALONE)
def test_commands_of_a_page_do_what_it_says(name: str, project: Path, hub: str) -> None:
    """Every block of every page, but for those in `NOT_RUN`."""
    names = [name, *(later for later, earlier in FOLLOWS.items() if earlier == name)]
    for step, printed in run_pages(names, project, hub):
        if step.shown is not None:
            assert_shown(step, printed)


def test_readmes_first_command_encodes_the_portrait(project: Path, hub: str) -> None:
    """It ends with a success response, and the files are those of the table below it."""
    (first, printed), *_ = run_pages(["README.md"], project, hub)
    assert first.text.startswith("./setup_comfyui.sh &&")
    response = SuccessResponse.model_validate_json(printed[printed.index("{") :])
    assert response.latent_shape == (1, 16, 128, 128)
    shown = re.findall(r"^\| `(.*_astronaut_<request id>.*?)` \|", README, re.MULTILINE)
    expected = {name.replace("<request id>", response.request_id) for name in shown}
    assert {path.name for path in (project / "output").iterdir()} == expected


def test_what_is_not_run_is_there_and_looks_it() -> None:
    """Each entry of `NOT_RUN` is on a page, blocks of `console` are in it, and other blocks hold no commands."""
    shown = [text for page in PAGES.values() for text in page.of("bash", "console")]
    assert [start for start in NOT_RUN if not any(text.startswith(start) for text in shown)] == []
    assert [text for page in PAGES.values() for text in page.of("console") if not not_run(text)] == []
    assert {block.language for page in PAGES.values() for block in page.blocks} <= {
        "bash",
        "console",
        "json",
        "python",
        "text",
    }
    assert [text for page in PAGES.values() for text in page.of("text", "json") if SHELL_COMMANDS.search(text)] == []


@pytest.mark.parametrize(("name", "test"), TESTED_ELSEWHERE.items())
def test_what_is_tested_elsewhere_is(name: str, test: str) -> None:
    """The test reads the page."""
    assert Path(name).name in (PROJECT / test).read_text(encoding="utf-8")


@pytest.mark.parametrize(("file", "quoted"), [quote for page in PAGES.values() for quote in pages.quotes_of(page)])
def test_code_that_is_quoted_is_there(file: str, quoted: str) -> None:
    """Word for word, in the file that the first line names."""
    assert quoted in (PROJECT / file).read_text(encoding="utf-8")


def test_ci_runs_the_test_command() -> None:
    """The README's, which its own tests cannot run."""
    (command,) = [text.strip() for text in PAGES["README.md"].of("bash") if not_run(text)]
    assert command in (PROJECT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("arguments", re.findall(r"latent-encoder( --.*)$", PAGES["docs/operating.md"].text, re.MULTILINE))
def test_arguments_of_containers_are_understood(arguments: str) -> None:
    """The image's entry point is `main.py`."""
    assert CliRunner().invoke(main, [*shlex.split(arguments), "--help"]).exit_code == 0


def test_variables_of_containers_are_settings() -> None:
    """Those that `docker run -e` sets."""
    names = re.findall(r" -e (\w+)=", PAGES["docs/operating.md"].text)
    assert names
    assert {name.lower() for name in names} <= Settings.model_fields.keys()


def test_every_code_is_documented_in_both() -> None:
    """Each error code has a row in API.md and one in the troubleshooting."""
    for document in (TROUBLESHOOTING, API):
        assert set(re.findall(r"^\| `([A-Z_]+)` \|", document, re.MULTILINE)) >= set(ErrorCode)


def test_every_metadata_field_is_documented() -> None:
    """API.md names each field and each note."""
    for name in [*Metadata.model_fields, *get_args(ImageNote)]:
        assert f"`{name}`" in API or f'"{name}"' in API


def test_file_structure_is_the_projects() -> None:
    """API.md lists each module and folder of the top level, and nothing that is not there."""
    listed = re.findall(r"^([\w./]+) {2,}\S", PAGES["API.md"].of("text")[-1], re.MULTILINE)
    assert all((PROJECT / name).exists() for name in listed)
    tracked = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split()
    folders = {f"{name.partition('/')[0]}/" for name in tracked if "/" in name and not name.startswith(".")}
    assert {path.name for path in OUR_FILES if path.parent == PROJECT} | folders <= set(listed)


def test_map_of_the_code_has_every_module() -> None:
    """And nothing that is not there."""
    table = section(PAGES["docs/code-map.md"].text, "Modules")
    cells = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    listed = [name for cell in cells for name in re.findall(r"`(\S+)`", cell)]
    modules = [path.relative_to(PROJECT) for path in OUR_FILES if path.name != "__init__.py"]
    assert [path for path in modules if str(path) not in listed and f"{path.parent}/" not in listed] == []
    assert [name for name in listed if not (PROJECT / name).exists()] == []


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    """Files and headings that the page links to exist."""
    folder = (PROJECT / name).parent
    for target in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[name].prose):
        file, _, anchor = target.partition("#")
        path = (folder / file).resolve() if file else PROJECT / name
        assert path.exists(), target
        assert not anchor or anchor in PAGES[str(path.relative_to(PROJECT))].anchors, target


def test_every_page_is_reached_from_the_readme() -> None:
    """Its table of pages has each, and each begins with the way back."""
    below = [name for name in PAGES if name.startswith("docs/")]
    assert [name for name in below if f"]({name})" not in README] == []
    assert [name for name in below if not PAGES[name].text.startswith("[Latent Encoder](../README.md)\n\n# ")] == []


def test_messages_of_the_api_are_the_models() -> None:
    """The request, and a response of each kind, have the fields that the service reads and writes, in its order."""
    request, *responses = map(json.loads, re.findall(r"```json\n(.*?)```", section(API, "Kafka integration"), re.DOTALL))
    assert parse_request(request, {}).model_dump() == request
    assert request.keys() == EncodeRequest.model_fields.keys()
    for response in responses:
        assert list(response) == list(ResponseMessage.model_fields)
        ResponseMessage.model_validate(response)
    assert {response["status"] for response in responses} == {"success", "error"}


def test_headers_of_dead_letters_are_documented() -> None:
    """In the order in which they are added."""
    assert tuple(re.findall(r"^\| `(dlq\.[\w.]+)` \|", API, re.MULTILINE)) == DLQ_HEADERS
