"""Checks of a VAE that ComfyUI has loaded: it encodes images, and every tensor that it needs for that has usable values.

ComfyUI loads weights with `strict=False` into uninitialised memory. So a file without some of the encoder's tensors loads with
a log line and then encodes garbage. The names of missing tensors are therefore recorded while ComfyUI loads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from latent_encoder.comfy_runtime import Vae
from latent_encoder.vae.encoders import DECODER_PARTS

LOADING = threading.Lock()
"""Serialises loads, because `Module.load_state_dict` is patched for the whole process during one."""

STEREO = 2  # channels of a sound; images have 3 or 4

NAMES_SHOWN = 3  # tensor names in an error message; a broken file may have hundreds, and a few show which part is affected

TAEF2_DEFAULTS = ("vae_scale", "vae_shift")
"""Tensors that no file of FLUX.2's TAESD has. VAELoader adds the scale and shift of other TAESD models after loading; FLUX.2's
latents are not scaled, so the model's own values, 1 and 0, are right."""


@contextmanager
def recorded_missing_keys() -> Iterator[dict[int, list[str]]]:
    """Record the names of missing tensors for every `load_state_dict` inside, by the `id` of the module that was loaded.

    ComfyUI only logs them. torch has no hook for the loads of all modules, so the method itself is replaced inside. A load in
    another thread is recorded too, without harm.
    """
    missing: dict[int, list[str]] = {}

    def recording(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = original(module, *args, **kwargs)
        missing[id(module)] = list(result.missing_keys)
        return result

    with LOADING:
        original = torch.nn.Module.load_state_dict
        torch.nn.Module.load_state_dict = recording  # type: ignore[assignment,method-assign]
        try:
            yield missing
        finally:
            torch.nn.Module.load_state_dict = original  # type: ignore[method-assign]


def fault(vae: Vae, missing: Mapping[int, Sequence[str]], *, decodes: bool) -> str | None:
    """Return the reason why a loaded VAE cannot encode images (with `decodes`, also decode latents); None if it can.

    `missing` is the record of `recorded_missing_keys` for its load.
    """
    model = vae.first_stage_model
    not_needed = () if decodes else DECODER_PARTS
    if reason := no_images(vae):
        return reason
    if id(model) not in missing:
        return "this ComfyUI loads it in a way that cannot be checked for missing tensors"
    if lacking := _without((*not_needed, *with_defaults(model)), missing[id(model)]):
        return f"it lacks tensors that {'a round trip' if decodes else 'encoding'} needs: {_shortened(lacking)}"
    if broken := _not_finite(model, not_needed):
        return f"it has values that are not finite in: {_shortened(broken)}"
    return None


def no_images(vae: Vae) -> str | None:
    """Return the reason why ComfyUI's VAE object encodes no images, by its own attributes; None if it does.

    It catches VAEs of unknown families. `latent_dim` is not enough: for some VAEs for audio ComfyUI states 2, as for images.
    """
    if vae.latent_dim not in (2, 3):
        return f"it does not encode images: its latents have {vae.latent_dim} dimension(s)"
    if getattr(vae, "extra_1d_channel", None) is not None or getattr(vae, "output_channels", None) == STEREO:
        return "it does not encode images: it is a VAE for audio"
    if not hasattr(vae.first_stage_model, "encode"):
        return "it does not encode images: it only decodes"
    return None


def with_defaults(model: torch.nn.Module) -> tuple[str, ...]:
    """Return the names of tensors that a file may lack because the model has the right values for them."""
    encoder = getattr(model, "taesd_encoder", None)
    return TAEF2_DEFAULTS if type(encoder).__name__ == "EncoderFlux2" else ()


def _without(parts: tuple[str, ...], keys: Iterable[str]) -> list[str]:
    """Return the tensor names that begin with none of the prefixes `parts`."""
    return [key for key in keys if not key.startswith(parts)]


def _not_finite(model: torch.nn.Module, not_needed: tuple[str, ...]) -> list[str]:
    """Return the names of tensors that hold an infinity or a NaN, except those that are not needed."""
    state = model.state_dict()
    return [key for key in _without(not_needed, state) if not _is_finite(state[key])]


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _shortened(keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:NAMES_SHOWN])
    return shown if len(keys) <= NAMES_SHOWN else f"{shown} and {len(keys) - NAMES_SHOWN} more"
