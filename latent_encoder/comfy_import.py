"""The import of a ComfyUI tree: with its configuration set first, and without its effects on our process.

ComfyUI configures itself while it is imported and keeps the configuration in module globals. So the device and the precision
are set before the import, and a process can have one tree.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from errors import SetupError
from latent_encoder.lazy_imports import lazy_imports
from utils import add_comfyui_directory_to_sys_path, import_custom_nodes_minimal

NODE_IDS = ("VAELoader", "LoadImage", "ImageScaleToTotalPixels", "VAEEncode")

NOT_USED = (
    "comfy.controlnet",
    "comfy.ldm.ace.*",
    "comfy.ldm.lightricks.vae.audio_vae",
    "comfy.model_base",
    "comfy.samplers",
    "comfy.sd1_clip",
    "comfy.sdxl_clip",
    "comfy.supported_models",
    "comfy.text_encoders.*",
    "kornia",
    "torch._dynamo",
    "torchaudio",
    "torchvision",
)
"""Modules that ComfyUI imports at its start and the four nodes never use. A release may lack some of them.

They are for sampling, text encoders, diffusion models, audio VAEs and image filters, and only they need transformers, scipy,
torchsde and torchaudio. torchvision and comfy_kitchen import torch's compiler (`torch._dynamo`), which takes a second.
"""


def import_nodes(path: Path, device: str, precision: str) -> None:
    """Import the modules of the tree at `path` that have the four nodes; modules that the nodes do not use wait.

    Raises:
        SetupError: torch does not have the device, or a node cannot be imported.
    """
    add_comfyui_directory_to_sys_path(path)
    with lazy_imports(*NOT_USED):
        _configure(importlib.import_module("comfy.cli_args").args, device, precision)
        import_custom_nodes_minimal(path, NODE_IDS)


def _configure(args: Any, device: str, precision: str) -> None:
    """Set ComfyUI's own options, which its modules read while they are imported."""
    accelerator = torch.accelerator.is_available()
    if device == "cuda" and not torch.cuda.is_available():
        raise SetupError(
            f"DEVICE=cuda, but torch {torch.__version__} finds no CUDA device; check the driver, or use DEVICE=auto."
        )
    args.cpu = device == "cpu" or not accelerator
    for name in ("fp32", "fp16", "bf16"):
        setattr(args, f"{name}_vae", name == precision)


def imported_version() -> str:
    """Return the version of the ComfyUI that this process has imported, or `unknown`."""
    try:
        return str(importlib.import_module("comfyui_version").__version__)
    except (ImportError, AttributeError):
        return "unknown"


def refuse_second_tree(path: Path) -> None:
    """Raise a SetupError if this process has loaded another tree than the one at `path`."""
    loaded = getattr(sys.modules.get("comfy"), "__path__", None)
    if loaded and Path(next(iter(loaded))).resolve() != (path / "comfy").resolve():
        raise SetupError(f"This process has loaded ComfyUI from {next(iter(loaded))} already; it cannot load {path} too.")


@contextmanager
def contained(path: Path) -> Iterator[None]:
    """Undo the effects of ComfyUI's import on the process: log handlers, warning filters, output, its entry in `sys.path`.

    Messages below ERROR are dropped, except at level DEBUG: they are about parts that never run here, such as torchaudio.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    if level > logging.DEBUG:
        root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        # A bare `import utils` or `import lora` must not find ComfyUI's modules of those names.
        inner = (path / "comfy").resolve()
        sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != inner]
