"""Tests that the documents are true: their commands are run, and their tables are compared with the code.

Each page is one shell in a copy of the project's folder. Its blocks of `bash` and `python` are run from top to bottom, and
each finds the files that those before it wrote. A block must exit with status 0, or with the one that the text below it names
("exits with status 1."), or the one above it ("exits with status 1:"). A `json` or `text` block that follows directly is its
output, except times, versions, folders and fractions; `...` stands for any text.
"""

from __future__ import annotations

import ast
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
from prometheus_client import REGISTRY

from config import Settings
from errors import ErrorCode, RequestError
from latent_encoder.installer.download_vae import QWEN_IMAGE_VAE
from latent_encoder.kafka.records import DLQ_HEADERS, OMISSIONS, REPLAY_HEADERS
from latent_encoder.requests import parse_request
from latent_encoder.telemetry.health import Health
from main import main
from models import EncodeRequest, ImageNote, Metadata, ResponseMessage, SuccessResponse
from scripts.write_schemas import IF_THERE
from tests import pages
from tests.broker.ports import free_ports
from tests.helpers import OUR_FILES, PROJECT, TINY_VAE, clean_environment
from tests.pages import Step, section, steps_of

PAGES = {page.name: page for page in pages.all_pages()}
README, API = PAGES["README.md"].text, PAGES["API.md"].text
TROUBLESHOOTING, OPERATING = PAGES["docs/troubleshooting.md"].text, PAGES["docs/operating.md"].text
GETTING_STARTED, COMMAND_LINE = PAGES["docs/getting-started.md"].text, PAGES["docs/command-line.md"].text

OUR_PACKAGE = PROJECT / "latent_encoder"

README_WORDS = 700
"""Most words that the README may have, code and table cells included: two screens."""

# Pages whose blocks have a test of their own, because they need packages and models beside ours.
TESTED_ELSEWHERE = {
    "clients/python/README.md": "tests/clients/test_python_client.py",
    "docs/latents.md": "tests/project/test_latent_docs.py",
}

# Pages whose commands need the servers that another page has started.
FOLLOWS = {"docs/operating.md": "docs/kafka.md"}

# Servers: a part of the command, and the text that it writes when it is ready.
SERVERS = {"tests.broker": " at ", "--mode kafka --vae": '"event": "ready"'}

# Commands that take minutes, or need another broker: only their options are checked.
ONLY_PARSED = ("-m benchmarks.", "-m fuzz", "-m pip", "-m pytest", "--mode kafka --kafka-bootstrap-servers")

# Commands that are not run, each with the reason.
NOT_RUN = {
    "./setup_comfyui.sh --dev && scripts/check.sh": "it runs these tests; CI runs it: test_ci_runs_the_test_command",
    ".venv/bin/python scripts/pack_gpu_check.py": "it asks PyPI; test_gpu_check.py packs without wheels",
    "scripts/supply_chain.sh": "it asks PyPI and OSV, and changes the locks; test_setup.py checks those",
    "topic() {": "it needs three brokers; test_access_rules.py runs it",
    "acl": "it needs a broker with an authorizer; test_access_rules.py runs it",
    "docker ": "it needs a container engine; test_arguments_of_containers_are_understood checks the arguments",
    "python main.py --image_path s3://": "it needs a bucket; test_batches.py runs it on one",
    "export AWS_ACCESS_KEY_ID=": "it needs the S3 server of Docker Compose; test_deploy.py compares keys, port and bucket",
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
    """Return a folder of links to the project's files, with an `output/` and VAE files of its own."""
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
    """Yield the address of a server that has the tiny VAE in the place of the real one, which `project` then expects."""
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
    """Return whether a command is one of `NOT_RUN`."""
    return any(text.startswith(start) for start in NOT_RUN)


def sign_of(step: Step) -> str | None:
    """Return the text that a server writes when it is ready, or None if the step is not a server."""
    return next((sign for part, sign in SERVERS.items() if part in step.text), None)


def command_of(step: Step, broker_port: int) -> str:
    """Return the shell code for a step: in the background for a server, `:` for a step that is not run."""
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
    """Run the commands of those pages in one shell, and return each with its output."""
    steps = [step for name in names for step in steps_of(PAGES[name])]
    broker_port, http_port = free_ports(2)
    environment = clean_environment() | {
        "VENV": sys.prefix,
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
        "HF_ENDPOINT": hub,
    }
    if any("--download-vae" in step.text for step in steps):  # or the file would be searched in the project's own folder
        environment["MODEL_DIR"] = str(project / "comfyui" / "models")
    if any(map(sign_of, steps)):
        environment |= {"KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{broker_port}", "HTTP_PORT": f"{http_port}"}
    command = ["bash", "-c", pages.program([command_of(step, broker_port) for step in steps])]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=project, env=environment, start_new_session=True, **pipes) as shell:
        try:
            stdout, stderr = shell.communicate(timeout=PAGE_TIMEOUT_S)
        finally:  # its servers end with it
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGTERM)
    assert shell.returncode == 0, f"{names}: the last one of these failed:\n{stdout}\n{stderr[-5000:]}"
    return list(zip(steps, pages.printed(stdout), strict=True))


