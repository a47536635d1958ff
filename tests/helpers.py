"""Paths and small functions that the tests share beside their fixtures."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from config import VARIABLES, Settings
from latent_encoder.requests import parse_request
from models import EncodeRequest
from tests.trees import PINNED_TREE, PROJECT, TINY_VAE, TREE, VAE

__all__ = ["COMFYUI", "IMAGES", "PATIENCE_S", "PROJECT", "TINY_VAE", "VAE", "Encode", "RunMain"]

COMFYUI = TREE
IMAGES = PROJECT / "tests" / "fixtures" / "test_images"

OUR_FILES = sorted([*PROJECT.glob("*.py"), *(PROJECT / "latent_encoder").rglob("*.py")])
"""Every Python file of the product."""
FEWEST_FILES = 70
"""The product has more files; a test that finds fewer looks in the wrong place."""
assert len(OUR_FILES) > FEWEST_FILES, "most of the product's files are not where the tests look for them"

PROCESS_SETTINGS: dict[str, str] = {} if TREE == PINNED_TREE else {"COMFYUI_PATH": str(TREE)}
"""Settings of every process that a test starts; not empty if the tests run on another tree than the pinned one."""

PATIENCE_S = 240.0
"""Longest wait of a test for something that must happen, in seconds; after it, the test takes it for hanging. A busy machine
may be ten times as slow as an idle one.
"""


RunMain = Callable[..., "subprocess.CompletedProcess[str]"]
Encode = Callable[..., Any]


def stock(*arguments: str | Path, comfyui: Path = COMFYUI) -> None:
    """Run plain ComfyUI, without our code, in a process of its own."""
    command = [sys.executable, PROJECT / "tests" / "stock_comfyui.py", comfyui, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def clean_environment() -> dict[str, str]:
    """Return the environment with `PROCESS_SETTINGS` in place of the settings of the person who runs the tests.

    PYTHONUNBUFFERED is left out: with it, Python has nothing to flush at its end, and tests of a failing flush show nothing.
    """
    variables = {"PYTHONUNBUFFERED", *(name.upper() for name in VARIABLES)}
    return {name: value for name, value in os.environ.items() if name not in variables} | PROCESS_SETTINGS


def interrupt(process: subprocess.Popen[str], *, main_thread: bool) -> None:
    """Send SIGINT to the main thread of a process or to its youngest thread. The system may choose any of them."""
    threads = sorted(int(task.name) for task in Path(f"/proc/{process.pid}/task").iterdir())
    chosen = process.pid if main_thread else threads[-1]
    assert ctypes.CDLL(None).tgkill(process.pid, chosen, signal.SIGINT) == 0


def request_for(settings: Settings, folder: Path, image: str | Path, fields: Mapping[str, Any]) -> EncodeRequest:
    given = {"image_path": str(IMAGES / image), "output_dir": str(folder), "request_id": "test", **fields}
    return parse_request(given, settings.request_defaults)


def load_latent(path: str | Path) -> torch.Tensor:
    latent = torch.load(path, weights_only=True)
    assert isinstance(latent, torch.Tensor)
    return latent
