"""The way from a VAE's files to a `LoadedVae`: judged, loaded by ComfyUI, checked, given its encoder, tried on an image.

A file that fails on this way becomes a `VaeModelInvalid` that names it, the reason and the next step. The doctor judges files
by the same functions.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from config import Settings
from errors import VaeModelInvalid, is_device_lost, is_out_of_memory, one_line, translated
from latent_encoder.comfy_runtime import ComfyRuntime, Vae
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.vae.checks import NAMES_SHOWN, fault, recorded_loads, structural_fault
from latent_encoder.vae.comfy_vae import vae_from
from latent_encoder.vae.contents import GET_PLAIN, GET_VAE, kind_of_tensors, part_of, quantised, shortened
from latent_encoder.vae.encoders import ChosenEncoder, prepare_for_encoding
from latent_encoder.vae.families import Family, family_of
from latent_encoder.vae.latent_spaces import latent_space_of
from latent_encoder.vae.loaded_vae import LoadedVae
from latent_encoder.vae.probe import probe
from latent_encoder.vae.recognition import Shapes
from latent_encoder.vae.weights_files import UNREADABLE, read_hollow, read_shapes, unreadable

log = get_logger("latent_encoder")

TRIAL_VAE = "tiny_qwen_vae.safetensors"
"""The bundled VAE, which is also the container image's default. It is for trying the service without a download."""

NO_VAE = "VAE is invalid"
"""Words of ComfyUI's error for tensors that it takes for no VAE."""

NEEDS_VALUES = r"meta tensor|meta device|Tensor\.item\(\)"
"""Words of torch's errors for a model that cannot be made without values."""

UNKNOWN = "it is damaged, or the file of a model that ComfyUI {} does not know"


def load_vae(runtime: ComfyRuntime, name: str, files: Sequence[Path], settings: Settings) -> LoadedVae:
    """Load a VAE with VAELoader, check that it can encode, and give it the encoder that the settings ask for.

    Its files have passed `check_vae_files`.

    Raises:
        VaeModelInvalid: the file cannot be read, holds more than plain weights, or lacks tensors that encoding needs (with
            ROUNDTRIP also tensors that decoding needs).
        EncodingFailed: memory ran out.
    """
    refusal = _refusal(name, files)
    with _refused(name, files), recorded_loads(decodes=settings.roundtrip) as loads:
        family = family_of(_shapes(files), name)
        sha256 = _sha256(files)
        vae = _loaded(runtime, name, files, family)
    if reason := fault(vae, loads, decodes=settings.roundtrip):
        raise VaeModelInvalid(f"{refusal}: {in_parts(files) or reason}.")
    chosen = _choose_encoder(vae, name, settings)
    if name == TRIAL_VAE:
        log.warning("this vae is for trying the service: its latents mean nothing to a diffusion model", vae=name)
    cells = probe(runtime, vae, chosen.single_frame, refusal)
    load = partial(vae_from, runtime, name, files)
    return LoadedVae(name, vae, load, sha256, *chosen, latent_space_of(family, vae, runtime), cells)


def check_vae_files(name: str, files: Sequence[Path]) -> None:
    """Raise an error for a file that cannot hold a VAE. It costs a fraction of loading one and needs no memory.

    Raises:
        VaeModelInvalid: a file cannot be read, is incomplete, is another model or holds more than plain weights.
    """
    with _refused(name, files):
        reason = next(filter(None, map(unreadable, files)), None)
        if reason is None:
            shapes = _shapes(files)
            reason = never_loads(shapes, family_of(shapes, name), files)
    if reason is not None:
        raise VaeModelInvalid(f"{_refusal(name, files)}: {reason}.")


def _shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in all of a VAE's files."""
    return {tensor: shape for file in files for tensor, shape in read_shapes(file).items()}


def _choose_encoder(vae: Vae, name: str, settings: Settings) -> ChosenEncoder:
    if settings.encoder != "auto":
        return ChosenEncoder(None, f"ENCODER={settings.encoder}")
    with torch.inference_mode():
        return prepare_for_encoding(
            vae.first_stage_model, name, target=vae.device, compiled=settings.compile, decodes=settings.roundtrip
        )


def never_loads(shapes: Shapes, family: Family | None, files: Sequence[Path]) -> str | None:
    """Return the reason, by the names of its tensors, why no ComfyUI encodes images with a file; None if one may."""
    if family is not None:
        return f"it is {family.no_images} ({family.name}), which encodes no images" if family.no_images else None
    return in_parts(files) or kind_of_tensors(shapes)


