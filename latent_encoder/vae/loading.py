"""The way from a VAE's files to a `LoadedVae`: judged, loaded by ComfyUI, checked, given its encoder, tried on an image.

A file that fails on this way becomes a `VaeModelInvalid` that names it and the reason.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from config import Settings
from errors import VaeModelInvalid, is_out_of_memory, one_line, translated
from latent_encoder.comfy_runtime import ComfyRuntime, Vae
from latent_encoder.geometry import Size, factor_of
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.vae.checks import fault, recorded_missing_keys
from latent_encoder.vae.encoders import FastEncoder, prepare_for_encoding
from latent_encoder.vae.families import Family, family_of
from latent_encoder.vae.latent_spaces import latent_space_of
from latent_encoder.vae.loaded_vae import Cells, LoadedVae, encode_with
from latent_encoder.vae.weights_files import check_weights_file, read_shapes

log = get_logger("latent_encoder")

TRIAL_VAE = "tiny_qwen_vae.safetensors"
"""The bundled VAE, which is also the container image's default. It is for trying the service without a download."""

TRIAL_SIZE = Size(width=133, height=69)
"""The first size that a VAE is tried with. Its sides are multiples of no VAE's factor, so the trial includes the cropping."""

TRIAL_SIZE_CUT = Size(width=128, height=64)
"""The second size, for VAEs that refuse anything except multiples of their factor. 32 is the largest factor known."""


def load_vae(runtime: ComfyRuntime, name: str, files: Sequence[Path], settings: Settings) -> LoadedVae:
    """Load a VAE with VAELoader, check that it can encode, and give it the encoder that the settings ask for.

    Raises:
        VaeModelInvalid: the file cannot be read, holds more than plain weights, or lacks tensors that encoding needs (with
            ROUNDTRIP also tensors that decoding needs).
        EncodingFailed: memory ran out.
    """
    with _refused(name, files), recorded_missing_keys() as missing:
        family = _family(name, files)
        if family is not None and family.no_images is not None:
            raise VaeModelInvalid(f"{_refusal(name, files)}: {family.fault(runtime.version)}.")
        sha256 = _sha256(files)
        vae = _loaded(runtime, name, files, family)
    if reason := fault(vae, missing, decodes=settings.roundtrip):
        raise VaeModelInvalid(f"{_refusal(name, files)}: {reason}.")
    fast_encoder = _fast_encoder(vae, name, settings)
    if name == TRIAL_VAE:
        log.warning("this vae is for trying the service: its latents mean nothing to a diffusion model", vae=name)
    cells = _try_encoding(runtime, vae, fast_encoder, _refusal(name, files))
    return LoadedVae(name, vae, sha256, fast_encoder, latent_space_of(family, vae, runtime), cells)


def check_vae_files(name: str, files: Sequence[Path]) -> None:
    """Raise an error for a file that cannot hold weights. It costs a fraction of loading one and needs no memory.

    Raises:
        VaeModelInvalid: a file cannot be read, is incomplete, or holds more than plain weights.
    """
    with _refused(name, files):
        for file in files:
            check_weights_file(file)


def _fast_encoder(vae: Vae, name: str, settings: Settings) -> FastEncoder | None:
    """Return the encoder that takes the place of the model's own; None if the model keeps its own."""
    if settings.encoder != "auto":
        return None
    with torch.inference_mode():
        return prepare_for_encoding(
            vae.first_stage_model, name, vae.device, compiled=settings.compile, decodes=settings.roundtrip
        )


def _family(name: str, files: Sequence[Path]) -> Family | None:
    """Return the VAE's family by the tensors of all of its files; None if it is unknown."""
    shapes = {tensor: shape for file in files for tensor, shape in read_shapes(file).items()}
    return family_of(shapes, name)


def _loaded(runtime: ComfyRuntime, name: str, files: Sequence[Path], family: Family | None) -> Vae:
    """Return ComfyUI's VAE object for the files.

    Raises:
        VaeModelInvalid: VAELoader fails, and the VAE is of a family that this release does not load.
        Exception: VAELoader fails for another reason; the exception is VAELoader's own.
    """
    try:
        return runtime.load_vae(name)
    except Exception as exc:
        reason = family.fault(runtime.version) if family is not None else None
        if reason is None or is_out_of_memory(exc):
            raise
        raise VaeModelInvalid(f"{_refusal(name, files)}: {reason}.") from exc


def _sha256(files: Sequence[Path]) -> str | None:
    """Return the SHA-256 of the files' bytes, one file after the other, in hexadecimal; None without files."""
    checksum = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: checksum)
    return checksum.hexdigest() if files else None


def _try_encoding(runtime: ComfyRuntime, vae: Vae, fast_encoder: FastEncoder | None, refusal: str) -> Cells:
    """Encode a small grey image and return the grid of its latent. `refusal` is the beginning of the error message.

    Raises:
        VaeModelInvalid: encoding fails, or its result is not the latent of one image.
        EncodingFailed: memory ran out.
    """
    with translated(VaeModelInvalid, f"{refusal}: it does not encode a test image"), torch.inference_mode():
        try:
            encoding = encode_with(runtime, vae, fast_encoder, _grey(TRIAL_SIZE), "fail")
        except (RuntimeError, ValueError):
            encoding = encode_with(runtime, vae, fast_encoder, _grey(TRIAL_SIZE_CUT), "fail")
    samples, frames = encoding.samples, encoding.samples.ndim == 5
    if samples.ndim == 4 or (frames and samples.shape[2] == 1):
        factor = factor_of(encoding.seen, Size(width=samples.shape[-1], height=samples.shape[-2]))
        if factor is not None:
            return Cells(factor, samples.shape[1], frames)
    raise VaeModelInvalid(
        f"{refusal}: it does not encode images; from one of {encoding.seen} it makes a tensor of shape {list(samples.shape)}."
    )


def _grey(size: Size) -> torch.Tensor:
    """Return an image `[1, height, width, 3]` of one grey, 0.5."""
    return torch.full((1, size.height, size.width, 3), 0.5)


@contextmanager
def _refused(name: str, files: Sequence[Path]) -> Iterator[None]:
    """Turn any exception that reading or loading the files causes into a `VaeModelInvalid` that names them."""
    with translated(VaeModelInvalid, _refusal(name, files)):
        try:
            yield
        except Exception as exc:
            if reason := _reason(exc):
                raise VaeModelInvalid(f"{_refusal(name, files)}: {reason}.") from exc
            raise


def _refusal(name: str, files: Sequence[Path]) -> str:
    """Return the beginning of an error message about a VAE; the reason follows after a colon."""
    return f"VAE model {name} cannot be used ({', '.join(map(str, files)) or 'built in'})"


def _reason(exc: Exception) -> str | None:
    """Return the reason why a file did not load if the exception's own text would mislead; else None."""
    if isinstance(exc, (pickle.UnpicklingError, zipfile.BadZipFile)):
        return "it is a pickle that holds more than plain weights, or a damaged one; get the model as safetensors"
    if isinstance(exc, SafetensorError):
        return f"it is empty, truncated or not a safetensors file ({one_line(exc)}); download it again"
    if "VAE is invalid" in str(exc):
        return "ComfyUI recognises no VAE in it: its tensors are of something else"
    return None
