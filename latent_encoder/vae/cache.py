"""VAEs that are found, checked and kept loaded.

ComfyUI loads weights with `strict=False` into uninitialised memory: a file without some of the encoder's tensors loads
with a log line and then encodes garbage. So the keys that were missing are recorded while ComfyUI loads, and a VAE that
lacks what encoding needs, or decoding where ROUNDTRIP asks for it, is refused.
"""

from __future__ import annotations

import hashlib
import pickle
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from config import Settings
from errors import VaeModelInvalid, VaeModelNotFound, is_out_of_memory, one_line, translated
from latent_encoder.comfy_runtime import ComfyRuntime, Vae
from latent_encoder.geometry import Size, factor_of, latent_crop
from latent_encoder.suggestions import FILE_NAMES, closest
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.telemetry.metrics import VAE_CACHE
from latent_encoder.vae.checks import latent_space_of, no_images, with_defaults
from latent_encoder.vae.encoders import DECODER_PARTS, prepare_for_encoding
from latent_encoder.vae.families import Family, family_of, read_shapes
from latent_encoder.vae.single_frame import SingleFrameEncoder
from latent_encoder.vae.tiling import OomPolicy, watched
from latent_encoder.vae.weights_files import check_weights_file
from models import EncoderKind

log = get_logger("latent_encoder")

MAX_NAMES_SHOWN = 20

TRIAL_VAE = "tiny_qwen_vae.safetensors"  # comes along, and is the image's default

_LOADING = threading.Lock()  # one at a time has torch's method wrapped

ENCODING = threading.Lock()
"""Held while a VAE encodes or decodes: a model's `encode` is replaced meanwhile, and ComfyUI moves models between devices."""

# A picture for the trial of a VAE. Its sides are no multiples of any factor, so that it shows what is cut off.
TRIAL_SIZE = Size(width=133, height=69)
# For VAEs that encode nothing else than multiples of their factor, of which 32 is the largest known.
TRIAL_SIZE_CUT = Size(width=128, height=64)

Stamp = tuple[tuple[int, int, int], ...]


class Encoding(NamedTuple):
    """What VAEEncode gave of an image, and how."""

    samples: torch.Tensor
    """In the VAE's own number of dimensions, float32 on the CPU."""
    tiled: bool
    """Whether the image was encoded in tiles."""
    seen: Size
    """The size of the image that the model was given: ComfyUI cuts most images a little."""
    encoder: EncoderKind
    """What ran."""


class Cells(NamedTuple):
    """What a VAE's latents consist of, found out by a trial."""

    factor: int
    """How many pixels a side of one cell covers: 8 for most VAEs, 1 for `pixel_space`. ComfyUI states it wrong for a few."""
    channels: int
    frames: bool
    """Whether latents have a dimension for frames, as those of VAEs for video do."""