def fault_of_tensors(runtime: ComfyRuntime, name: str, files: Sequence[Path], *, decodes: bool) -> str | None:
    """Return the reason, by the names, shapes and dtypes of its tensors, why a VAE cannot be used; None if none is known.

    VAELoader loads it without values. That reads the headers of the files alone, and takes next to no time and memory.

    Raises:
        SafetensorError, UnpicklingError, BadZipFile, OSError: a file cannot be read.
    """
    shapes = _shapes(files)
    family = family_of(shapes, name)
    if reason := never_loads(shapes, family, files):
        return reason
    try:
        with recorded_loads() as loads, runtime.files_read_by(read_hollow), torch.device("meta"):
            vae = vae_from(runtime, name, files)
    except Exception as exc:
        if re.search(NEEDS_VALUES, str(exc)):
            return family.fault(runtime.version) if family is not None else None
        return load_failure(exc, files, family, runtime.version) or one_line(exc)
    return structural_fault(vae, loads, decodes=decodes)


def in_parts(files: Sequence[Path]) -> str | None:
    """Return the reason if a file is one part of a model in several files, by its name; None if all are whole."""
    return next(filter(None, map(part_of, files)), None)


def _loaded(runtime: ComfyRuntime, name: str, files: Sequence[Path], family: Family | None) -> Vae:
    """Return ComfyUI's VAE object for the files.

    Raises:
        VaeModelInvalid: VAELoader fails, and the reason is known.
        Exception: VAELoader fails for another reason; the exception is VAELoader's own.
    """
    try:
        return vae_from(runtime, name, files)
    except Exception as exc:
        if is_out_of_memory(exc):
            raise
        reason = load_failure(exc, files, family, runtime.version)
        if reason is None:
            raise
        raise VaeModelInvalid(f"{_refusal(name, files)}: {reason}.") from exc


def load_failure(exc: Exception, files: Sequence[Path], family: Family | None, release: str) -> str | None:
    """Return the reason why VAELoader failed with `exc`; None if it is unknown."""
    if marks := quantised(name for file in files for name in read_shapes(file)):
        return f"its weights are quantised, with scales or tables beside them ({shortened(marks, NAMES_SHOWN)}); {GET_PLAIN}"
    if reason := in_parts(files) or (family.fault(release) if family is not None else None):
        return reason
    if names := re.findall(r"size mismatch for ([^\s:]+):", str(exc)):
        model = family.name if family is not None else "the model that ComfyUI takes it for"
        return f"it has tensors of other sizes than {model}: {shortened(names, NAMES_SHOWN)}; {UNKNOWN.format(release)}"
    if NO_VAE in str(exc):
        return f"ComfyUI recognises no VAE in it: its tensors are of something else; {GET_VAE}"
    if isinstance(exc, (OSError, ImportError)) or is_device_lost(exc):
        return None
    return f"ComfyUI builds no VAE from its tensors ({type(exc).__name__}: {one_line(exc)}); {UNKNOWN.format(release)}"


def _sha256(files: Sequence[Path]) -> str | None:
    """Return the SHA-256 of the files' bytes, one file after the other, in hexadecimal; None without files."""
    checksum = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: checksum)
    return checksum.hexdigest() if files else None


@contextmanager
def _refused(name: str, files: Sequence[Path]) -> Iterator[None]:
    """Turn any exception that reading or loading the files causes into a `VaeModelInvalid` that names them."""
    with translated(VaeModelInvalid, _refusal(name, files)):
        try:
            yield
        except Exception as exc:
            if reason := _reason(exc, files):
                raise VaeModelInvalid(f"{_refusal(name, files)}: {reason}.") from exc
            raise


def _refusal(name: str, files: Sequence[Path]) -> str:
    """Return the beginning of an error message about a VAE; the reason follows after a colon."""
    return f"VAE model {name} cannot be used ({', '.join(map(str, files)) or 'built in'})"


def _reason(exc: Exception, files: Sequence[Path]) -> str | None:
    """Return the reason why a file did not load if the exception's own text would mislead; else None."""
    if not isinstance(exc, UNREADABLE) or isinstance(exc, OSError):
        return None
    for file in files:
        try:
            read_shapes(file)
        except UNREADABLE as error:
            return unreadable(file, error)
    return None
