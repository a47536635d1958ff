"""Files of weights before they are loaded: whether a file can be whole and harmless, and the shapes of its tensors.

Judging a safetensors file takes reading its header; judging a pickle takes searching its bytes once. With `weights_only` torch
runs no code from a pickle, but a pickle of a few bytes can still make it allocate any amount of memory.
"""

from __future__ import annotations

import mmap
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from errors import one_line

SAFETENSORS = (".safetensors", ".sft")  # ComfyUI reads files with these endings as safetensors, and all others as pickles

BYTEARRAY = b"bytearray"
"""A type that torch allows in a pickle and that no weights contain. `bytearray(10**11)` in a pickle allocates 100 GB."""

ZIP_SIGNATURE = b"PK\x03\x04"
"""The first bytes of a zip archive. torch.load reads a file with them as an archive, and any other as a plain pickle."""


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
        return {name: tuple(value.shape) for name, value in _unpickled(path).items() if hasattr(value, "shape")}
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # not a dict


def _unpickled(path: Path) -> Mapping[str, Any]:
    """Return the content of a file of torch.save, by name, with tensors on the meta device: shapes without values.

    If the file has an entry `state_dict`, the content is that entry's, as ComfyUI has it.
    """
    try:
        content = torch.load(path, weights_only=True, map_location="meta", mmap=zipfile.is_zipfile(path))
    except (RuntimeError, EOFError, ValueError, KeyError) as exc:
        raise pickle.UnpicklingError(one_line(exc)) from exc
    if not isinstance(content, Mapping):
        raise pickle.UnpicklingError(f"it holds a {type(content).__name__}, not tensors by name")
    inner = content.get("state_dict", content)
    return inner if isinstance(inner, Mapping) else content