@dataclass(frozen=True)
class LoadedVae:
    """A VAE ready to encode."""

    name: str
    vae: Vae
    sha256: str | None
    """Of its file's bytes; of the encoder's and the decoder's one after the other for a TAESD pair; None without a file."""
    single_frame: SingleFrameEncoder | None
    """What encodes in place of the model's own `encode`; None where nothing does."""
    latent_space: str | None
    """ComfyUI's name for what its latents mean; None where its family is not known."""
    cells: Cells

    @property
    def encoder(self) -> EncoderKind:
        return _kind(self.single_frame)

    def encode(self, runtime: ComfyRuntime, pixels: torch.Tensor, oom_policy: OomPolicy) -> Encoding:
        """Encode an image `[1, height, width, 3]` with VAEEncode. Threads wait for each other here.

        Raises:
            EncodingFailed: memory ran out, and the policy is `fail`.
        """
        if self.single_frame is not None and pixels.shape[0] > 1:
            # Several frames are a matter for ComfyUI's own encoder, with all its weights.
            return _encode(runtime, runtime.load_vae(self.name), None, pixels, oom_policy)
        return _encode(runtime, self.vae, self.single_frame, pixels, oom_policy)

    def decode(self, runtime: ComfyRuntime, latent: torch.Tensor) -> torch.Tensor:
        """The image that VAEDecode gives of a latent `[1, channels, height, width]`; only where ROUNDTRIP is set."""
        with ENCODING:
            return runtime.decode(self.vae, latent.unsqueeze(2) if self.cells.frames else latent)

    @property
    def dtype(self) -> str:
        return str(self.vae.vae_dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        return str(self.vae.device)


def _encode(
    runtime: ComfyRuntime,
    vae: Vae,
    single_frame: SingleFrameEncoder | None,
    pixels: torch.Tensor,
    oom_policy: OomPolicy,
) -> Encoding:
    size = Size(width=pixels.shape[2], height=pixels.shape[1])
    whole = latent_crop(size, int(vae.spacial_compression_encode())).size if getattr(vae, "crop_input", True) else size
    model: Any = vae.first_stage_model
    with ENCODING, watched(model, single_frame or model.encode, whole, oom_policy) as watch:
        samples = runtime.encode(vae, pixels)
    return Encoding(samples, watch.tiled, watch.seen or whole, _kind(single_frame))


def _kind(single_frame: SingleFrameEncoder | None) -> EncoderKind:
    return "single-frame" if single_frame is not None else "stock"


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


def load_vae(runtime: ComfyRuntime, name: str, files: Sequence[Path], settings: Settings) -> LoadedVae:
    """Load a VAE with VAELoader, make sure that it can encode, and give it the encoder that the settings want.

    Raises:
        VaeModelInvalid: the file cannot be read, is not plain weights, or lacks what its architecture needs to encode, or to
            decode where the settings ask for that.
        EncodingFailed: memory ran out.
    """
    with _refused(name, files), _recorded_missing_keys() as missing:
        family = _family(name, files)
        if family is not None and family.no_images is not None:
            raise VaeModelInvalid(f"{_refusal(name, files)}: {family.fault(runtime.version)}.")
        sha256 = _sha256(files)
        vae = _loaded(runtime, name, files, family)
    if fault := _fault(vae, missing, decodes=settings.roundtrip):
        raise VaeModelInvalid(f"{_refusal(name, files)}: {fault}.")
    with torch.inference_mode():
        single_frame: SingleFrameEncoder | None = None
        if settings.encoder == "auto":
            single_frame = prepare_for_encoding(
                vae.first_stage_model, name, compiled=settings.compile, decodes=settings.roundtrip
            )
    if name == TRIAL_VAE:
        log.warning("this vae is for trying the service: its latents mean nothing to a diffusion model", vae=name)
    cells = _try_encoding(runtime, vae, single_frame, _refusal(name, files))
    return LoadedVae(name, vae, sha256, single_frame, latent_space_of(family, vae, runtime), cells)


def _try_encoding(runtime: ComfyRuntime, vae: Vae, single_frame: SingleFrameEncoder | None, refusal: str) -> Cells:
    """Encode a small grey picture, to see that the VAE encodes images and what their latents consist of.

    Raises:
        VaeModelInvalid: it fails, or gives something that is not the latent of one image.
        EncodingFailed: memory ran out.
    """
    with translated(VaeModelInvalid, f"{refusal}: it does not encode a test picture"), torch.inference_mode():
        try:
            encoding = _encode(runtime, vae, single_frame, _grey(TRIAL_SIZE), "fail")
        except (RuntimeError, ValueError):
            encoding = _encode(runtime, vae, single_frame, _grey(TRIAL_SIZE_CUT), "fail")
    samples, frames = encoding.samples, encoding.samples.ndim == 5
    if samples.ndim == 4 or (frames and samples.shape[2] == 1):
        factor = factor_of(encoding.seen, Size(width=samples.shape[-1], height=samples.shape[-2]))
        if factor is not None:
            return Cells(factor, samples.shape[1], frames)
    raise VaeModelInvalid(
        f"{refusal}: it does not encode images; of a picture of {encoding.seen} it gives a tensor of {list(samples.shape)}."
    )


def _grey(size: Size) -> torch.Tensor:
    return torch.full((1, size.height, size.width, 3), 0.5)


def _family(name: str, files: Sequence[Path]) -> Family | None:
    """Return the VAE's family, by the headers of all of its files."""
    shapes = {tensor: shape for file in files for tensor, shape in read_shapes(file).items()}
    return family_of(shapes, name)


def _loaded(runtime: ComfyRuntime, name: str, files: Sequence[Path], family: Family | None) -> Vae:
    """Return what VAELoader makes of the files.

    Raises:
        VaeModelInvalid: it fails, and the VAE is of a family that this release does not load.
    """
    try:
        return runtime.load_vae(name)
    except Exception as exc:
        fault = family.fault(runtime.version) if family is not None else None
        if fault is None or is_out_of_memory(exc):
            raise
        raise VaeModelInvalid(f"{_refusal(name, files)}: {fault}.") from exc


def check_vae_files(name: str, files: Sequence[Path]) -> None:
    """Refuse what is no file of weights, before memory is made free for it.

    Raises:
        VaeModelInvalid: as `load_vae`.
    """
    with _refused(name, files):
        for file in files:
            check_weights_file(file)


@contextmanager
def _refused(name: str, files: Sequence[Path]) -> Iterator[None]:
    """Turn whatever a VAE's files make others raise into a `VaeModelInvalid` that names them."""
    with translated(VaeModelInvalid, _refusal(name, files)):
        try:
            yield
        except Exception as exc:
            if reason := _reason(exc):
                raise VaeModelInvalid(f"{_refusal(name, files)}: {reason}.") from exc
            raise


def _refusal(name: str, files: Sequence[Path]) -> str:
    return f"VAE model {name} cannot be used ({', '.join(map(str, files)) or 'built in'})"


def _reason(exc: Exception) -> str | None:
    """Why a file did not load, where its exception's own text would mislead."""
    if isinstance(exc, (pickle.UnpicklingError, zipfile.BadZipFile)):
        return "it is a pickle that holds more than plain weights, or a damaged one; get the model as safetensors"
    if isinstance(exc, SafetensorError):
        return f"it is empty, truncated or not a safetensors file ({one_line(exc)})"
    if "VAE is invalid" in str(exc):
        return "ComfyUI recognises no VAE in it, its tensors are of something else"
    return None


def _fault(vae: Vae, missing: Mapping[int, Sequence[str]], *, decodes: bool) -> str | None:
    """What keeps a VAE that did load from encoding images properly, and from decoding them if it `decodes`."""
    model = vae.first_stage_model
    not_needed = () if decodes else DECODER_PARTS
    have_values = (*not_needed, *with_defaults(model))
    if fault := no_images(vae):
        return fault
    if id(model) not in missing:
        return "this ComfyUI loads it in a way that cannot be checked for missing tensors"
    if lacking := _without(have_values, missing[id(model)]):
        return f"it lacks tensors that {'a round trip' if decodes else 'encoding'} needs: {_shortened(lacking)}"
    if broken := _not_finite(model, not_needed):
        return f"it has values that are not finite in: {_shortened(broken)}"
    return None


def _sha256(files: Sequence[Path]) -> str | None:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest() if files else None


@contextmanager
def _recorded_missing_keys() -> Iterator[dict[int, list[str]]]:
    """What `load_state_dict` finds missing inside, by the `id` of the module that was loaded.

    ComfyUI only logs it. torch has no hook that sees every module's load, so the method itself is wrapped for the moment;
    a load in another thread is recorded too and harms nothing.
    """
    missing: dict[int, list[str]] = {}

    def recording(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = original(module, *args, **kwargs)
        missing[id(module)] = list(result.missing_keys)
        return result

    with _LOADING:
        original = torch.nn.Module.load_state_dict
        torch.nn.Module.load_state_dict = recording  # type: ignore[assignment,method-assign]
        try:
            yield missing
        finally:
            torch.nn.Module.load_state_dict = original  # type: ignore[method-assign]


def _without(parts: tuple[str, ...], keys: Iterable[str]) -> list[str]:
    return [key for key in keys if not key.startswith(parts)]


def _not_finite(model: torch.nn.Module, not_needed: tuple[str, ...]) -> list[str]:
    state = model.state_dict()
    return [key for key in _without(not_needed, state) if not _is_finite(state[key])]


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _shortened(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
