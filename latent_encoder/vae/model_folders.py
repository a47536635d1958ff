"""The folders that are searched for VAE files."""

from __future__ import annotations

from pathlib import Path

from config import PROJECT_DIR
from latent_encoder.comfy_runtime import ComfyRuntime

KINDS = ("vae", "vae_approx")  # ComfyUI's names of the folders: whole VAEs, and the encoder/decoder pairs of TAESD


def search_model_folders(runtime: ComfyRuntime, model_dir: Path | None) -> None:
    """Let ComfyUI search MODEL_DIR first, then its own folders, then those of our `comfyui/`, which may be another tree."""
    for kind in KINDS:
        runtime.search_vae_folder(PROJECT_DIR / "comfyui" / "models" / kind, kind)
        if model_dir is not None:
            runtime.search_vae_folder(model_dir / kind, kind, first=True)
            runtime.search_vae_folder(model_dir, kind, first=True)