def stable(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document without values that another machine or moment changes, and with file names for paths."""
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
    """Assert that the output is the block that the page shows."""
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
    """Every block runs with the stated status and output, except those in `NOT_RUN`."""
    names = [name, *(later for later, earlier in FOLLOWS.items() if earlier == name)]
    for step, printed in run_pages(names, project, hub):
        if step.shown is not None:
            assert_shown(step, printed)


def test_readmes_first_command_encodes_the_portrait(project: Path, hub: str) -> None:
    """It ends with a success response, and its files are those of the table in the page on getting started."""
    (first, printed), *_ = run_pages(["README.md"], project, hub)
    assert first.text.startswith("./setup_comfyui.sh &&")
    response = SuccessResponse.model_validate_json(printed[printed.index("{") :])
    assert response.latent_shape == (1, 16, 128, 128)
    shown = re.findall(r"^\| `(.*_astronaut_<request id>.*?)` \|", section(GETTING_STARTED, "The first latent"), re.MULTILINE)
    expected = {name.replace("<request id>", response.request_id) for name in shown}
    assert {path.name for path in (project / "output").iterdir()} == expected


def test_blocks_that_are_not_run_hold_no_other_commands() -> None:
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
def test_page_that_is_tested_elsewhere_is_read_there(name: str, test: str) -> None:
    """The test names the page."""
    assert Path(name).name in (PROJECT / test).read_text(encoding="utf-8")


@pytest.mark.parametrize(("file", "quoted"), [quote for page in PAGES.values() for quote in pages.quotes_of(page)])
def test_quoted_code_is_in_its_file(file: str, quoted: str) -> None:
    """A block whose first line names a file is in that file, word for word."""
    assert quoted in (PROJECT / file).read_text(encoding="utf-8")


def test_ci_runs_the_test_command() -> None:
    """CI runs the README's test command, which these tests cannot run."""
    (command,) = [text.strip() for text in PAGES["README.md"].of("bash") if not_run(text)]
    assert command in (PROJECT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("arguments", re.findall(r"latent-encoder( --.*)$", OPERATING, re.MULTILINE))
def test_arguments_of_containers_are_understood(arguments: str) -> None:
    """`main.py`, the image's entry point, takes them."""
    assert CliRunner().invoke(main, [*shlex.split(arguments), "--help"]).exit_code == 0


def test_variables_of_containers_are_settings() -> None:
    """Each variable that `docker run -e` sets is a setting's name."""
    names = re.findall(r" -e (\w+)=", OPERATING)
    assert names
    assert {name.lower() for name in names} <= Settings.model_fields.keys()


def first_cells(document: str, heading: str) -> list[list[str]]:
    """Return the names in backquotes in the first cell of each row of the table with that heading in its first cell.

    Raises:
        ValueError: no table of the document has that heading, or several have it.
    """
    (table,) = re.findall(rf"^\| {re.escape(heading)} \|.*\n\|[-:| ]+\n((?:\|.*\n)+)", document, re.MULTILINE)
    cells = [row.split(" | ")[0] for row in table.splitlines()]
    return [re.findall(r"`([^`]+)`", cell) for cell in cells]


def names_in(document: str, heading: str) -> list[str]:
    """Return the names of all rows of a table, in order."""
    return [name for names in first_cells(document, heading) for name in names]


def test_every_error_code_has_its_row() -> None:
    """API.md and the troubleshooting have one row for each code, and no other rows."""
    for document in (section(API, "Error codes"), TROUBLESHOOTING):
        assert first_cells(document, "code") == [[code] for code in names_in(document, "code")]
        assert sorted(names_in(document, "code")) == sorted(ErrorCode)


def test_retries_of_the_api_are_the_codes() -> None:
    """The last cell of an error code is `yes` if its class is retryable."""
    stated = dict(re.findall(r"^\| `([A-Z_]+)` \|.*\| (yes|no) \|$", section(API, "Error codes"), re.MULTILINE))
    retryable = {error.code: error.retryable for error in RequestError.__subclasses__()}
    assert stated == {code: "yes" if retryable[code] else "no" for code in ErrorCode}


def test_every_input_has_its_row_with_its_default() -> None:
    """API.md has a row for each field of a request, except the two that only Kafka's records have, with its default."""
    rows = re.findall(r"^\| `(\w+)` \| \w+ \| (.*?) \|", section(API, "Inputs"), re.MULTILINE)
    assert [name for name, _ in rows] == names_in(section(API, "Inputs"), "field")
    assert {name for name, _ in rows} == EncodeRequest.model_fields.keys() - {"correlation_id", "timestamp"}
    defaults = EncodeRequest.model_validate({"image_path": "-"}).model_dump()
    stated = {name: default.strip("`") for name, default in rows if default.startswith("`")}
    assert stated == {name: str(defaults[name]) for name in stated}
    assert {name for name, _ in rows} - stated.keys() == {"image_path", "request_id"}


@pytest.mark.parametrize("field", ["upscale_method", "fit", "alpha", "latent_format"])
def test_every_choice_of_an_input_is_in_its_row(field: str) -> None:
    """The meaning of a field with a few values has each of them."""
    (meaning,) = re.findall(rf"^\| `{field}` \|.*\| (.*) \|$", section(API, "Inputs"), re.MULTILINE)
    assert set(re.findall(r"`([\w-]+)`", meaning)) == set(get_args(EncodeRequest.model_fields[field].annotation))


def test_every_metadata_field_has_its_row() -> None:
    """The table of metadata in API.md has each field once, and the table of notes each note once."""
    outputs = section(API, "Outputs")
    assert sorted(names_in(outputs, "field")) == sorted(Metadata.model_fields)
    assert sorted(names_in(outputs, "note")) == sorted(get_args(ImageNote))


def test_fields_that_the_specification_lacks_are_marked() -> None:
    """API.md says how many metadata fields are the specification's, and these come first."""
    specified = [
        "original_image_shape",
        "scaled_image_shape",
        "latent_shape",
        "vae_model_name",
        "processing_time_ms",
        "timestamp",
    ]
    assert names_in(section(API, "Outputs"), "field")[: len(specified)] == specified
    assert "All but the first six are **added**" in section(API, "Outputs")


def test_every_latent_format_has_its_row() -> None:
    """Each format is in the table of the latents' page; those that are not the default are in that of API.md."""
    formats = list(get_args(EncodeRequest.model_fields["latent_format"].annotation))
    assert [names[0] for names in first_cells(PAGES["docs/latents.md"].text, "`latent_format`")] == formats
    assert [names[0] for names in first_cells(section(API, "Output format"), "`latent_format`")] == formats[1:]


def test_every_metric_has_its_row() -> None:
    """The table of metrics has each metric of ours, with the suffix that Prometheus sees, and no other."""
    shown = [name.partition("{")[0] for name in names_in(section(OPERATING, "Metrics"), "metric")]
    ours = [family for family in REGISTRY.collect() if family.name.startswith("latent_encoder")]
    suffixes = {"counter": "_total", "info": "_info"}
    assert sorted(name for name in shown if name.startswith("latent_encoder")) == sorted(
        f"{family.name}{suffixes.get(family.type, '')}" for family in ours
    )


def test_every_mode_has_its_row() -> None:
    """The table of modes has each mode."""
    modes = get_args(Settings.model_fields["mode"].annotation)
    assert sorted(names_in(COMMAND_LINE, "mode")) == sorted(modes)


def test_paths_of_the_contributors_page_exist() -> None:
    """Each file or folder that CONTRIBUTING.md names is in the project, those of its test command too."""
    page = PAGES["CONTRIBUTING.md"]
    named = re.findall(r"`([\w.]+(?:/[\w.]+)*\.(?:py|md))`|`([\w./]+/)`", page.prose)
    named += re.findall(r"(tests/\S+)()", "".join(page.of("bash")))
    assert named
    assert [path for pair in named for path in pair if path and not (PROJECT / path).exists()] == []


def test_readme_is_short() -> None:
    """The README has fewer words than `README_WORDS`."""
    assert len(re.findall(r"\S+", README)) < README_WORDS


def test_file_structure_is_the_projects() -> None:
    """API.md lists each module and folder of the top level, and only files that exist."""
    structure = section(API, "Implementation file structure")
    listed = re.findall(r"^([\w./]+)(?: {2,}\S.*)?$", PAGES["API.md"].of("text")[-1], re.MULTILINE)
    listed += re.findall(r"`(\w+/)`", structure)
    assert [name for name in listed if not (PROJECT / name).exists()] == []
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split()
    folders = {f"{name.partition('/')[0]}/" for name in tracked if "/" in name and not name.startswith(".")}
    tops = {name if name.partition("/")[2] == "" else f"{name.partition('/')[0]}/" for name in listed}
    assert {path.name for path in OUR_FILES if path.parent == PROJECT} | folders <= tops


def test_map_of_the_code_has_every_module() -> None:
    """The table of layers names each module or its folder, and only files that exist."""
    table = section(PAGES["docs/code-map.md"].text, "Where things are")
    cells = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    listed = [name for cell in cells for name in re.findall(r"`(\S+)`", cell)]
    modules = [path.relative_to(PROJECT) for path in OUR_FILES if path.name != "__init__.py"]
    assert [path for path in modules if str(path) not in listed and f"{path.parent}/" not in listed] == []
    assert [name for name in listed if not (PROJECT / name).exists()] == []


def test_files_that_the_map_names_exist() -> None:
    """Each module on the map is in the project, or in its package: `kafka/jobs.py` is `latent_encoder/kafka/jobs.py`."""
    named = re.findall(r"`([\w/]+\.py)`", PAGES["docs/code-map.md"].text)
    assert [name for name in named if not any((folder / name).exists() for folder in (PROJECT, OUR_PACKAGE))] == []


def test_names_on_the_map_are_in_their_files() -> None:
    """A class, function or constant that the map places in a file is defined there."""
    text = PAGES["docs/code-map.md"].text
    places = re.findall(r"((?:`[\w.]+`(?:, | and )?)+) in `([\w/]+\.py)`", text)
    assert len(places) > 8
    for names, file in places:
        path = next(path for path in (PROJECT / file, PROJECT / "latent_encoder" / file) if path.exists())
        defined = {name for node in ast.walk(ast.parse(path.read_text("utf-8"))) for name in names_defined_by(node)}
        wanted = {part for name in re.findall(r"`([\w.]+)`", names) for part in name.split(".")}
        assert wanted <= defined, f"{file} has no {wanted - defined}"


def names_defined_by(node: ast.AST) -> list[str]:
    """Return the names that a node of a module's tree defines."""
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


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
    """The README links to each page of docs/ and of the top level, and each page of docs/ begins with the way back."""
    below = [name for name in PAGES if name.startswith("docs/")]
    beside = [name for name in PAGES if "/" not in name and name != "README.md"]
    links = re.findall(r"\]\(([^)#]+)", README)
    assert [name for name in below + beside if name not in links] == []
    assert [name for name in below if not PAGES[name].text.startswith("[Latent Encoder](../README.md)\n\n# ")] == []


def test_messages_of_the_api_are_the_models() -> None:
    """The request and a response of each kind have the fields that the service reads and writes, in its order."""
    request, *responses = map(json.loads, re.findall(r"```json\n(.*?)```", section(API, "Kafka integration"), re.DOTALL))
    assert parse_request(request, {}).model_dump() == request
    assert request.keys() == EncodeRequest.model_fields.keys()
    for response in responses:
        assert list(response) == [name for name in ResponseMessage.model_fields if name not in IF_THERE]
        ResponseMessage.model_validate(response)
    assert {response["status"] for response in responses} == {"success", "error"}


def test_headers_of_dead_letters_are_documented() -> None:
    """The table of API.md has each header, in the order in which they are added."""
    headers = DLQ_HEADERS + REPLAY_HEADERS + OMISSIONS
    assert tuple(names_in(section(API, "Kafka integration"), "header")) == headers
    assert tuple(re.findall(r"^\| `(dlq\.[\w.]+)` \|", API, re.MULTILINE)) == headers


def test_parts_of_health_are_documented() -> None:
    """API.md names each part that `/healthz` and `/readyz` report."""
    health = Health(encode_timeout_s=1.0)
    rows = dict(re.findall(r"^\| `(/\w+)` \| 200 or 503 \| (.*) \|$", section(API, "Kafka integration"), re.MULTILINE))
    for path, report in (("/healthz", health.alive()), ("/readyz", health.ready())):
        assert re.findall(r"for (.*) either", rows[path]) == [listing([f"`{part}`" for part in report.parts])]


def listing(names: list[str]) -> str:
    """Return names as a sentence lists them: `a, b and c`."""
    return f"{', '.join(names[:-1])} and {names[-1]}"
