"""Checks of a VAE that ComfyUI has loaded: it encodes images, with every tensor of its file and with usable values.

ComfyUI loads weights with `strict=False` into uninitialised memory. So a file without some of the encoder's tensors loads with
a log line and then encodes garbage. The same goes for integers in place of weights, and for tensors that ComfyUI leaves out,
such as the scales of quantised weights. ComfyUI's loads are therefore recorded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from latent_encoder.comfy_runtime import Vae
from latent_encoder.vae.contents import GET_PLAIN, quantised, shortened
from latent_encoder.vae.encoders import DECODER_PARTS, WITHOUT_DECODER

LOADING = threading.Lock()
"""Serialises loads, because `Module.load_state_dict` is patched for the whole process during one."""

STEREO = 2  # channels of a sound; images have 3 or 4

NAMES_SHOWN = 3  # tensor names in an error message; a broken file may have hundreds, and a few show which part is affected

TAEF2_DEFAULTS = ("vae_scale", "vae_shift")
"""Tensors that no file of FLUX.2's TAESD has. VAELoader adds the scale and shift of other TAESD models after loading; FLUX.2's
latents are not scaled, so the model's own values, 1 and 0, are right."""

EFFNET_DEFAULTS = ("encoder.mean", "encoder.std")
"""Constants of Stable Cascade's encoder: means and deviations of ImageNet's colours. Some published files lack them."""

ENCODING_PARTS = ("encoder.", "quant_conv.", "bn.")
"""Parts that encoding uses, in every model that has them. A model without one would ignore the file's, and encode wrongly."""

UNUSED_CONSTANTS = ("num_batches_tracked", "_arange", "patch_size_buffer", "inv_freq", "ema_element_count", "ema_weight_sum")
"""Last parts of the names of tensors that hold no weights. Some releases of ComfyUI compute them instead of reading them."""

UNUSED_STATISTICS = "per_channel_statistics."
"""The statistics of LTX-Video's latents. Its files have five; newer releases of ComfyUI read the two that they use."""


class Load(NamedTuple):
    """The record of one `load_state_dict`."""

    missing: Sequence[str]
    """Tensors of the model that the file lacks."""
    left_over: Sequence[str]
    """Tensors of the file that the model lacks."""
    dtypes: Mapping[str, torch.dtype]
    """The dtype in the file of each tensor."""


