"""Files of weights, judged before anything loads them: for the price of a header, and of reading a pickle once.

torch unpickles plain weights alone, and runs nothing; but a pickle of some bytes can make it take any amount of memory.
"""

from __future__ import annotations

import mmap
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from errors import one_line

SAFETENSORS = (".safetensors", ".sft")  # by these ComfyUI chooses how to read a file

# A plain value that torch allows in a pickle, made as large as its argument says. No weights have it.
BYTEARRAY = b"bytearray"


def check_weights_file(path: Path) -> None:
    """Refuse a file that cannot be whole, or that would take much more memory than its own size to read.

    Raises:
        SafetensorError: it is named as a safetensors file, and its header is not one or does not fit its size.
        pickle.UnpicklingError, zipfile.BadZipFile: it is not what torch.save writes.
        OSError: it cannot be read.
    """
    if path.suffix.lower() in SAFETENSORS:
        with safe_open(path, framework="pt"):
            return
    if _contains(path, BYTEARRAY):
        raise pickle.UnpicklingError(f"it names {BYTEARRAY.decode()}")
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"  # what torch goes by
    if is_archive:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > path.stat().st_size:
            raise pickle.UnpicklingError("it is compressed")


def _contains(path: Path, text: bytes) -> bool:
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return content.find(text) >= 0
        except ValueError:
            return False  # an empty file cannot be mapped


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a file of weights; of a safetensors file, no more than its header is read.

    Raises:
        SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, OSError: as `check_weights_file`.
    """
    check_weights_file(path)
    if path.suffix.lower() not in SAFETENSORS:
        return {name: tuple(value.shape) for name, value in _unpickled(path).items() if hasattr(value, "shape")}
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # it is no dict


def _unpickled(path: Path) -> Mapping[str, Any]:
    """The tensors by name in what torch.save wrote, without their values; under `state_dict` as ComfyUI looks for them."""
    import torch

    try:
        content = torch.load(path, weights_only=True, map_location="meta", mmap=zipfile.is_zipfile(path))
    except (RuntimeError, EOFError, ValueError, KeyError) as exc:
        raise pickle.UnpicklingError(one_line(exc)) from exc
    if not isinstance(content, Mapping):
        raise pickle.UnpicklingError(f"it holds a {type(content).__name__}, not tensors by name")
    inner = content.get("state_dict", content)
    return inner if isinstance(inner, Mapping) else content
