"""The VAEs that are kept loaded: found in the model folders, kept while they are used, evicted for others."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from config import Settings
from errors import VaeModelInvalid, VaeModelNotFound, translated
from latent_encoder.comfy_runtime import ComfyRuntime
from latent_encoder.suggestions import FILE_NAMES, closest
from latent_encoder.telemetry.metrics import VAE_CACHE
from latent_encoder.vae.loaded_vae import LoadedVae
from latent_encoder.vae.loading import check_vae_files, load_vae

MAX_NAMES_SHOWN = 20

Stamp = tuple[tuple[int, int, int], ...]


class VaeCache:
    """The VAEs that were used last, as many as VAE_CACHE_SIZE. A file that was replaced is loaded anew. Thread-safe."""

    def __init__(self, runtime: ComfyRuntime, settings: Settings) -> None:
        self._runtime = runtime
        self._settings = settings
        self._lock = threading.Lock()
        self._loaded: OrderedDict[tuple[str, ...], tuple[Stamp, LoadedVae]] = OrderedDict()

    def get(self, name: str) -> LoadedVae:
        """The VAE of that name.

        Raises:
            VaeModelNotFound: no model folder has it.
            VaeModelInvalid: it is there but cannot be used to encode images.
            EncodingFailed: memory ran out while loading it.
        """
        with self._lock:
            files = find_vae_files(self._runtime, name)
            key = tuple(str(file.resolve()) for file in files) or (name,)
            stamp = _stamp(files)
            cached = self._loaded.pop(key, None)
            hit = cached is not None and cached[0] == stamp
            VAE_CACHE.labels("hit" if hit else "miss").inc()
            if cached is None or not hit:
                check_vae_files(name, files)  # a file that is damaged on its face shall push out no sound VAE
                del cached  # the replaced one's memory goes before the new one's comes
                while len(self._loaded) >= self._settings.vae_cache_size:
                    self._loaded.popitem(last=False)
                cached = (stamp, load_vae(self._runtime, name, files, self._settings))
                if _stamp(files) != stamp:
                    raise VaeModelInvalid(f"VAE model {name} changed while it was being loaded; send the request again.")
            self._loaded[key] = cached
            return cached[1]


def find_vae_files(runtime: ComfyRuntime, name: str) -> list[Path]:
    """The files that the VAE of that name is loaded from; none for `pixel_space`.

    Raises:
        VaeModelNotFound: with where was looked, what is there and what to do.
    """
    files = runtime.vae_files(name)
    if files is None:
        raise VaeModelNotFound(_not_found(runtime, name))
    return files


def _not_found(runtime: ComfyRuntime, name: str) -> str:
    names = runtime.vae_names()
    there = ", ".join(names[:MAX_NAMES_SHOWN]) or "none"
    if len(names) > MAX_NAMES_SHOWN:
        there += f" and {len(names) - MAX_NAMES_SHOWN} more"
    folders = ", ".join(map(str, runtime.vae_folders()))
    meant = closest(name, runtime.vae_choices(), FILE_NAMES)
    suggestion = "" if meant is None else f" Did you mean {meant}?"
    return (
        f"VAE model not found: {name}.{suggestion} Looked in: {folders}. VAE files there: {there}. "
        "Run ./setup_comfyui.sh --download-vae for qwen_image_vae.safetensors, or set MODEL_DIR to the folder of your models."
    )


def _stamp(files: Sequence[Path]) -> Stamp:
    """Inode, size and modification time of each file: what tells that it was replaced."""
    with translated(VaeModelInvalid, "Cannot read the VAE model"):
        return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for file in files))