@contextmanager
def recorded_loads(*, decodes: bool = True) -> Iterator[dict[int, Load]]:
    """Record every `load_state_dict` inside, by the `id` of the module that was loaded.

    Unless the VAE `decodes` later, the values of its decoder are not read: they take more memory than the encoder's.

    ComfyUI only logs missing tensors. torch has no hook for the loads of all modules, so the method itself is replaced inside.
    A load in another thread is recorded too, without harm.
    """
    loads: dict[int, Load] = {}

    def recording(module: torch.nn.Module, state: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        dtypes = {name: tensor.dtype for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
        skipped = frozenset() if decodes else _of_the_decoder(module, state)
        result = original(module, {name: state[name] for name in state if name not in skipped}, *args, **kwargs)
        result.missing_keys[:] = [name for name in result.missing_keys if name not in skipped]
        loads[id(module)] = Load(list(result.missing_keys), list(result.unexpected_keys), dtypes)
        return result

    with LOADING:
        original = torch.nn.Module.load_state_dict
        torch.nn.Module.load_state_dict = recording  # type: ignore[assignment,method-assign]
        try:
            yield loads
        finally:
            torch.nn.Module.load_state_dict = original  # type: ignore[method-assign]


def _of_the_decoder(module: torch.nn.Module, state: Mapping[str, Any]) -> frozenset[str]:
    """Return the tensors that only decoding uses. One of another shape than the module's is none of them: torch refuses it."""
    if type(module).__name__ not in WITHOUT_DECODER:
        return frozenset()
    own = {name: tensor.shape for name, tensor in module.state_dict().items() if name.startswith(DECODER_PARTS)}
    return frozenset(name for name, shape in own.items() if name in state and state[name].shape == shape)


def fault(vae: Vae, loads: Mapping[int, Load], *, decodes: bool) -> str | None:
    """Return the reason why a loaded VAE cannot encode images (with `decodes`, also decode latents); None if it can.

    `loads` is the record of `recorded_loads` for its load.
    """
    return structural_fault(vae, loads, decodes=decodes) or _fault_of_values(
        vae.first_stage_model, _not_needed(decodes=decodes)
    )


def structural_fault(vae: Vae, loads: Mapping[int, Load], *, decodes: bool) -> str | None:
    """Return the reason of `fault` that takes no values: also for a VAE whose tensors are on the meta device."""
    model = vae.first_stage_model
    if reason := no_images(vae):
        return reason
    if (load := loads.get(id(model))) is None:
        return "this ComfyUI loads it in a way that cannot be checked for missing tensors"
    return _fault_of_load(model, load, decodes=decodes)


def _fault_of_load(model: torch.nn.Module, load: Load, *, decodes: bool) -> str | None:
    not_needed = _not_needed(decodes=decodes)
    more = left_over(model, load, not_needed)
    if marks := quantised(more):
        return f"its weights are quantised, and ComfyUI's VAEs ignore their scales ({_shortened(marks)}); {GET_PLAIN}"
    if integers := _integers(model, load, not_needed):
        return f"its weights are integers, so they are quantised: {_shortened(integers)}; {GET_PLAIN}"
    if lacking := _without((*not_needed, *with_defaults(model)), load.missing):
        return f"it lacks tensors that {'a round trip' if decodes else 'encoding'} needs: {_shortened(lacking)}"
    if more:
        return (
            f"it has tensors that ComfyUI's {type(model).__name__} does not use: {_shortened(more)}; "
            "it is the file of another model, or of one that this ComfyUI does not know"
        )
    return None


def _not_needed(*, decodes: bool) -> tuple[str, ...]:
    return () if decodes else DECODER_PARTS


def _fault_of_values(model: torch.nn.Module, not_needed: tuple[str, ...]) -> str | None:
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(not_needed)}
    if broken := [name for name, tensor in state.items() if not _is_finite(tensor)]:
        return f"it has values that are not finite in: {_shortened(broken)}"
    if empty := [name for name, tensor in state.items() if _is_kernel(name, tensor) and not tensor.any()]:
        return f"it has nothing but zeros in: {_shortened(empty)}; its download was broken off, so download it again"
    return None


def left_over(model: torch.nn.Module, load: Load, not_needed: tuple[str, ...]) -> list[str]:
    """Return the tensors of the file that the model does not use although they belong to a part that is needed.

    Others are harmless and common, such as `loss.…` and `model_ema.…` of Stable Diffusion's VAEs.
    """
    used = {name.partition(".")[0] for name in model.state_dict()}
    names = [name for name in _without(not_needed, load.left_over) if not _is_constant(name)]
    marks = set(quantised(names))
    return [name for name in names if name in marks or name.startswith(ENCODING_PARTS) or name.partition(".")[0] in used]


def _is_constant(name: str) -> bool:
    return name.rpartition(".")[2] in UNUSED_CONSTANTS or name.startswith(UNUSED_STATISTICS)


def _integers(model: torch.nn.Module, load: Load, not_needed: tuple[str, ...]) -> list[str]:
    """Return the needed tensors that the model has as floating-point numbers and the file as something else."""
    floats = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point() and name in load.dtypes]
    return [
        f"{name} ({_short(load.dtypes[name])})" for name in _without(not_needed, floats) if not _is_plain(load.dtypes[name])
    ]


def _is_plain(dtype: torch.dtype) -> bool:
    """Return whether numbers of a dtype are weights as they are. float8_e8m0fnu has powers of two only: it is for scales."""
    return dtype.is_floating_point and _short(dtype) != "float8_e8m0fnu"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    defaults = {"EncoderFlux2": TAEF2_DEFAULTS, "EfficientNetEncoder": EFFNET_DEFAULTS}
    encoders = (getattr(model, name, None) for name in ("taesd_encoder", "encoder"))
    return next((defaults[kind] for kind in (type(encoder).__name__ for encoder in encoders) if kind in defaults), ())


def _without(parts: tuple[str, ...], keys: Iterable[str]) -> list[str]:
    """Return the tensor names that begin with none of the prefixes `parts`."""
    return [key for key in keys if not key.startswith(parts)]


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _is_kernel(name: str, tensor: torch.Tensor) -> bool:
    """Return whether a tensor is the weight of a convolution or of a linear layer, which training never leaves at zero."""
    return name.endswith(".weight") and tensor.ndim > 1


def _shortened(names: Sequence[str]) -> str:
    return shortened(names, NAMES_SHOWN)
