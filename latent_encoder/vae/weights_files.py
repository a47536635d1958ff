"""Files of weights before they are loaded: whether a file can be whole and harmless, and its tensors without their values.

Judging a safetensors file takes reading its header; judging a pickle takes searching its bytes once. With `weights_only` torch
runs no code from a pickle, but a pickle of a few bytes can still make it allocate any amount of memory.
"""

from __future__ import annotations

import mmap
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from errors import one_line
from latent_encoder.vae.contents import AGAIN, SAFETENSORS, is_safetensors, kind_of_bytes, kind_of_safetensors

BYTEARRAY = b"bytearray"
"""A type that torch allows in a pickle and that no weights contain. `bytearray(10**11)` in a pickle allocates 100 GB."""

ZIP_SIGNATURE = b"PK\x03\x04"
"""The first bytes of a zip archive. torch.load reads a file with them as an archive, and any other as a plain pickle."""


UNREADABLE = (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, OSError)
"""The errors that reading the tensors of a file raises."""

PICKLED = f"it is a pickle that holds more than plain weights, or a damaged one; {AGAIN}, or get the model as safetensors"


def check_weights_file(path: Path) -> None:
    """Raise an error for a file that cannot be whole, or that would take much more memory to read than its own size.

    Raises:
        SafetensorError: its name ends like that of a safetensors file, but its header is damaged or does not fit its size.
        pickle.UnpicklingError: it may allocate memory beyond its size when it is unpickled.
        zipfile.BadZipFile: it begins like an archive of torch.save but is damaged.
        OSError: it cannot be read.
    """
    if path.suffix.lower() in SAFETENSORS:
        with safe_open(path, framework="pt"):
            return
    if _contains(path, BYTEARRAY):
        raise pickle.UnpicklingError(f"it names {BYTEARRAY.decode()}")
    with path.open("rb") as file:
        is_archive = file.read(len(ZIP_SIGNATURE)) == ZIP_SIGNATURE
    if is_archive:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > path.stat().st_size:  # torch.save stores without compression
            raise pickle.UnpicklingError("it is compressed")


def _contains(path: Path, text: bytes) -> bool:
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return content.find(text) >= 0
        except ValueError:
            return False  # mmap raises it for an empty file


def unreadable(path: Path, error: Exception | None = None) -> str | None:
    """Return the reason why a file cannot be read as weights, with the next step; None if no reason is known.

    Without the `error` of reading it, only files of a known other format have one.

    Raises:
        OSError: it cannot be read.
    """
    if path.suffix.lower() in SAFETENSORS:
        return None if error is None else kind_of_safetensors(path, one_line(error))
    if is_safetensors(path):
        return f"it is a safetensors file whose name ends in {path.suffix}; rename it so that it ends in .safetensors"
    return kind_of_bytes(path) or (None if error is None else PICKLED)


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in a file of weights, by the tensor's name.

    Of a safetensors file, only the header is read.

    Raises:
        SafetensorError: it is not a whole safetensors file.
        pickle.UnpicklingError: it is not a pickle of plain tensors by name, or may allocate memory beyond its size.
        zipfile.BadZipFile: it is a damaged archive.
        OSError: it cannot be read.
    """
    check_weights_file(path)
    if path.suffix.lower() not in SAFETENSORS:
        return {name: tuple(value.shape) for name, value in _unpickled(path).items()}
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # not a dict


def read_hollow(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of a file of weights on the meta device, without their values, and the texts in its header.

    It raises the same errors as `read_shapes`.
    """
    check_weights_file(path)
    if path.suffix.lower() not in SAFETENSORS:
        return _unpickled(path), {}
    with safe_open(path, framework="pt") as file:  # a tensor is mapped from the file, and its values are not read
        names = file.keys()
        return {name: file.get_tensor(name).to("meta") for name in names}, file.metadata() or {}


def _unpickled(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in a file of torch.save, by name, on the meta device: shapes without values.

    If the file has an entry `state_dict`, they are that entry's, as ComfyUI has it.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # also of damaged files: a fault says it all
            content = torch.load(path, weights_only=True, map_location="meta", mmap=zipfile.is_zipfile(path))
    except (RuntimeError, EOFError, ValueError, KeyError) as exc:
        raise pickle.UnpicklingError(one_line(exc)) from exc
    if not isinstance(content, Mapping):
        raise pickle.UnpicklingError(f"it holds a {type(content).__name__}, not tensors by name")
    inner = content.get("state_dict", content)
    tensors: Mapping[Any, Any] = inner if isinstance(inner, Mapping) else content
    return {name: value for name, value in tensors.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}
