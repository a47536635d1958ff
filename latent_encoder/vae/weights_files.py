"""Files of weights, judged before anything loads them: for the price of a header, and of reading a pickle once.

torch unpickles plain weights alone, and runs nothing; but a pickle of some bytes can make it take any amount of memory.
"""

from __future__ import annotations

import mmap
import pickle
import zipfile
from pathlib import Path

from safetensors import safe_open

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
