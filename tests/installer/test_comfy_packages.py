"""Tests of the packages that a tree needs: all at once, with the versions that it asks for, and no others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from config import Settings
from latent_encoder.doctor.check import Check, Installation, State
from latent_encoder.doctor.comfyui import check_packages
from latent_encoder.installer.comfy_packages import unsatisfied_packages
from latent_encoder.installer.placing import copy as copy_entry
from latent_encoder.installer.placing import place_runtime
from tests.helpers import COMFYUI, PROJECT

NODES = """
import no_such_first
try:
    import no_such_tolerated
except ImportError:
    no_such_tolerated = None
from no_such_second import deep
import no_such_second.deeper as deeper
class Mine(no_such_first.Base): pass
@deep.decorated("with", argument=1)
@deeper.decorated
def function(image: no_such_first.Image | None) -> None: pass
table = [deep.entries["x"], *no_such_first.entries()]
"""

EXTRAS = """
import no_such_third
"""

REQUIREMENTS = """
No_Such.First==1.0  # with a comment
no-such-second>=2.5
no-such-second<1; python_version < "3.0"
no-such-tolerated
einops>=999
transformers>=999
torch>=999
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a copy of the pinned release that a test may change."""
    place_runtime(COMFYUI, tmp_path, copy_entry)
    return tmp_path


def append(file: Path, text: str) -> None:
    with file.open("a") as opened:
        opened.write(text)


def run(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROJECT / "latent_encoder" / "installer" / "comfy_packages.py"), str(tree)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def check(tree: Path) -> list[Check]:
    settings = Settings(_env_file=None, comfyui_path=tree)
    return list(check_packages(Installation(settings, dict.fromkeys(Settings.model_fields, "default"))))


def test_pinned_release_has_all() -> None:
    """The environment of the tests has all packages of the pinned release, and the doctor's check is a tick."""
    done = run(COMFYUI)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [found.state for found in check(COMFYUI)] == [State.TICK]


def test_all_that_is_needed_is_listed_at_once(tree: Path) -> None:
    """Missing and outdated packages are listed as the tree states them, without optional and delayed ones and torch."""
    append(tree / "nodes.py", NODES)
    append(tree / "comfy_extras" / "nodes_post_processing.py", EXTRAS)
    append(tree / "requirements.txt", REQUIREMENTS)
    done = run(tree)
    assert done.stdout.splitlines() == ["No_Such.First==1.0", "einops>=999", "no-such-second>=2.5", "no-such-third"]
    assert done.stderr == "This ComfyUI asks for torch>=999, which is not installed; run ./setup_comfyui.sh.\n"
    assert done.returncode == 0


def test_what_was_found_is_listed_where_loading_cannot_go_on(tree: Path) -> None:
    """If loading cannot go on, the packages found so far are listed, and standard error warns that more may be needed."""
    append(tree / "nodes.py", "\nimport no_such_first\nnumber = int(no_such_first.number)\nimport no_such_second\n")
    done = run(tree)
    assert done.stdout == "no-such-first\n"
    assert done.stderr.startswith("More may be needed, because loading ended early: int() argument must be")


def test_fault_of_the_tree_is_no_package(tree: Path) -> None:
    """A missing module of the tree's own, and the tree's output, are not listed; the doctor's next check reports the fault."""
    append(tree / "nodes.py", "\nprint('printed')\nimport comfy.no_such_module\n")
    packages = unsatisfied_packages(tree)
    assert (packages.wanted, packages.by_setup) == ([], [])
    assert packages.stopped_by == "No module named 'comfy.no_such_module'"
    assert [found.state for found in check(tree)] == [State.WARNING]


def test_doctor_says_how_to_install_what_is_missing(tree: Path) -> None:
    """The doctor names one command that installs all missing packages."""
    append(tree / "nodes.py", "\nimport no_such_first\n")
    append(tree / "requirements.txt", "\neinops>=999\nno-such-first>=1.5\n")
    (found,) = check(tree)
    assert (found.name, found.state) == ("packages", State.CROSS)
    assert found.found == "missing or too old: einops>=999, no-such-first>=1.5"
    assert found.advice == f"Install them with: {sys.executable} -m pip install 'einops>=999' 'no-such-first>=1.5'"


def test_folder_without_comfyui_is_an_error(tmp_path: Path) -> None:
    """A folder without ComfyUI is an error on standard error, with exit status 1."""
    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: No ComfyUI in {tmp_path}: ")
