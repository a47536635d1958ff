"""Images that memory does not suffice for: refused, or encoded in tiles and reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from config import Settings
from errors import EncodingFailed, is_out_of_memory
from latent_encoder.geometry import Size
from latent_encoder.vae.tiling import watched
from models import ErrorResponse, SuccessResponse
from service import LatentEncoder
from tests.helpers import VAE, Encode, load_latent, request_for

pytestmark = pytest.mark.core

LARGEST = 260  # pixels per side that memory suffices for in these tests: more than the 256 of ComfyUI's tiles

Shortage = Callable[[], None]
"""A function that runs out of memory."""


def of_a_gpu() -> None:
    """Raise torch's exception for a GPU's memory that runs out."""
    raise torch.cuda.OutOfMemoryError("CUDA out of memory.")


def of_a_gpu_by_code() -> None:
    """Raise torch's exception for a GPU's memory that runs out in a call other than its own allocator's."""
    exc = torch.AcceleratorError("CUDA error: a text of another release")
    exc.error_code = 2  # type: ignore[attr-defined]  # torch sets it where it raises the error
    raise exc


def of_a_cpu() -> None:
    """Allocate more memory than any machine has."""
    torch.empty(2**60, dtype=torch.uint8)


@pytest.fixture
def short_of_memory(encoder: LatentEncoder, monkeypatch: pytest.MonkeyPatch) -> Callable[[Shortage, str], None]:
    """Return a function that makes a VAE run out of memory, in the given way, for images larger than `LARGEST`."""

    def short_of_memory(shortage: Shortage, name: str) -> None:
        vae = encoder.vaes.get(name)
        model = vae.single_frame or vae.vae.first_stage_model
        method = "forward" if vae.single_frame else "encode"
        encode = getattr(model, method)

        def limited(pixels: torch.Tensor, **options: Any) -> torch.Tensor:
            if max(pixels.shape[-2:]) > LARGEST:
                shortage()
            result: torch.Tensor = encode(pixels, **options)
            return result

        monkeypatch.setattr(model, method, limited)

    return short_of_memory


@pytest.mark.parametrize("shortage", [of_a_gpu, of_a_gpu_by_code, of_a_cpu])
@pytest.mark.parametrize("vae_name", [VAE, "taesd"])
def test_error_has_the_remedy(
    vae_name: str, shortage: Shortage, short_of_memory: Callable[[Shortage, str], None], respond: Encode
) -> None:
    """By default nothing is encoded in tiles: the error names both remedies, and a smaller image is encoded afterwards."""
    short_of_memory(shortage, vae_name)
    response = respond("photo.jpg", vae_model_name=vae_name, megapixels=0.1)
    assert isinstance(response, ErrorResponse)
    assert response.error_code == "ENCODING_FAILED"
    assert "image: memory ran out; ask for fewer megapixels" in response.error_message
    assert "OOM_POLICY=tile" in response.error_message
    assert isinstance(respond("photo.jpg", vae_model_name=vae_name), SuccessResponse)


@pytest.mark.parametrize("shortage", [of_a_gpu, of_a_gpu_by_code, of_a_cpu])
def test_tiles_are_used_if_allowed_and_reported(
    shortage: Shortage,
    encoder: LatentEncoder,
    settings: Settings,
    short_of_memory: Callable[[Shortage, str], None],
    encode: Encode,
    tmp_path: Path,
) -> None:
    """The latent is close to that of the whole image but not equal, and response and metadata have `tiled`.

    It is a stored response only as long as tiles are allowed.
    """
    whole = encode("photo.jpg", megapixels=0.1, request_id="whole")
    assert whole.metadata.tiled is False
    short_of_memory(shortage, VAE)
    tiling = LatentEncoder(settings.model_copy(update={"oom_policy": "tile"}), encoder.runtime)
    tiling.vaes = encoder.vaes
    fields = {"megapixels": 0.1, "request_id": "tiled"}
    request = request_for(settings, tmp_path, "photo.jpg", fields)
    tiled = tiling.encode(request)
    assert tiled.metadata.tiled is True
    assert '"tiled":true' in tiled.model_dump_json()
    assert (tiling.stored_response(request), encoder.stored_response(request)) == (tiled, None)
    expected, given = load_latent(whole.latent_file_path), load_latent(tiled.latent_file_path)
    assert given.shape == expected.shape
    assert not torch.equal(given, expected)
    assert (given - expected).abs().mean() < 0.1 * expected.std()


class TilingModel:
    """A model with an `encode_tiled`, which ComfyUI calls for some models in releases since 2026."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels * 2

    def encode_tiled(self, pixels: torch.Tensor, tile_x: int) -> torch.Tensor:
        return torch.cat([self.encode(part) for part in torch.split(pixels, tile_x, dim=-1)], -1)


def test_tiles_of_a_model_that_makes_them_itself_are_noticed() -> None:
    """They are refused or reported like ComfyUI's own; afterwards the model is unchanged."""
    model, pixels = TilingModel(), torch.rand(1, 3, 8, 32)
    with watched(model, model.encode, Size(32, 8), "fail") as watch, pytest.raises(EncodingFailed, match="OOM_POLICY=tile"):
        model.encode_tiled(pixels, tile_x=16)
    assert not watch.tiled
    with watched(model, model.encode, Size(32, 8), "tile") as watch:
        assert torch.equal(model.encode_tiled(pixels, tile_x=16), pixels * 2)
    assert watch.tiled
    assert vars(model) == {}


def test_parts_that_a_model_makes_of_any_picture_are_no_tiles() -> None:
    """Calls of `encode` within an `encode`, with any arguments, do not count as tiles."""

    class Recursive:
        def encode(self, pixels: torch.Tensor, device: str | None = None) -> torch.Tensor:
            if pixels.shape[-1] <= 8:
                return pixels.clone()
            half = pixels.shape[-1] // 2
            return torch.cat([self.encode(part, device=device) for part in torch.split(pixels, half, dim=-1)], -1)

    model, pixels = Recursive(), torch.rand(1, 3, 8, 32)
    with watched(model, model.encode, Size(32, 8), "fail") as watch:
        assert torch.equal(model.encode(pixels, device="cpu"), pixels)
    assert (watch.tiled, watch.seen) == (False, Size(32, 8))


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "HIP out of memory. Tried to allocate 2.00 GiB.",
        "HIP error: out of memory",
        "XPU out of memory. Tried to allocate 2.00 GiB.",
        "MPS backend out of memory (MPS allocated: 17.00 GB)",
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_shortage_is_recognised_by_torchs_text(text: str) -> None:
    """The text in a plain RuntimeError means that memory ran out; in a ValueError it does not."""
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(ValueError(text))


def test_other_faults_of_a_gpu_are_no_shortage() -> None:
    """A GPU's fault with another code or another text does not count as memory that ran out."""
    fault = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    assert not is_out_of_memory(fault)
    fault.error_code = 700  # type: ignore[attr-defined]
    assert not is_out_of_memory(fault)
    assert not is_out_of_memory(RuntimeError("the disk is out of memory cards"))
