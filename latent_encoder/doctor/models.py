"""Checks of the model folders and of the VAE files in them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from config import Settings
from errors import RequestError, SetupError, one_line
from latent_encoder.comfy_runtime import ComfyRuntime
from latent_encoder.doctor.check import Check, Installation, cross, tick, warning
from latent_encoder.installer.download_vae import CHUNK_BYTES, QWEN_IMAGE_VAE
from latent_encoder.suggestions import FILE_NAMES, closest
from latent_encoder.vae.contents import model_kind
from latent_encoder.vae.families import Family, family_of
from latent_encoder.vae.loading import TRIAL_VAE, fault_of_tensors
from latent_encoder.vae.weights_files import UNREADABLE, read_shapes, unreadable
from service import LatentEncoder

KINDS = ("vae", "vae_approx")
"""ComfyUI's kinds of model folders; TAESD files are in the second."""
SLOW_S = 2.0
"""A file that takes longer to read gets a progress bar, so that nobody takes the doctor for hung."""
MAX_NAMES_SHOWN = 5
_TAESD_HALF = re.compile(r"(tae\w+)_(encoder|decoder)\..*")


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
    yield from _check_files(runtime, installation.settings)
    yield _default_vae(encoder, installation.settings.vae_model_name)


def _check_files(runtime: ComfyRuntime, settings: Settings) -> Iterator[Check]:
    """Yield a check for each VAE or damaged file; other files, of which a shared model folder has many, are one check.

    Only headers are read, because model folders hold many large files.
    """
    others = []
    for name, file in _files(runtime):
        check = check_file(runtime, name, file, settings)
        if isinstance(check, Check):
            yield check
        else:
            others.append(file.name if check is None else f"{file.name} ({check})")
    if others:
        names = ", ".join(others[:MAX_NAMES_SHOWN]) + (", …" if len(others) > MAX_NAMES_SHOWN else "")
        yield tick("other files", f"{len(others)} of no known VAE family: {names}")


def check_file(runtime: ComfyRuntime, name: str, file: Path, settings: Settings) -> Check | str | None:
    """Return the check of a VAE or of a damaged file; for another model its kind, such as `a LoRA`, or None."""
    try:
        shapes = read_shapes(file)
    except UNREADABLE as exc:
        reason = one_line(exc) if isinstance(exc, OSError) else unreadable(file, exc)
        found, _, advice = str(reason).partition("; ")
        return cross("vae file", f"{file} cannot be used: {found}", f"{_download(file.name)}{_sentence(advice)} Or remove it.")
    family = family_of(shapes, file.name)
    return model_kind(shapes) if family is None else _judged(runtime, name, file, family, settings)


def _judged(runtime: ComfyRuntime, name: str, file: Path, family: Family, settings: Settings) -> Check:
    """Report a VAE file: a cross if a request that names it is refused for its tensors, a warning if it is for no request."""
    found = f"{file}: {family.name}, {file.stat().st_size / 1e6:.1f} MB"
    if reason := family.fault(runtime.version):
        return warning("vae file", f"{found}; {reason}", "A request that names it is refused. Ignore this if none will.")
    if (files := runtime.vae_files(name)) is None:
        return warning("vae file", f"{found}; VAELoader offers it under no name", _how_to_offer(file))
    with runtime.contained():
        reason = fault_of_tensors(runtime, name, files, decodes=settings.roundtrip)
    if reason is not None:
        reason, _, advice = reason.partition("; ")
        return cross("vae file", f"{found}, cannot be used: {reason}", _download(file.name) + _sentence(advice))
    return _vae_file(file, found, settings)


def _how_to_offer(file: Path) -> str:
    """Return the advice for a file that no name leads to, such as one half of a pair."""
    if half := _TAESD_HALF.fullmatch(file.name):
        return f"It needs both halves: get {half[1]}_{'decoder' if half[2] == 'encoder' else 'encoder'} too."
    return f"Move it from the folder vae_approx to the folder vae: {file.parent}."


def _sentence(advice: str) -> str:
    """Return the next step in a reason as a sentence; a general one if it has none."""
    advice = advice or "get the file again"
    return f"{advice[0].upper()}{advice[1:]}."


def _folders(runtime: ComfyRuntime) -> list[Path]:
    """Return each searched folder once: MODEL_DIR is searched for both kinds, and a folder may be a symlink to another."""
    folders: dict[str, Path] = {}
    for folder in (folder for kind in KINDS for folder in runtime.vae_folders(kind)):
        folders.setdefault(os.path.realpath(folder), folder)  # no Path.resolve(): a loop of symlinks raises before Python 3.13
    return list(folders.values())


def _files(runtime: ComfyRuntime) -> list[tuple[str, Path]]:
    """Return each file of weights once, also if one searched folder lies in another, with the name that a request gives."""
    found: dict[Path, tuple[str, Path]] = {}
    for kind in KINDS:
        for name in runtime.vae_names(kind):
            if file := runtime.vae_file(name, kind):
                half = _TAESD_HALF.fullmatch(file.name)
                found.setdefault(file.resolve(), (half[1] if half else name, file))
    return sorted(found.values(), key=lambda entry: entry[1])


def _vae_file(file: Path, found: str, settings: Settings) -> Check:
    """Report a sound VAE file, and compare it with the published one if it has that name, size or is the default."""
    published = file.name == QWEN_IMAGE_VAE.name or file.stat().st_size == QWEN_IMAGE_VAE.size
    if not (published or file.name in (TRIAL_VAE, Path(settings.vae_model_name).name)):
        return tick("vae file", f"{found}, can be loaded")
    checksum = _sha256(file)
    found = f"{found}, can be loaded, SHA-256 {checksum}"
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
