"""Checks of a VAE that ComfyUI has loaded: it encodes images, and no tensor that this needs is missing or broken.

ComfyUI loads weights with `strict=False` into uninitialised memory: a file without some of the encoder's tensors loads with a
log line and then encodes garbage. So the keys that were missing are recorded while ComfyUI loads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from latent_encoder.comfy_runtime import Vae
from latent_encoder.vae.encoders import DECODER_PARTS

_LOADING = threading.Lock()  # one at a time has torch's method wrapped

STEREO = 2


# VAELoader adds the factor and the shift of the other TAESD models; FLUX.2's latents need none, so the model's 1 and 0 hold.
TAEF2_DEFAULTS = ("vae_scale", "vae_shift")


@contextmanager
def recorded_missing_keys() -> Iterator[dict[int, list[str]]]:
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


def fault(vae: Vae, missing: Mapping[int, Sequence[str]], *, decodes: bool) -> str | None:
    """What keeps a VAE that did load from encoding images properly, and from decoding them if it `decodes`."""
    model = vae.first_stage_model
    not_needed = () if decodes else DECODER_PARTS
    have_values = (*not_needed, *with_defaults(model))
    if reason := no_images(vae):
        return reason
    if id(model) not in missing:
        return "this ComfyUI loads it in a way that cannot be checked for missing tensors"
    if lacking := _without(have_values, missing[id(model)]):
        return f"it lacks tensors that {'a round trip' if decodes else 'encoding'} needs: {_shortened(lacking)}"
    if broken := _not_finite(model, not_needed):
        return f"it has values that are not finite in: {_shortened(broken)}"
    return None


def no_images(vae: Vae) -> str | None:
    """Return why a VAE that ComfyUI has loaded encodes no images, by ComfyUI's own attributes; None where it does.

    It catches VAEs of no known family. For some of those for audio ComfyUI states latents of two dimensions, as for images.
    """
    if vae.latent_dim not in (2, 3):
        return f"it does not encode images, its latents have {vae.latent_dim} dimension(s)"
    if getattr(vae, "extra_1d_channel", None) is not None or getattr(vae, "output_channels", None) == STEREO:
        return "it does not encode images, it is a VAE for audio"
    if not hasattr(vae.first_stage_model, "encode"):
        return "it does not encode images, it only decodes"
    return None


def with_defaults(model: torch.nn.Module) -> tuple[str, ...]:
    """Return the tensors that a file may lack, since the model has a value for them that is right."""
    encoder = getattr(model, "taesd_encoder", None)
    return TAEF2_DEFAULTS if type(encoder).__name__ == "EncoderFlux2" else ()


def _without(parts: tuple[str, ...], keys: Iterable[str]) -> list[str]:
    return [key for key in keys if not key.startswith(parts)]


def _not_finite(model: torch.nn.Module, not_needed: tuple[str, ...]) -> list[str]:
    state = model.state_dict()
    return [key for key in _without(not_needed, state) if not _is_finite(state[key])]


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _shortened(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
