"""What the tests share beside fixtures: where things are, and small functions."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from config import Settings
from models import EncodeRequest

PROJECT = Path(__file__).resolve().parent.parent
COMFYUI = PROJECT / "comfyui"
IMAGES = PROJECT / "tests" / "fixtures" / "test_images"
TINY_VAE = "tiny_qwen_vae.safetensors"

PATIENCE_S = 240.0
"""How long a test waits for what must happen. It tells what hangs; a busy machine may be ten times as slow as an idle one."""


RunMain = Callable[..., "subprocess.CompletedProcess[str]"]
Encode = Callable[..., Any]


def stock(*arguments: str | Path, comfyui: Path = COMFYUI) -> None:
    """Run plain ComfyUI, without our code, in a process of its own."""
    command = [sys.executable, PROJECT / "tests" / "stock_comfyui.py", comfyui, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def clean_environment() -> dict[str, str]:
    """The environment without the service's settings, whatever the person who runs the tests has set.

    Nor has it PYTHONUNBUFFERED, with which Python has nothing to flush at its end, and no fault of it is seen.
    """
    variables = {"PYTHONUNBUFFERED", *(name.upper() for name in Settings.model_fields)}
    return {name: value for name, value in os.environ.items() if name not in variables}


def request_for(settings: Settings, folder: Path, image: str | Path, fields: Mapping[str, Any]) -> EncodeRequest:
    given = {"image_path": str(IMAGES / image), "output_dir": str(folder), "request_id": "test", **fields}
    return EncodeRequest.from_fields(given, settings.request_defaults)


def load_latent(path: str | Path) -> torch.Tensor:
    latent = torch.load(path, weights_only=True)
    assert isinstance(latent, torch.Tensor)
    return latent
