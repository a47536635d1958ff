"""The file formats of a latent: writing and reading each.

All hold the same float32 numbers. `.pt` is `torch.save` of the tensor `[batch, channels, height, width]`, and nothing else.
`.safetensors` holds it as its only tensor, `latent`. `.latent` is the format of ComfyUI's SaveLatent and LoadLatent. It has
ComfyUI's own shape: VAEs for video add a dimension for frames.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors_torch

from errors import LatentUnreadable, is_out_of_memory
from latent_encoder.outputs.marks import HEADER_KEY
from latent_encoder.outputs.names import SUFFIXES
from latent_encoder.vae.weights_files import check_weights_file
from models import FileFormat

TENSOR_NAMES: dict[FileFormat, str] = {"safetensors": "latent", "comfy": "latent_tensor"}

NOT_SCALED = "latent_format_version_0"
"""Name of an empty tensor: with it LoadLatent takes the latent as the VAE gave it, without it the node scales the latent."""

NOT_TORCH = "it is truncated, or not a plain tensor that torch.save wrote"
NOT_SAFETENSORS = "it is empty, truncated or not a safetensors file"


def latent_bytes(latent: torch.Tensor, latent_format: FileFormat, *, frames: bool, header: Mapping[str, Any]) -> bytes:
    """Return the content of a file with a float32 latent `[batch, channels, height, width]`. Equal arguments give equal bytes.

    `frames` is true if ComfyUI's own latent has a dimension for frames. `header` describes the latent in JSON's types; a `.pt`
    file has no place for it.
    """
    if latent_format == "pt":
        buffer = BytesIO()
        torch.save(latent, buffer)
        return buffer.getvalue()
    samples = latent.unsqueeze(2) if frames and latent_format == "comfy" else latent
    tensors = {TENSOR_NAMES[latent_format]: samples}
    if latent_format == "comfy":
        tensors[NOT_SCALED] = torch.empty(0)
    return safetensors_torch.save(tensors, {HEADER_KEY: json.dumps(header)})


def read_latent_file(path: Path, here: Callable[[Path], Path] = Path) -> tuple[torch.Tensor, FileFormat]:
    """Return the latent `[batch, channels, height, width]` in a file, in the file's precision, and the file's format.

    The suffix decides the format. No code in the file is run, even if it is a malicious pickle. `here` returns the file on
    this machine that has the content of `path`.

    Raises:
        LatentUnreadable: the file cannot be read, or holds no latent.
    """
    try:
        latent_format = format_of(path)
        file = here(path)
        if file.is_fifo():
            raise LatentUnreadable("it is a named pipe, not a file")
        if latent_format == "pt":
            with _reported(NOT_TORCH):
                check_weights_file(file)
        return read_latent(file.read_bytes(), latent_format), latent_format
    except (LatentUnreadable, OSError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise LatentUnreadable(f"Cannot read {path} as a latent: {reason}.") from exc


def format_of(path: Path) -> FileFormat:
    """Return the format that a file's suffix stands for.

    Raises:
        LatentUnreadable: it stands for none; the text gives the reason, without the file's name.
    """
    for latent_format, suffix in SUFFIXES.items():
        if path.suffix == suffix:
            return latent_format
    raise LatentUnreadable(f"its name ends in none of {', '.join(SUFFIXES.values())}")


def read_latent(data: bytes, latent_format: FileFormat) -> torch.Tensor:
    """Return the latent `[batch, channels, height, width]` in a file's bytes, in the file's precision.

    Raises:
        LatentUnreadable: they hold no latent; the text gives the reason, without the file's name.
    """
    if latent_format == "pt":
        with _reported(NOT_TORCH):
            return _four_dimensional(torch.load(BytesIO(data), map_location="cpu", weights_only=True))
    with _reported(NOT_SAFETENSORS):
        return _four_dimensional(_of_latent(safetensors_torch.load(data), latent_format))


@contextmanager
def _reported(fault: str) -> Iterator[None]:
    """Replace any foreign error by `fault`. torch's own text would advise to load the damaged file without checks."""
    try:
        yield
    except (LatentUnreadable, OSError):
        raise
    except Exception as exc:
        raise LatentUnreadable("memory ran out" if is_out_of_memory(exc) else fault) from exc


def _of_latent(tensors: Mapping[str, torch.Tensor], latent_format: FileFormat) -> torch.Tensor:
    name = TENSOR_NAMES[latent_format]
    if name not in tensors:
        raise LatentUnreadable(f"it has no tensor named {name}")
    if latent_format == "comfy" and NOT_SCALED not in tensors:
        raise LatentUnreadable("an early ComfyUI wrote it, which scaled latents; save it again with a newer SaveLatent")
    return tensors[name]


def _four_dimensional(stored: Any) -> torch.Tensor:
    """Return a file's tensor as a latent. A tensor that is not contiguous is refused: it could be far larger than its file."""
    if not isinstance(stored, torch.Tensor):
        raise LatentUnreadable(f"it holds no tensor, but an object of the type {type(stored).__name__}")
    latent = stored.squeeze(2) if stored.ndim == 5 else stored
    if latent.ndim != 4 or latent.numel() == 0:
        raise LatentUnreadable(f"its tensor of shape {list(stored.shape)} is not the latent of one image")
    if latent.layout != torch.strided or not (latent.is_cpu and latent.is_contiguous() and latent.is_floating_point()):
        raise LatentUnreadable("its tensor is not a plain, contiguous one of floating-point numbers")
    return latent.detach()
