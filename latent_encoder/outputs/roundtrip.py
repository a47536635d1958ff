"""How much of an image its latent has kept: decoded again, and compared with what was encoded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errors import EncodingFailed, translated
from latent_encoder.comfy_runtime import ComfyRuntime
from latent_encoder.geometry import Size
from latent_encoder.outputs.files import eight_bits, png_bytes
from latent_encoder.vae.loaded_vae import LoadedVae
from models import Roundtrip

SSIM_WINDOW = 7  # pixels a side, scikit-image's default


@dataclass(frozen=True)
class Comparison:
    """A decoded latent as a file, and how much it is like what was encoded."""

    png: bytes
    roundtrip: Roundtrip


def compare(runtime: ComfyRuntime, vae: LoadedVae, latent: Tensor, covered: Tensor) -> Comparison:
    """Decode a latent `[1, channels, height, width]` and compare it with the image `[1, height, width, 3]` that it covers.

    Raises:
        EncodingFailed: as `decode`.
    """
    decoded = decode(runtime, vae, latent, Size(width=covered.shape[2], height=covered.shape[1]))
    png = png_bytes(decoded)
    # Cells are counted from the upper left; the last ones may end before the image or behind it.
    height, width = (min(sides) for sides in zip(decoded.shape[1:3], covered.shape[1:3], strict=True))
    decoded, covered = decoded[:, :height, :width], covered[:, :height, :width]
    psnr_db, ssim = psnr(decoded, covered), mean_ssim(decoded, covered)
    return Comparison(png, Roundtrip(psnr_db=psnr_db, ssim=ssim, image_sha256=hashlib.sha256(png).hexdigest()))


def decode(runtime: ComfyRuntime, vae: LoadedVae, latent: Tensor, expected: Size) -> Tensor:
    """The image that VAEDecode gives of a latent: float32 `[1, height, width, 3]` on the CPU.

    A side may differ from the expected one by less than a cell: not every VAE insists on multiples of its factor.

    A GPU whose memory does not suffice makes ComfyUI decode in tiles, which gives a slightly different image.

    Raises:
        EncodingFailed: the VAE cannot decode, memory ran out, or what it gave is no image of the size that was encoded.
    """
    with translated(EncodingFailed, f"VAE {vae.name} failed to decode the latent of a {expected} image"):
        image = vae.decode(runtime, latent)
    sides = Size(width=image.shape[2], height=image.shape[1]) if image.ndim == 4 else Size(0, 0)
    close = all(abs(side - wanted) < vae.cells.factor for side, wanted in zip(sides, expected, strict=True))
    if not close or (image.shape[0], image.shape[3]) != (1, 3):
        raise EncodingFailed(f"VAE {vae.name} decodes the latent of a {expected} image to a tensor of {list(image.shape)}.")
    if not torch.isfinite(image).all():
        raise EncodingFailed(f"VAE {vae.name} decodes to values that are not finite in {vae.dtype}; try VAE_PRECISION=fp32.")
    return image.to("cpu", torch.float32)


def psnr(decoded: Tensor, original: Tensor) -> float | None:
    """The peak signal-to-noise ratio of two images in decibels, 10 log10(1 / mean squared error); None where they are equal.

    Of their 8-bit pixels, as files hold them; to 0.01 dB.
    """
    from skimage.metrics import peak_signal_noise_ratio  # takes a while to import

    first, second = _pixels(original), _pixels(decoded)
    if (first == second).all():
        return None
    return round(float(peak_signal_noise_ratio(first, second, data_range=1.0)), 2)


def mean_ssim(decoded: Tensor, original: Tensor) -> float | None:
    """The mean structural similarity of two images, at most 1; None where a side is shorter than its window.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity", 2004, with
    scikit-image's uniform window, over all three channels. Of their 8-bit pixels, as files hold them; to 0.0001.
    """
    from skimage.metrics import structural_similarity  # takes a while to import

    first, second = _pixels(original), _pixels(decoded)
    if min(first.shape[:2]) < SSIM_WINDOW:
        return None
    return round(float(structural_similarity(first, second, win_size=SSIM_WINDOW, data_range=1.0, channel_axis=-1)), 4)


def _pixels(image: Tensor) -> Any:
    """A numpy array, float32 `[height, width, 3]` in [0, 1]."""
    return (eight_bits(image) / 255).numpy()
