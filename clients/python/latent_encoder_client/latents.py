"""The files of a response: verified, loaded, and scaled for a diffusion model.

torch, safetensors and numpy are imported on first use, so a client that only sends needs none of them.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from latent_encoder_client.errors import ChecksumMismatch, FileUnusable, StatisticsMissing
from latent_encoder_client.responses import LatentStatistics, Success

if TYPE_CHECKING:
    import numpy as np
    import torch

Array = TypeVar("Array", "torch.Tensor", "np.ndarray[Any, Any]")

TENSOR_NAMES = {"safetensors": "latent", "comfy": "latent_tensor"}


def load_latent(success: Success, *, folder: Path | None = None) -> torch.Tensor:
    """Return the latent as a tensor `[batch, channels, height, width]`, as the VAE gave it, after its checksum was verified.

    `folder` is the folder of the files on this machine, if it has another path here than for the service.

    Raises:
        FileUnusable: the file cannot be read, is not the one of the response, or holds no latent of its shape.
    """
    import torch

    data = _latent_bytes(success, folder)
    with _parsing(success):
        if success.metadata.latent_format == "pt":
            latent: torch.Tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        else:
            from safetensors.torch import load

            name = _tensor_name(success)
            latent = load(data)[name]
    return _in_four_dimensions(latent, success)


def load_numpy_latent(success: Success, *, folder: Path | None = None) -> np.ndarray[Any, Any]:
    """Return the latent as `load_latent` does, as an array. Only a latent in the format `pt` needs torch.

    Raises:
        FileUnusable: the file cannot be read, is not the one of the response, or holds no latent of its shape.
    """
    if success.metadata.latent_format == "pt":
        array: np.ndarray[Any, Any] = load_latent(success, folder=folder).numpy()
        return array
    from safetensors.numpy import load

    data = _latent_bytes(success, folder)
    with _parsing(success):
        name = _tensor_name(success)
        latent = load(data)[name]
    return _in_four_dimensions(latent, success)


def verify_files(success: Success, *, folder: Path | None = None) -> None:
    """Verify the checksum of each file that the response names.

    Raises:
        FileUnusable: a file cannot be read, or is not the one of the response.
    """
    metadata = success.metadata
    stated = {
        success.latent_file_path: metadata.latent_sha256,
        success.scaled_image_path: metadata.scaled_image_sha256,
        success.preview_path: metadata.preview_sha256,
        success.roundtrip_path: metadata.roundtrip.image_sha256 if metadata.roundtrip is not None else None,
    }
    for path, sha256 in stated.items():
        if path is not None and sha256 is not None:
            _verified_bytes(path, sha256, folder)


def normalise(latent: Array, source: Success | LatentStatistics) -> Array:
    """Return the latent as a diffusion model takes it: `(latent - mean) / std` of each channel.

    The numbers are those of ComfyUI's `process_in`, and of the pipelines of diffusers. ComfyUI's own samplers normalise by
    themselves: give them the latent as it is. `latent` may have a dimension for frames. It keeps its type and device.

    Raises:
        StatisticsMissing: the response has no statistics, or those of another number of channels.
    """
    mean, std = _mean_and_std(latent, source)
    normalised: Array = (latent - mean) / std
    return normalised


def denormalise(latent: Array, source: Success | LatentStatistics) -> Array:
    """Return the latent as a VAE decodes it: the inverse of `normalise`.

    Raises:
        StatisticsMissing: the response has no statistics, or those of another number of channels.
    """
    mean, std = _mean_and_std(latent, source)
    denormalised: Array = latent * std + mean
    return denormalised


def _mean_and_std(latent: Array, source: Success | LatentStatistics) -> tuple[Array, Array]:
    statistics = source.metadata.latent_statistics if isinstance(source, Success) else source
    if statistics is None:
        assert isinstance(source, Success)
        raise StatisticsMissing(
            f"The response has no mean and deviation for {source.metadata.vae_model_name} (latent space: "
            f"{source.metadata.latent_space}): an older service wrote it, or ComfyUI does not scale these latents by channel. "
            "Take the numbers from the configuration of the VAE."
        )
    if not latent.shape[1] == len(statistics.mean) == len(statistics.std):
        raise StatisticsMissing(
            f"The latent has {latent.shape[1]} channels, but there are {len(statistics.mean)} means and "
            f"{len(statistics.std)} deviations."
        )
    return _shaped_like(latent, statistics.mean), _shaped_like(latent, statistics.std)


def _shaped_like(latent: Array, values: Sequence[float]) -> Array:
    """Return a number for each channel as an array that broadcasts over the latent."""
    shape = (1, len(values), *(1 for _ in latent.shape[2:]))
    make: Any = getattr(latent, "new_tensor", None) or partial(_numpy_array, dtype=latent.dtype)
    made: Array = make(values).reshape(shape)
    return made


def _numpy_array(values: Sequence[float], dtype: Any) -> np.ndarray[Any, Any]:
    import numpy as np

    return np.asarray(values, dtype=dtype)


def _latent_bytes(success: Success, folder: Path | None) -> bytes:
    return _verified_bytes(success.latent_file_path, success.metadata.latent_sha256, folder)


def _verified_bytes(path: str, sha256: str, folder: Path | None) -> bytes:
    """Return the content of a file that the service names. The file is read once, so these bytes are the verified ones."""
    place = Path(path) if folder is None else folder / PurePosixPath(path).name
    try:
        data = place.read_bytes()
    except OSError as exc:
        raise FileUnusable(
            f"Cannot read {place}: {exc.strerror}. If the folder has another path here than for the service, give it "
            "as `folder`."
        ) from exc
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ChecksumMismatch(f"{place} is not the file of the response: it was damaged or replaced. Send the request again.")
    return data


@contextmanager
def _parsing(success: Success) -> Iterator[None]:
    """Turn every error inside, of which the libraries raise many kinds, into FileUnusable."""
    try:
        yield
    except Exception as exc:
        raise FileUnusable(f"{success.latent_file_path} holds no latent: {type(exc).__name__}: {exc}") from exc


def _tensor_name(success: Success) -> str:
    name = TENSOR_NAMES.get(success.metadata.latent_format)
    if name is None:
        raise ValueError(f"this client does not know the format {success.metadata.latent_format}")
    return name


def _in_four_dimensions(latent: Array, success: Success) -> Array:
    """Return the latent without the dimension for frames that the format `comfy` has for VAEs for video."""
    latent = latent[:, :, 0] if latent.ndim == 5 else latent
    if tuple(latent.shape) != success.latent_shape:
        raise FileUnusable(f"{success.latent_file_path} has the shape {list(latent.shape)}, not {list(success.latent_shape)}.")
    return latent
