"""Checks of the model folders and of the VAE files in them."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from tqdm import tqdm

from errors import RequestError, SetupError, one_line
from latent_encoder.comfy_runtime import ComfyRuntime
from latent_encoder.doctor.check import Check, Installation, cross, tick, warning
from latent_encoder.installer.download_vae import CHUNK_BYTES, QWEN_IMAGE_VAE
from latent_encoder.suggestions import FILE_NAMES, closest
from latent_encoder.vae.families import Family, family_of
from latent_encoder.vae.loading import TRIAL_VAE
from latent_encoder.vae.weights_files import read_shapes
from service import LatentEncoder

KINDS = ("vae", "vae_approx")
"""ComfyUI's kinds of model folders; TAESD files are in the second."""
SLOW_S = 2.0
"""A file that takes longer to read gets a progress bar, so that nobody takes the doctor for hung."""
MAX_NAMES_SHOWN = 5


def check_models(installation: Installation) -> Iterator[Check]:
    """Check each folder that is searched, the VAE files in it, and the default VAE."""
    encoder = installation.encoder
    if isinstance(encoder, SetupError):
        yield warning("model folder", "not searched, because ComfyUI does not load", "Fix the marked checks of ComfyUI first.")
        return
    runtime, model_dir = encoder.runtime, installation.settings.model_dir
    if model_dir is not None and not model_dir.is_dir():
        yield warning("model folder", f"{model_dir} does not exist", "Make it, or set MODEL_DIR to the folder of your models.")
    for folder in _folders(runtime):
        yield tick("model folder", f"{folder} is searched{'' if folder.is_dir() else ', but does not exist'}")
    yield from _check_files(runtime)
    yield _default_vae(encoder, installation.settings.vae_model_name)


def _check_files(runtime: ComfyRuntime) -> Iterator[Check]:
    """Yield a check for each VAE or damaged file; other files, of which a shared model folder has many, are one check."""
    others = []
    for file in _files(runtime):
        try:
            family = family_of(read_shapes(file), file.name)
        except (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, OSError) as exc:
            found = f"{file} is damaged, or has no plain weights: {one_line(exc)}"
            yield cross("vae file", found, _download(file.name) + "Get the file again, or remove it.")
            continue
        if family is None:
            others.append(file.name)
        else:
            yield _vae_file(file, family)
    if others:
        names = ", ".join(others[:MAX_NAMES_SHOWN]) + (", …" if len(others) > MAX_NAMES_SHOWN else "")
        yield tick("other files", f"{len(others)} of no known VAE family: {names}")


def _folders(runtime: ComfyRuntime) -> list[Path]:
    """Return each searched folder once: MODEL_DIR is searched for both kinds, and a folder may be a symlink to another."""
    folders: dict[str, Path] = {}
    for folder in (folder for kind in KINDS for folder in runtime.vae_folders(kind)):
        folders.setdefault(os.path.realpath(folder), folder)  # no Path.resolve(): a loop of symlinks raises before Python 3.13
    return list(folders.values())


def _files(runtime: ComfyRuntime) -> list[Path]:
    """Return each file of weights once, also if one searched folder lies in another."""
    found = (runtime.vae_file(name, kind) for kind in KINDS for name in runtime.vae_names(kind))
    return sorted({file.resolve(): file for file in found if file is not None}.values())


def _vae_file(file: Path, family: Family) -> Check:
    """Report a VAE file, and compare it with the published one if it has that name."""
    checksum = _sha256(file)
    found = f"{file}: {family.name}, {file.stat().st_size / 1e6:.1f} MB, SHA-256 {checksum}"
    if checksum == QWEN_IMAGE_VAE.sha256:
        return tick("vae file", f"{found}, the VAE of Qwen-Image as published")
    if file.name == QWEN_IMAGE_VAE.name:
        advice = f"{_download(file.name)}Ignore this if you made the file yourself."
        return warning("vae file", f"{found}, not the file that is published under this name", advice)
    return tick("vae file", f"{found}, for trying the service only" if file.name == TRIAL_VAE else found)


def _default_vae(encoder: LatentEncoder, name: str) -> Check:
    """Check that VAE_MODEL_NAME exists, and encodes a test image on this ComfyUI."""
    runtime = encoder.runtime
    if runtime.vae_files(name) is None:
        similar = closest(name, runtime.vae_choices(), FILE_NAMES)
        suggestion = f"Did you mean {similar}? " if similar else ""
        advice = f"{suggestion}{_download(name)}Set VAE_MODEL_NAME to another one, or MODEL_DIR to the folder that has it."
        return cross("default vae", f"{name} (VAE_MODEL_NAME) is in none of the folders", advice)
    try:
        vae = encoder.vaes.get(name)
    except RequestError as exc:
        return cross("default vae", str(exc).removesuffix("."), "Set VAE_MODEL_NAME to another one.")
    if name == TRIAL_VAE:
        advice = f"Run ./setup_comfyui.sh --download-vae and set VAE_MODEL_NAME={QWEN_IMAGE_VAE.name}."
        return warning("default vae", f"{name}: its latents mean nothing to a diffusion model", advice)
    return tick("default vae", f"{name} (VAE_MODEL_NAME) encodes a test image with the {vae.encoder} encoder")


def _download(name: str) -> str:
    return "./setup_comfyui.sh --download-vae gets it. " if name == QWEN_IMAGE_VAE.name else ""


def _sha256(file: Path) -> str:
    """Return the file's checksum, with a progress bar on a terminal after `SLOW_S`."""
    checksum = hashlib.sha256()
    size = file.stat().st_size
    bar = tqdm(total=size, desc=file.name, unit="B", unit_scale=True, delay=SLOW_S, leave=False, disable=None)
    with file.open("rb") as stream, bar:
        while chunk := stream.read(CHUNK_BYTES):
            checksum.update(chunk)
            bar.update(len(chunk))
    return checksum.hexdigest()
