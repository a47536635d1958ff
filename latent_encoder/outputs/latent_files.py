"""The formats of a latent's file: how each is written, and how it is read again.

All hold the same float32 numbers. `.pt` is `torch.save` of the tensor `[batch, channels, height, width]`, and nothing else.
`.safetensors` has it as the one tensor `latent`. `.latent` is what ComfyUI's SaveLatent writes and its LoadLatent opens, in
ComfyUI's own shape: with a dimension for frames where the VAE is one for video.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors_torch

from errors import LatentUnreadable, is_out_of_memory
from latent_encoder.vae.weights_files import check_weights_file
from models import FileFormat

SUFFIXES: dict[FileFormat, str] = {"pt": ".pt", "safetensors": ".safetensors", "comfy": ".latent"}
TENSOR_NAMES: dict[FileFormat, str] = {"safetensors": "latent", "comfy": "latent_tensor"}

# An empty tensor of this name tells LoadLatent that the latent is as the VAE gave it; without it, the node scales it.
AS_IT_IS = "latent_format_version_0"

# safetensors writes several keys of a header in an order that is a new one each time; what is in one key stays as it is.
HEADER_KEY = "latent_encoder"

NOT_TORCH = "it is truncated, or no plain tensor that torch.save wrote"
NOT_SAFETENSORS = "it is empty, truncated or not a safetensors file"


def latent_bytes(latent: torch.Tensor, latent_format: FileFormat, *, frames: bool, header: Mapping[str, Any]) -> bytes:
    """The file that holds a float32 latent `[batch, channels, height, width]`. Equal arguments give equal bytes.

    `frames` says whether ComfyUI's own latent has a dimension for frames. `header` is what to tell of the latent, in values
    that JSON has; a `.pt` has no place for it.
    """
    if latent_format == "pt":
        buffer = BytesIO()
        torch.save(latent, buffer)
        return buffer.getvalue()
    samples = latent.unsqueeze(2) if frames and latent_format == "comfy" else latent
    tensors = {TENSOR_NAMES[latent_format]: samples}
    if latent_format == "comfy":
        tensors[AS_IT_IS] = torch.empty(0)
    return safetensors_torch.save(tensors, {HEADER_KEY: json.dumps(header)})


def read_latent_file(path: Path) -> tuple[torch.Tensor, FileFormat]:
    """The latent `[batch, channels, height, width]` in a file, in the precision that it has there, and the file's format.

    The format is what the suffix tells.

    Raises:
        LatentUnreadable: it cannot be read, or holds no latent. Nothing in it is run, whatever it is.
    """
    try:
        latent_format = format_of(path)
        if path.is_fifo():
            raise LatentUnreadable("it is a named pipe, which would be waited for")
        if latent_format == "pt":
            with _said(NOT_TORCH):
                check_weights_file(path)
        return read_latent(path.read_bytes(), latent_format), latent_format
    except (LatentUnreadable, OSError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise LatentUnreadable(f"Cannot read {path} as a latent: {reason}.") from exc


def format_of(path: Path) -> FileFormat:
    """The format that a file's suffix stands for.

    Raises:
        LatentUnreadable: for none; the text says why, without the file's name.
    """
    for latent_format, suffix in SUFFIXES.items():
        if path.suffix == suffix:
            return latent_format
    raise LatentUnreadable(f"its name ends in none of {', '.join(SUFFIXES.values())}")


def read_latent(data: bytes, latent_format: FileFormat) -> torch.Tensor:
    """The latent `[batch, channels, height, width]` in a file's bytes, in the precision that it has there.

    Raises:
        LatentUnreadable: it is none; the text says why, without the file's name.
    """
    if latent_format == "pt":
        with _said(NOT_TORCH):
            return _four_dimensional(torch.load(BytesIO(data), map_location="cpu", weights_only=True))
    with _said(NOT_SAFETENSORS):
        return _four_dimensional(_of_latent(safetensors_torch.load(data), latent_format))


@contextmanager
def _said(fault: str) -> Iterator[None]:
    """Whatever foreign code raises of a damaged file means `fault`: its own text misleads, torch's to load it unchecked."""
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
    if latent_format == "comfy" and AS_IT_IS not in tensors:
        raise LatentUnreadable("it is of an early ComfyUI, which scaled latents; save it again with a newer one's SaveLatent")
    return tensors[name]


def _four_dimensional(stored: Any) -> torch.Tensor:
    """What a file held, as a latent. A tensor that is not contiguous could be far larger than its file."""
    if not isinstance(stored, torch.Tensor):
        raise LatentUnreadable(f"it holds no tensor but something else ({type(stored).__name__})")
    latent = stored.squeeze(2) if stored.ndim == 5 else stored
    if latent.ndim != 4 or latent.numel() == 0:
        raise LatentUnreadable(f"its tensor of shape {list(stored.shape)} is not the latent of one image")
    if latent.layout != torch.strided or not (latent.is_cpu and latent.is_contiguous() and latent.is_floating_point()):
        raise LatentUnreadable("its tensor is not a plain, contiguous one of floating-point numbers")
    return latent.detach()
