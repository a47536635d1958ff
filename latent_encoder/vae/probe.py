"""The probe of a VAE: it encodes one small test image when it is loaded, and its latent has to be plausible.

It is the last guard. A file can pass every check of its tensors and still encode garbage: quantised weights whose scales are
lost, for example, gave latents of 1e5 where 1 is right.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from errors import VaeModelInvalid, translated
from latent_encoder.comfy_runtime import ComfyRuntime, Vae
from latent_encoder.geometry import Size, factor_of
from latent_encoder.vae.contents import GET_PLAIN
from latent_encoder.vae.loaded_vae import Cells, Encoding, encode_with
from latent_encoder.vae.single_frame import SingleFrameEncoder

SIZE = Size(width=133, height=69)
"""The first size that a VAE is tried with. Its sides are multiples of no VAE's factor, so the trial includes the cropping."""

SIZE_CUT = Size(width=128, height=64)
"""The second size, for VAEs that refuse anything except multiples of their factor. 32 is the largest factor known."""

LARGEST_RMS = 250.0
"""The largest plausible root mean square of a latent. Trained VAEs have up to 12: ComfyUI's factors, which bring latents to
about 1, are 0.08 for the SD x4 upscaler and larger for all others. VAEs of random weights in the tests have up to 48."""

LEAST_SPREAD = 1e-3
"""The least plausible standard deviation of a latent over the test image, which one channel has to reach. VAEs of random
weights have at least 0.06 on noise. A latent that is the same everywhere does not depend on the image."""


class Statistics(NamedTuple):
    """Figures of a latent."""

    rms: float
    spread: float
    """The largest standard deviation of a channel over the image."""


def probe(runtime: ComfyRuntime, vae: Vae, single_frame: SingleFrameEncoder | None, refusal: str) -> Cells:
    """Encode the test image and return the grid of its latent. `refusal` is the beginning of the error message.

    Raises:
        VaeModelInvalid: encoding fails, or its result is not the plausible latent of one image.
        EncodingFailed: memory ran out.
    """
    with translated(VaeModelInvalid, f"{refusal}: it does not encode a test image"), torch.inference_mode():
        try:
            encoding = encode_with(runtime, vae, single_frame, test_image(SIZE), "fail")
        except (RuntimeError, ValueError):
            encoding = encode_with(runtime, vae, single_frame, test_image(SIZE_CUT), "fail")
    cells = _cells(encoding, refusal)
    if reason := implausible(encoding.samples, half=vae.vae_dtype in (torch.float16, torch.bfloat16)):
        raise VaeModelInvalid(f"{refusal}: {reason}.")
    return cells


def test_image(size: Size) -> torch.Tensor:
    """Return an image `[1, height, width, 3]` in [0, 1]: grey, a turn from red to blue, noise."""
    noise = torch.rand(1, size.height, size.width, 3, generator=torch.Generator().manual_seed(0))
    across = torch.linspace(0, 1, size.width)
    picture = torch.stack((1 - across, torch.full_like(across, 0.5), across), dim=-1).expand_as(noise).clone()
    third = size.width // 3
    picture[:, :, :third] = 0.5
    picture[:, :, -third:] = noise[:, :, -third:]
    return picture


def _cells(encoding: Encoding, refusal: str) -> Cells:
    samples, frames = encoding.samples, encoding.samples.ndim == 5
    if samples.ndim == 4 or (frames and samples.shape[2] == 1):
        factor = factor_of(encoding.seen, Size(width=samples.shape[-1], height=samples.shape[-2]))
        if factor is not None:
            return Cells(factor, samples.shape[1], frames)
    raise VaeModelInvalid(
        f"{refusal}: it does not encode images; from one of {encoding.seen} it makes a tensor of shape {list(samples.shape)}."
    )


def statistics_of(samples: torch.Tensor) -> Statistics:
    channels = samples[0].float().flatten(1)
    return Statistics(float(channels.square().mean().sqrt()), float(channels.std(dim=1, correction=0).max()))


def implausible(samples: torch.Tensor, *, half: bool) -> str | None:
    """Return the reason why the latent of the test image is no VAE's; None if it may be one's. `half`: in 16 bits."""
    found = statistics_of(samples)
    if not torch.isfinite(samples).all():
        advice = "set VAE_PRECISION=fp32, or get the file again" if half else "get the file again"
        return f"from a test image it makes values that are not finite; {advice}"
    if found.rms > LARGEST_RMS:
        return (
            f"from a test image it makes values of about {found.rms:.1e}, and those of VAEs are below {LARGEST_RMS:.0f}: its "
            f"weights are damaged, or quantised without their scales; {GET_PLAIN}"
        )
    if found.spread < LEAST_SPREAD:
        return "from a test image it makes the same values everywhere: its weights are damaged; get the file again"
    return None
