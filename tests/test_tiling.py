"""What becomes of a picture that memory does not suffice for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from config import Settings
from models import ErrorResponse, SuccessResponse
from service import LatentEncoder
from tests.helpers import TINY_VAE, Encode, load_latent, request_for

LARGEST = 260  # pixels a side that memory suffices for in these tests; ComfyUI's tiles have 256

Shortage = Callable[[], None]


def of_a_gpu() -> None:
    """What torch raises when a GPU's memory runs out."""
    raise torch.cuda.OutOfMemoryError("CUDA out of memory.")


def of_a_cpu() -> None:
    """A real allocation that fails."""
    torch.empty(2**60, dtype=torch.uint8)


@pytest.fixture
def short_of_memory(encoder: LatentEncoder, monkeypatch: pytest.MonkeyPatch) -> Callable[[Shortage, str], None]:
    """Makes the VAE run out of memory as given where a picture is larger than `LARGEST`."""

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


@pytest.mark.parametrize("shortage", [of_a_gpu, of_a_cpu])
@pytest.mark.parametrize("vae_name", [TINY_VAE, "taesd"])
def test_error_says_what_to_do(
    vae_name: str, shortage: Shortage, short_of_memory: Callable[[Shortage, str], None], answer: Encode
) -> None:
    """By default, nothing is encoded in tiles."""
    short_of_memory(shortage, vae_name)
    response = answer("photo.jpg", vae_model_name=vae_name, megapixels=0.1)
    assert isinstance(response, ErrorResponse)
    assert response.error_code == "ENCODING_FAILED"
    assert "image: memory ran out; ask for fewer megapixels" in response.error_message
    assert "OOM_POLICY=tile" in response.error_message
    assert isinstance(answer("photo.jpg", vae_model_name=vae_name), SuccessResponse)


@pytest.mark.parametrize("shortage", [of_a_gpu, of_a_cpu])
def test_tiles_are_taken_where_wanted_and_told_of(
    shortage: Shortage,
    encoder: LatentEncoder,
    settings: Settings,
    short_of_memory: Callable[[Shortage, str], None],
    encode: Encode,
    tmp_path: Path,
) -> None:
    """The latent is about that of the whole picture; response and metadata say that it was made in tiles."""
    whole = encode("photo.jpg", megapixels=0.1, request_id="whole")
    assert whole.metadata.tiled is False
    short_of_memory(shortage, TINY_VAE)
    tiling = LatentEncoder(settings.model_copy(update={"oom_policy": "tile"}), encoder.runtime)
    tiling.vaes = encoder.vaes
    fields = {"megapixels": 0.1, "request_id": "tiled"}
    tiled = tiling.encode(request_for(settings, tmp_path, "photo.jpg", fields))
    assert tiled.metadata.tiled is True
    assert '"tiled":true' in tiled.model_dump_json()
    expected, given = load_latent(whole.latent_file_path), load_latent(tiled.latent_file_path)
    assert given.shape == expected.shape
    assert not torch.equal(given, expected)
    assert (given - expected).abs().mean() < 0.1 * expected.std()
