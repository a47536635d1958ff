"""Starting with a Python that cannot run the service: which Python it is, the packages that it lacks, and the next step."""

from __future__ import annotations

import ast
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from itertools import chain
from pathlib import Path

import pytest

from latent_encoder.exits import EXIT_SERVICE_FAILED
from latent_encoder.interpreter import EXIT_SERVICE_FAILED as EXIT_OF_INTERPRETER
from latent_encoder.interpreter import PACKAGES_OF_MODES, START_PACKAGES
from tests.helpers import IMAGES, OUR_FILES, PROJECT, TINY_VAE, RunMain, clean_environment

MODES = ([str(IMAGES / "photo.jpg"), "--vae_model_name", TINY_VAE], ["kafka"], ["doctor"], ["--mode", "inspect", "x.pt"])

ENVIRONMENT = {name: value for name, value in clean_environment().items() if name != "VIRTUAL_ENV"}

OLD_PYTHONS = sorted(Path("~/.pyenv/versions").expanduser().glob("3.[6-9].*/bin/python"))
"""Older Pythons of this machine, if there are any."""


NEXT_STEPS = ("Run ./setup_comfyui.sh", "Use the environment of this service: ")
"""Beginnings of the next step in this project, without `.venv` and with it."""


def bare_python(folder: Path, packages: Sequence[str] = ()) -> Path:
    """Make an environment with only these top-level packages of this one, and return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for package in packages:
        spec = PathFinder.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        place = Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin)
        (site / place.name).symlink_to(place)
        for about in place.parent.glob(f"{package}-*.dist-info"):
            (site / about.name).symlink_to(about)
    return folder / "bin" / "python"


def started(python: Path, *arguments: str, program: Path = PROJECT / "main.py") -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [python, program, *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def project_in(folder: Path) -> Path:
    """Return a copy of the product in a folder, with the packages of this environment nowhere near."""
    folder.mkdir()
    for entry in (*PROJECT.glob("*.py"), PROJECT / "latent_encoder", PROJECT / "tiny_vae"):
        copy = shutil.copytree if entry.is_dir() else shutil.copy
        copy(entry, folder / entry.name)
    return folder


@pytest.mark.parametrize("arguments", MODES, ids=["standalone", "kafka", "doctor", "inspect"])
def test_python_without_packages(arguments: list[str], tmp_path: Path) -> None:
    """Two lines have the Python, the packages and the next step in each mode, and the status is 3."""
    project = project_in(tmp_path / "project")
    python = bare_python(tmp_path / "bare")
    done = started(python, *arguments, program=project / "main.py")
    assert done.returncode == 3
    reason, step = done.stderr.splitlines()
    assert reason.startswith(f"Error: {python} (Python {sys.version.split()[0]}) lacks click, cloup, ")
    command = shlex.join([f"{project}/.venv/bin/python", f"{project}/main.py", *arguments])
    assert step == f"Run ./setup_comfyui.sh in {project}, then: {command}"
    assert ("comfyui" in done.stdout) == (arguments == ["doctor"])


def test_environment_that_exists_is_named(tmp_path: Path) -> None:
    """If .venv exists, the next step is the same command with its Python; with .venv's own Python, it is setup."""
    project = project_in(tmp_path / "project")
    python, own = bare_python(tmp_path / "bare"), bare_python(project / ".venv")
    done = started(python, "a b.png", "--preview", program=project / "main.py")
    step = done.stderr.splitlines()[1]
    assert step == f"Use the environment of this service: {own} {project}/main.py 'a b.png' --preview"
    command: list[str | Path] = [python, "main.py", "kafka"]
    done = subprocess.run(command, cwd=project, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[1] == "Use the environment of this service: .venv/bin/python main.py kafka"
    done = started(own, "kafka", program=project / "main.py")
    assert (
        done.stderr.splitlines()[1] == f"Run ./setup_comfyui.sh in {project}, which installs the packages in this environment."
    )


def test_doctor_without_packages_reports_what_it_can(tmp_path: Path) -> None:
    """The report has the Python, every missing package and the ComfyUI folder, also as JSON of the usual form."""
    project = project_in(tmp_path / "project")
    python = bare_python(tmp_path / "bare")
    shown = started(python, "doctor", program=project / "main.py").stdout
    assert shown.startswith("Findings\n  x python packages: missing: PIL, click, ")
    assert "torch" in shown
    report = json.loads(started(python, "--mode", "doctor", "--json", program=project / "main.py").stdout)
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert (report["worst"], states["python"], states["python packages"], states["comfyui"]) == (
        "cross", "tick", "cross", "cross",
    )  # fmt: skip
    assert {frozenset(check) for check in report["checks"]} == {frozenset({"group", "name", "state", "found", "advice"})}


@pytest.mark.parametrize("python", OLD_PYTHONS, ids=lambda python: python.parts[-3])
def test_old_python(python: Path) -> None:
    """An old Python is named with its version, by every mode, without a traceback."""
    for arguments in MODES[:3]:
        done = started(python, *arguments)
        version = python.parts[-3]
        assert done.returncode == 3
        assert done.stderr.startswith(f"Error: {python} (Python {version}) is too old; Python 3.11 or newer is needed.\n")
        assert done.stderr.splitlines()[1].startswith(NEXT_STEPS)
        assert done.stderr.count("\n") == 2


def test_python_3_6_can_read_the_start() -> None:
    """The modules that run before the version is checked have the syntax of Python 3.6, without `annotations`."""
    for name in ("main.py", "latent_encoder/interpreter.py", "latent_encoder/__init__.py"):
        text = (PROJECT / name).read_text()
        ast.parse(text, feature_version=(3, 6))
        assert "__future__" not in text


def test_half_an_environment(tmp_path: Path) -> None:
    """With the packages of the start alone, standalone and Kafka mode name the others in one line; the help works."""
    start = [*START_PACKAGES, "annotated_types", "pydantic_core", "typing_extensions", "typing_inspection"]
    python = bare_python(tmp_path / "half", start)
    assert started(python, "--help").returncode == 0
    for arguments in MODES[:2]:
        done = started(python, *arguments)
        assert (done.returncode, done.stdout) == (3, "")
        errors = [line for line in done.stderr.splitlines() if not line.startswith("{")]
        assert len(errors) == 1
        assert errors[0].startswith(f"Error: {python} (Python {sys.version.split()[0]}) lacks torch, torchvision, numpy, ")
        assert "Run ./setup_comfyui.sh" in errors[0] or "Use the environment of this service: " in errors[0]
    done = started(python, "doctor", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["python packages"]["found"].startswith("missing: PIL, confluent_kafka, isal, ")
    assert checks["python packages"]["advice"].startswith(NEXT_STEPS)


@pytest.mark.parametrize("package", ["torch", "pydantic", "confluent_kafka"])
def test_package_that_cannot_be_imported(package: str, tmp_path: Path, run_main: RunMain) -> None:
    """A package whose import raises, as without a shared library, is one line with its name and the reason."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise OSError('libbroken.so.13: cannot open shared object file')")
    broken = {"PYTHONPATH": str(tmp_path)}
    for arguments in MODES[1:2] if package == "confluent_kafka" else MODES[:2]:
        done = run_main(*arguments, env=broken)
        assert (done.returncode, done.stdout) == (3, "")
        error = next(line for line in done.stderr.splitlines() if line.startswith("Error: "))
        assert f"cannot import {package}: libbroken.so.13: cannot open shared object file." in error
        assert "./setup_comfyui.sh" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("empty", [True, False])
def test_comfyui_that_is_missing_or_empty(empty: bool, tmp_path: Path, run_main: RunMain) -> None:
    """A ComfyUI folder that is missing or empty is one line with the next step, and a cross of the doctor."""
    tree = tmp_path / "comfyui"
    if empty:
        tree.mkdir()
    given = {"COMFYUI_PATH": str(tree), "HTTP_PORT": "0"}
    for arguments in MODES[:2]:
        done = run_main(*arguments, env=given)
        assert (done.returncode, done.stdout) == (3, "")
        errors = [line for line in done.stderr.splitlines() if not line.startswith("{")]
        assert len(errors) == 1
        assert errors[0].startswith(f"Error: No ComfyUI in {tree}: nodes.py, folder_paths.py, comfy missing. Run ./setup_")
    done = run_main("doctor", "--json", env=given)
    checks = {check["name"]: check["state"] for check in json.loads(done.stdout)["checks"]}
    assert (done.returncode, checks["comfyui"]) == (1, "cross")


def test_lists_have_every_package() -> None:
    """Each third-party package that the product imports is in a list, unless the product works without it."""
    optional = {"opentelemetry", "triton", "obstore"}
    ours = {file.stem for file in PROJECT.glob("*.py")} | {"latent_encoder"}
    imported: set[str] = set()
    for file in OUR_FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module)
    tops = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) - ours - optional
    assert tops == {*START_PACKAGES, *chain(*PACKAGES_OF_MODES.values())}


def test_status_is_that_of_the_others() -> None:
    """The status of a Python that is not fit is that of a service that cannot start."""
    assert EXIT_OF_INTERPRETER == EXIT_SERVICE_FAILED
