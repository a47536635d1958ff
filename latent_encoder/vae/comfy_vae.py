"""ComfyUI's VAE object for the files of a VAE, by VAELoader; also for Wan's VAEs in the names of diffusers, which it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from latent_encoder.comfy_runtime import ComfyRuntime, Vae
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.vae.diffusers_names import has_wan_names, native_names
from latent_encoder.vae.weights_files import read_shapes

log = get_logger("latent_encoder")


def vae_from(runtime: ComfyRuntime, name: str, files: Sequence[Path]) -> Vae:
    """Return the VAE that VAELoader loads by this name from these files. Errors are VAELoader's own."""
    if len(files) != 1 or not has_wan_names(shapes := read_shapes(files[0])):
        return runtime.load_vae(name)
    log.info("vae has the names of diffusers", vae=name)
    return runtime.vae_of(runtime.read_weights(files[0]), native_names(shapes))
