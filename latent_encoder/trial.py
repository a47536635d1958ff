"""The trial of a ComfyUI tree: a small built-in image goes through its four nodes.

A tree that can be imported may still fail to encode. So the trial runs before the first request, and a fault of the tree ends
the start with one message instead of failing every request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import torch
from PIL import Image

from errors import SetupError, one_line
from latent_encoder.comfy_runtime import ComfyRuntime
from latent_encoder.images.features import CLOSE, ENDINGS, Format, pixels_of
from latent_encoder.releases import PINNED_RELEASE, TESTED

BUILT_IN_VAE = "pixel_space"  # needs no file; ComfyUI 0.3.52 lacks it
WIDTH, HEIGHT = 96, 64
MEGAPIXELS = 0.01  # the smallest size that ImageScaleToTotalPixels allows
TOLERANCES: Mapping[Format, float] = {"JPEG": CLOSE, "PNG": 1 / 255 / 2}  # a PNG's values may differ by half a step of 8 bits


def try_nodes(runtime: ComfyRuntime) -> tuple[str, ...]:
    """Run the nodes on a small image, and return the ids of those that ran.

    VAELoader and VAEEncode run with a VAE that is built into ComfyUI. They are left out on a release without it.

    Raises:
        SetupError: a node fails or gives an unexpected result; the text names node and release, and the next step.
    """
    pixels = try_load_image(runtime)
    with _faults_of(runtime, "ImageScaleToTotalPixels"):
        scaled = runtime.scale(pixels, "lanczos", MEGAPIXELS)
        _expect(_is_image(scaled), f"gives {_described(scaled)}, which is no image")
    if BUILT_IN_VAE not in runtime.vae_choices():
        return ("LoadImage", "ImageScaleToTotalPixels")
    with _faults_of(runtime, "VAELoader"):
        vae = runtime.load_vae(BUILT_IN_VAE)
    with _faults_of(runtime, "VAEEncode"), torch.inference_mode():
        latent = runtime.encode(vae, scaled)
        _expect(latent.shape == (1, 3, *scaled.shape[1:3]), f"gives {_described(latent)} of {_described(scaled)}")
    return ("VAELoader", "LoadImage", "ImageScaleToTotalPixels", "VAEEncode")


def try_load_image(runtime: ComfyRuntime) -> torch.Tensor:
    """Load a small image as PNG and as JPEG with LoadImage, and return its pixels, `[1, height, width, 3]`.

    Raises:
        SetupError: LoadImage fails, or gives other pixels than those of the image.
    """
    image = trial_image()
    expected = pixels_of(image)
    loaded: dict[Format, torch.Tensor] = {}
    for file_format, tolerance in TOLERANCES.items():
        with _faults_of(runtime, "LoadImage"):
            pixels = loaded[file_format] = runtime.load_image(_file(image, file_format), ENDINGS[file_format])
            _expect(_is_image(pixels), f"gives {_described(pixels)} of a {file_format}, which is no image")
            same_size = pixels.shape == expected.shape
            _expect(same_size, f"gives {_described(pixels)} of a {file_format} of {_described(expected)}")
            apart = float((pixels - expected).abs().mean())
            _expect(apart <= tolerance, f"gives pixels of a {file_format} that are off by {apart:.3f} on average")
    return loaded["PNG"]


def trial_image() -> Image.Image:
    """Return an image in which no two rows and no two columns are equal."""
    ramps = [Image.linear_gradient("L").rotate(angle).resize((WIDTH, HEIGHT)) for angle in (0, 90, 180)]
    return Image.merge("RGB", ramps)


def _file(image: Image.Image, file_format: str) -> bytes:
    file = BytesIO()
    image.save(file, file_format)
    return file.getvalue()


@contextmanager
def _faults_of(runtime: ComfyRuntime, node_id: str) -> Iterator[None]:
    try:
        yield
    except SetupError:
        raise
    except Exception as exc:
        raise SetupError(
            f"ComfyUI {runtime.version} in {runtime.path} cannot encode images: "
            f"its node {node_id} fails on a test image: {one_line(exc)}. "
            f"Run ./setup_comfyui.sh --pinned for release {PINNED_RELEASE}, or set COMFYUI_PATH to another tree ({TESTED})."
        ) from exc


def _expect(holds: bool, fault: str) -> None:
    if not holds:
        raise ValueError(fault)


def _is_image(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.dtype == torch.float32
        and value.ndim == 4
        and (value.shape[0], value.shape[3]) == (1, 3)
        and bool(torch.isfinite(value).all())
    )


def _described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
