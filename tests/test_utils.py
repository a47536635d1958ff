"""Tests of the shared utilities, and of ComfyUI and our code in one process."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from errors import SetupError
from latent_encoder.comfy_node import Node
from latent_encoder.comfy_runtime import load_runtime
from service import LatentEncoder
from tests.helpers import COMFYUI, OUR_FILES, PROJECT
from tests.trees import FACTS
from utils import add_comfyui_directory_to_sys_path, find_path, get_value_at_index, import_custom_nodes_minimal

pytestmark = pytest.mark.core


class Required:
    """A node of the older style that requires more than an image."""

    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple[object, ...]]]:  # noqa: N802
        return {"required": {"image": ("IMAGE",), "steps": ("INT", {"default": 3}), "choice": (["a", "b"],)}}

    def run(self, **inputs: object) -> tuple[object, ...]:
        return (inputs,)


def test_value_is_taken_from_every_kind_of_output(encoder: LatentEncoder) -> None:
    """`get_value_at_index` takes a tuple, a mapping with `result`, and the V3 NodeOutput of the real runtime."""
    node_output = importlib.import_module("comfy_api.latest").io.NodeOutput("a", "b")
    for output in (("a", "b"), {"ui": {}, "result": ("a", "b")}, node_output):
        assert get_value_at_index(output, 1) == "b"
        with pytest.raises(IndexError):
            get_value_at_index(output, 2)
    assert encoder.runtime.version == FACTS.version


def test_path_of_comfyui_is_absolute_or_refused(tmp_path: Path) -> None:
    """A folder without ComfyUI is refused with the missing entries and the two ways to get a tree."""
    assert find_path(COMFYUI) == COMFYUI
    with pytest.raises(SetupError, match=r"nodes\.py, folder_paths\.py, comfy missing.*setup_comfyui\.sh.*COMFYUI_PATH"):
        find_path(tmp_path)


def test_inputs_that_a_newer_node_adds_take_their_declared_defaults() -> None:
    """An input that we do not supply and that has no default is refused by its name."""
    assert Node("Required", Required, ("image", "choice"))(image=1, choice="b") == {"steps": 3, "image": 1, "choice": "b"}
    with pytest.raises(SetupError, match=r"node Required requires choice, which has no default \(tested releases: "):
        Node("Required", Required, ("image",))


def test_second_tree_in_one_process_is_refused(encoder: LatentEncoder, tmp_path: Path) -> None:
    """ComfyUI keeps its configuration in module globals: another tree cannot be loaded beside it."""
    for name in ("nodes.py", "folder_paths.py", "comfy"):
        (tmp_path / name).mkdir()
    with pytest.raises(SetupError, match=f"has loaded ComfyUI from {encoder.runtime.path}.* already"):
        load_runtime(tmp_path, "cpu", "auto")


def test_device_that_is_not_there_is_refused() -> None:
    """DEVICE=cuda on a machine without a CUDA device is an error, not a silent fallback."""
    import torch

    if torch.cuda.is_available():
        assert load_runtime(COMFYUI, "cuda", "auto")
    else:
        with pytest.raises(SetupError, match=r"DEVICE=cuda, but torch .* finds no CUDA device"):
            load_runtime(COMFYUI, "cuda", "auto")


def test_names_that_both_have_lead_to_each_its_own(encoder: LatentEncoder) -> None:
    """With ComfyUI loaded, `utils` and `main` are ours, and `utils.json_util` is ComfyUI's."""
    assert encoder.runtime.path == COMFYUI
    for name in ("utils", "main"):
        assert Path(str(importlib.import_module(name).__file__)).parent == PROJECT
    assert Path(str(importlib.import_module("utils.json_util").__file__)).parent == COMFYUI / "utils"
    assert str(COMFYUI / "comfy") not in sys.path


def test_entering_the_tree_twice_changes_nothing(encoder: LatentEncoder) -> None:
    """`sys.path` has the tree once, at the end."""
    add_comfyui_directory_to_sys_path(encoder.runtime.path)
    assert sys.path.count(str(COMFYUI)) == 1


def test_set_up_leaves_logging_and_warnings_alone(encoder: LatentEncoder) -> None:
    """Loading ComfyUI leaves no log handler, log level or warning filter behind."""
    root = logging.getLogger()
    before = (root.handlers[:], root.level, warnings.filters[:])
    load_runtime(encoder.runtime.path, "cpu", "auto")
    assert (root.handlers[:], root.level, warnings.filters[:]) == before


def test_importing_our_modules_does_nothing() -> None:
    """Importing all our modules loads no ComfyUI, adds no handler or thread, changes no `sys.path`, and prints nothing."""
    ours = ", ".join(".".join(file.relative_to(PROJECT).with_suffix("").parts) for file in OUR_FILES)
    code = (
        f"import sys, logging, threading; before = sys.path[:]; import {ours}\n"
        "assert sys.path == before and not logging.getLogger().handlers and threading.active_count() == 1\n"
        "assert not {'comfy', 'nodes', 'folder_paths'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_custom_node_packages_are_loaded_by_name(encoder: LatentEncoder) -> None:
    """A package in `custom_nodes/` adds its nodes; a missing package is named in the error."""
    classes = import_custom_nodes_minimal(encoder.runtime.path, (), ["websocket_image_save"])
    assert "SaveImageWebsocket" in classes
    with pytest.raises(SetupError, match=r"No custom node package 'nowhere' in .*custom_nodes; CUSTOM_NODES names it"):
        import_custom_nodes_minimal(encoder.runtime.path, (), ["nowhere"])


def test_node_that_no_module_has_is_named(encoder: LatentEncoder) -> None:
    """The error names the node and the releases that have it."""
    with pytest.raises(SetupError, match=r"has no node NoSuchNode: no module in comfy_extras/ has it \(tested releases: "):
        import_custom_nodes_minimal(encoder.runtime.path, ["NoSuchNode"])
