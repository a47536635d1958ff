"""Recognising the service's own files, wherever they lie: by their names, and by the files beside them or a mark in them."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latent_encoder.outputs.locks import PREFIX
from latent_encoder.outputs.marks import MARKED_BYTES, has_mark
from latent_encoder.outputs.names import LATENT_NAME, SUFFIXES
from models import IMAGE_FILES

OWN_IMAGE = re.compile(rf"(?:{'|'.join(IMAGE_FILES)})_(.+)\.png", re.DOTALL)

ALWAYS = {"original_image_shape", "scaled_image_shape", "latent_shape", "vae_model_name"}
"""The fields that the metadata of every version have."""

LARGEST_METADATA = 65_536
"""Bytes. Ours have 2 kB and the path of an image, at most 24 kB."""


def is_own_file(
    folder: Path, name: str, is_there: Callable[[str], bool], beginning: Callable[[Path, int], bytes] | None = None
) -> bool:
    """Return whether the service wrote the file of that name in a folder; `is_there` tells if the folder has a name.

    `beginning` returns the first bytes of a file; by default of one on disk.

    An image counts as ours if our metadata or the latent of its request lie beside it: a process that was killed may have left
    no metadata. If it was moved away from them, its mark tells; older versions wrote none. A user's image with such a name has
    none of these. A latent, its metadata and its page are known by each other, or by their marks.
    """
    beginning = beginning or _beginning
    if name.startswith(PREFIX):
        return True
    if image := OWN_IMAGE.fullmatch(name):
        latents = [f"latent_{image[1]}{suffix}" for suffix in SUFFIXES.values()]
        if any(map(is_there, latents)):
            return True
        described = any(
            is_there(f"{latent}.json") and _is_metadata(folder / f"{latent}.json", beginning) for latent in latents
        )
        return described or _is_marked(folder / name, beginning)
    if LATENT_NAME.fullmatch(name):
        return is_there(f"{name}.json") or _is_marked(folder / name, beginning)
    latent, _, ending = name.rpartition(".")
    if ending == "html":
        return (is_there(latent) and LATENT_NAME.fullmatch(latent) is not None) or _is_marked(folder / name, beginning)
    return (
        ending == "json"
        and LATENT_NAME.fullmatch(latent) is not None
        and (is_there(latent) or _is_metadata(folder / name, beginning))
    )


def _is_marked(path: Path, beginning: Callable[[Path, int], bytes]) -> bool:
    return has_mark(path.name, beginning(path, MARKED_BYTES))


def _is_metadata(path: Path, beginning: Callable[[Path, int], bytes]) -> bool:
    try:
        fields: Any = json.loads(beginning(path, LARGEST_METADATA))
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and fields.keys() >= ALWAYS


def _beginning(path: Path, size: int) -> bytes:
    """Return the first bytes of a regular file; none if it cannot be read."""
    try:
        with open(path, "rb", opener=_opened) as file:
            return file.read(size) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
    except OSError:
        return b""


def _opened(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a named pipe must not wait for its writer
