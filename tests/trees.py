"""The ComfyUI tree that the tests run on, and the tests that run on a tree that is not the pinned release.

By default it is the pinned release in `comfyui/`, and every test runs. The variable `TEST_COMFYUI_TREE`, which
`scripts/check.sh --comfyui-tree DIR` sets, names a tree on which only the core runs: the tests with the marker `core`. Those
of them that have the marker `pinned_release` are skipped on another tree than the pinned one; the marker has the reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

PROJECT = Path(__file__).resolve().parent.parent
VARIABLE = "TEST_COMFYUI_TREE"
PINNED_TREE = PROJECT / "comfyui"
TREE = Path(os.environ.get(VARIABLE) or PINNED_TREE).absolute()
IS_PINNED = TREE.resolve() == PINNED_TREE.resolve()
CORE_ONLY = bool(os.environ.get(VARIABLE))
FACTS_VARIABLE = "TEST_COMFYUI_TREE_FACTS"

# Files of the core, each with the least number of its tests that belong to the core. `project/test_check_on_trees.py` counts
# them, so that a file or a test that drops out of the core is noticed.
CORE = {
    "cli/test_cli.py": 3,
    "doctor/test_doctor.py": 17,
    "telemetry/test_health.py": 3,
    "images/test_jpeg.py": 14,
    "images/test_notes.py": 50,
    "images/test_source.py": 60,
    "images/test_transparency.py": 140,
    "kafka/test_handler.py": 14,
    "test_isolation.py": 14,
    "test_lazy_imports.py": 3,
    "test_other_trees.py": 1,
    "test_service.py": 17,
    "installer/test_setup.py": 7,
    "installer/test_setup_of_a_tree.py": 3,
    "vae/test_latent_statistics.py": 60,
    "vae/test_single_frame.py": 18,
    "vae/test_stock_equality.py": 78,
    "vae/test_tiling.py": 19,
    "vae/test_tiny_vaes.py": 8,
    "test_utils.py": 11,
    "vae/test_files.py": 35,
    "vae/test_diffusers_names.py": 8,
    "vae/test_wrong_files.py": 70,
    "vae/test_zoo.py": 91,
}


@dataclass(frozen=True)
class TreeFacts:
    """The behaviour of plain ComfyUI of a tree, without our code."""

    version: str
    loads_tiny_vae: bool
    """Releases before 0.3.75 assume the width of the full-size Wan VAE, and the tiny one is narrower."""
    has_pixel_space: bool
    has_resolution_steps: bool
    """Releases of 2026 can scale to multiples of a number of pixels."""


PINNED_FACTS = TreeFacts(version="0.3.75", loads_tiny_vae=True, has_pixel_space=True, has_resolution_steps=False)


def observe(tree: Path) -> TreeFacts:
    """Return the facts of a tree, asked of its own nodes in a process without our code.

    Raises:
        UsageError: the tree cannot be run.
    """
    with TemporaryDirectory() as folder:
        command = [sys.executable, str(PROJECT / "tests" / "stock_comfyui.py"), str(tree), "describe", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise pytest.UsageError(f"{tree} is no ComfyUI that this Python can run: {done.stderr}")
    return TreeFacts(**json.loads(done.stdout.splitlines()[-1]))


def _facts() -> TreeFacts:
    """Return the facts of `TREE`; processes that this one starts read them from the environment."""
    if IS_PINNED:
        return PINNED_FACTS
    if FACTS_VARIABLE not in os.environ:
        os.environ[FACTS_VARIABLE] = json.dumps(asdict(observe(TREE)))
    return TreeFacts(**json.loads(os.environ[FACTS_VARIABLE]))


FACTS = _facts()

TINY_VAE = "tiny_qwen_vae.safetensors"
FULL_SIZE_VAE = "random_wan.safetensors"
VAE = TINY_VAE if FACTS.loads_tiny_vae else FULL_SIZE_VAE
"""The VAE of tests that need any VAE of the Wan family."""

LACKING = [*([] if FACTS.loads_tiny_vae else [TINY_VAE]), *([] if FACTS.has_pixel_space else ["pixel_space"])]
"""VAEs of the tests that plain ComfyUI of this tree cannot load."""

needs_tiny_vae = pytest.mark.skipif(TINY_VAE in LACKING, reason=f"ComfyUI {FACTS.version} cannot load the tiny VAE")
needs_pixel_space = pytest.mark.skipif("pixel_space" in LACKING, reason=f"ComfyUI {FACTS.version} has no pixel_space")


def is_wanted(item: pytest.Item) -> bool:
    """Return whether a test belongs to the core, or all tests run."""
    return not CORE_ONLY or item.get_closest_marker("core") is not None


def skip_what_holds_for_the_pinned_release(item: pytest.Item) -> None:
    """Skip a test with the marker `pinned_release` on another tree, with the marker's reason."""
    marker = item.get_closest_marker("pinned_release")
    if marker is not None and not IS_PINNED:
        item.add_marker(pytest.mark.skip(reason=f"holds for the pinned release alone: {marker.kwargs['reason']}"))
