"""The VAEs that are kept loaded: how a name is found, how long a VAE stays, and which one makes room for another."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from config import Settings
from errors import VaeModelInvalid, translated
from latent_encoder.comfy_runtime import ComfyRuntime
from latent_encoder.model_files import vae_not_found
from latent_encoder.telemetry.metrics import VAE_CACHE
from latent_encoder.vae.loaded_vae import LoadedVae
from latent_encoder.vae.loading import check_vae_files, load_vae

Key = tuple[str, ...]
"""The resolved paths of a VAE's files; its name if it has no file."""

Stamp = tuple[tuple[int, int, int], ...]
"""Inode, size in bytes and modification time in nanoseconds of each file. A file that is replaced gets another stamp."""


class VaeCache:
    """The VAEs used last, VAE_CACHE_SIZE of them at most. A VAE whose file was replaced is loaded again. Thread-safe."""

    def __init__(self, runtime: ComfyRuntime, settings: Settings) -> None:
        self._runtime = runtime
        self._settings = settings
        self._lock = threading.Lock()
        self._loaded: OrderedDict[Key, tuple[Stamp, LoadedVae]] = OrderedDict()
        """The least recently used VAE first."""

    def get(self, name: str) -> LoadedVae:
        """Return the VAE of that name, loaded now if it is not in the cache. Other threads wait while one is loaded.

        Raises:
            VaeModelNotFound: no model folder has it.
            VaeModelInvalid: it exists but cannot be used to encode images.
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
                del cached  # frees the memory of a replaced VAE before its successor is loaded
                cached = (stamp, self._load(name, files, stamp))
            self._loaded[key] = cached  # as the most recently used
            return cached[1]

    def loaded(self, name: str) -> LoadedVae | None:
        """Return the VAE of that name if it is in the cache. Its place in the cache and the metrics stay as they are."""
        with self._lock:
            return next((vae for _, vae in self._loaded.values() if vae.name == name), None)

    def _load(self, name: str, files: Sequence[Path], stamp: Stamp) -> LoadedVae:
        """Load a VAE after making room for it. Damaged files are refused first, because they must evict no sound VAE."""
        check_vae_files(name, files)
        while len(self._loaded) >= self._settings.vae_cache_size:
            self._loaded.popitem(last=False)
        vae = load_vae(self._runtime, name, files, self._settings)
        if _stamp(files) != stamp:
            raise VaeModelInvalid(f"VAE model {name} changed while it was being loaded; send the request again.")
        return vae


def find_vae_files(runtime: ComfyRuntime, name: str) -> list[Path]:
    """Return the files from which VAELoader loads the VAE of that name; none for `pixel_space`, which has no weights.

    Raises:
        VaeModelNotFound: with the folders that were searched, the files in them, and the ways to get a model.
    """
    files = runtime.vae_files(name)
    if files is None:
        raise vae_not_found(name, runtime.vae_folders(), runtime.vae_names(), runtime.vae_choices())
    return files


def _stamp(files: Sequence[Path]) -> Stamp:
    with translated(VaeModelInvalid, "Cannot read the VAE model"):
        return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for file in files))
