"""The pipeline: its four stages one by one, and a request from end to end."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from config import Settings
from errors import ErrorCode, ScalingFailed
from latent_encoder.geometry import Size, scaled_size
from latent_encoder.torch_threads import encode_threads
from models import ErrorResponse, Metadata, SuccessResponse
from service import LatentEncoder
from tests.helpers import IMAGES, VAE, Encode, load_latent, request_for
from tests.trees import FACTS, needs_pixel_space

pytestmark = pytest.mark.core

MOMENT = datetime(2024, 11, 6, 12, 0, 0, 999_999, tzinfo=UTC)


def test_load_vae_gives_the_model_and_its_factor(encoder: LatentEncoder) -> None:
    """Stage one: VAELoader's VAE, with its factor, channels and precision."""
    vae = encoder.vaes.get(VAE)
    assert (vae.name, vae.cells, vae.dtype, vae.device) == (VAE, (8, 16, True), "float32", "cpu")


def test_load_image_gives_pixels_in_unit_range(encoder: LatentEncoder) -> None:
    """Stage two: LoadImage's tensor holds the file's 8-bit values over 255."""
    pixels = encoder.runtime.load_image((IMAGES / "astronaut.png").read_bytes(), ".png")
    with Image.open(IMAGES / "astronaut.png") as png:
        expected = torch.frombuffer(bytearray(png.convert("RGB").tobytes()), dtype=torch.uint8).view(1, 512, 512, 3)
    assert pixels.dtype == torch.float32
    assert torch.equal((pixels * 255).round().to(torch.uint8), expected)


@hypothesis_settings(max_examples=25)
@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 0.2))
def test_scale_gives_the_size_that_the_formula_says(
    encoder: LatentEncoder, width: int, height: int, megapixels: float
) -> None:
    """Stage three: ImageScaleToTotalPixels and our `scaled_size` agree for any image and target, later releases to a pixel."""
    scaled = encoder.runtime.scale(torch.zeros(1, height, width, 3), "nearest-exact", megapixels)
    expected = scaled_size(Size(width, height), megapixels)
    apart = max(abs(scaled.shape[2] - expected.width), abs(scaled.shape[1] - expected.height))
    assert apart <= (1 if FACTS.has_resolution_steps else 0)  # the same releases no longer cut the total to an integer


def test_encode_gives_the_latent_of_the_architecture(encoder: LatentEncoder) -> None:
    """Stage four: VAEEncode's own tensor, five-dimensional for this family, one cell for 8 x 8 pixels."""
    with torch.inference_mode():
        encoding = encoder.vaes.get(VAE).encode(encoder.runtime, torch.rand(1, 43, 64, 3), "fail")
    samples = encoding.samples
    assert (encoding.tiled, encoding.seen, encoding.encoder) == (False, Size(64, 40), "single-frame")
    assert samples.shape == (1, 16, 1, 5, 8)
    assert samples.dtype == torch.float32


def test_response_describes_its_files(encode: Encode, tmp_path: Path) -> None:
    """Paths are absolute, shapes are those of the files, checksums are those of the bytes, the JSON holds the metadata."""
    response = encode("astronaut.png", request_id="4f6c", megapixels=0.05)
    assert isinstance(response, SuccessResponse)
    latent_path, png_path = Path(response.latent_file_path), Path(response.scaled_image_path)
    assert latent_path == tmp_path / "latent_astronaut_4f6c.pt"
    assert png_path == tmp_path / "scaled_image_astronaut_4f6c.png"
    assert {path.name for path in tmp_path.iterdir()} == {latent_path.name, png_path.name, f"{latent_path.name}.json"}

    metadata = Metadata.model_validate_json((tmp_path / f"{latent_path.name}.json").read_text())
    assert metadata == response.metadata
    assert metadata.latent_sha256 == hashlib.sha256(latent_path.read_bytes()).hexdigest()
    assert metadata.image_sha256 == hashlib.sha256((IMAGES / "astronaut.png").read_bytes()).hexdigest()
    assert metadata.original_image_shape == (512, 512, 3)
    assert metadata.scaled_image_shape == (229, 229, 3)
    assert metadata.crop == (2, 2, 226, 226)
    assert metadata.latent_shape == (1, 16, 28, 28) == tuple(load_latent(latent_path).shape)
    assert (metadata.comfyui_version, metadata.device, metadata.latent_dtype) == (FACTS.version, "cpu", "float32")
    assert metadata.processing_time_ms > 0
    assert metadata.timings_ms.encode > 0


def test_latent_file_holds_no_more_than_its_tensor(encode: Encode) -> None:
    """The storage behind the loaded tensor is as large as the tensor."""
    latent = load_latent(encode("5x4000.png", megapixels=0.1).latent_file_path)
    assert latent.untyped_storage().nbytes() == latent.numel() * 4
    assert not latent.requires_grad


def test_same_request_gives_the_same_bytes(encode: Encode, tmp_path: Path) -> None:
    """Place, time and names do not change the bytes of the latent and the PNG."""
    first = encode("photo.jpg")
    second = encode("photo.jpg", output_dir=str(tmp_path / "elsewhere"), request_id="another")
    for path in ("latent_file_path", "scaled_image_path"):
        assert Path(getattr(first, path)).read_bytes() == Path(getattr(second, path)).read_bytes()


def test_clock_is_the_only_source_of_time(encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> None:
    """Timestamps are the clock's, in UTC to the second, in success and error alike."""
    frozen = LatentEncoder(settings, encoder.runtime, clock=lambda: MOMENT)
    success = frozen.respond(request_for(settings, tmp_path, "photo.jpg", {}))
    error = frozen.respond(request_for(settings, tmp_path, "empty.png", {}))
    assert isinstance(success, SuccessResponse)
    assert isinstance(error, ErrorResponse)
    assert success.metadata.timestamp == error.timestamp == "2024-11-06T12:00:00Z"


def test_responses_have_the_specified_fields(respond: Encode) -> None:
    """A response has the specified fields, and at the top no others; its metadata have the specified ones."""
    success = json.loads(respond("photo.jpg").model_dump_json())
    top = {"status", "request_id", "latent_file_path", "latent_shape", "scaled_image_path", "metadata"}
    assert success.keys() == top
    specified = {"original_image_shape", "scaled_image_shape", "latent_shape", "vae_model_name"}
    assert success["metadata"].keys() > specified | {"processing_time_ms", "timestamp"}
    error = json.loads(respond("empty.png").model_dump_json())
    assert error.keys() == {"status", "request_id", "error_code", "error_message", "timestamp"}


@pytest.mark.parametrize(
    ("size", "megapixels", "words"),
    [
        ((5, 4000), 0.01, "5 x 4000 px image to 0.01 megapixels (4 x 2896 px)"),
        ((1, 60000), 0.01, "(0 x 25082 px)"),
        ((60000, 1), 0.05, "(56086 x 1 px)"),
    ],
)
def test_result_too_small_for_the_vae_is_refused(
    size: tuple[int, int], megapixels: float, words: str, encode: Encode, tmp_path: Path
) -> None:
    """SCALING_FAILED names the sizes, and no file is left."""
    image = tmp_path / "input" / "thin.png"
    image.parent.mkdir()
    Image.new("RGB", size).save(image)
    with pytest.raises(ScalingFailed) as caught:
        encode(image, megapixels=megapixels)
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == [image.parent]


@needs_pixel_space
def test_pixel_space_takes_any_side(encode: Encode) -> None:
    """Without down-sampling, four pixels a side are enough."""
    assert encode("5x4000.png", megapixels=0.01, vae_model_name="pixel_space").latent_shape == (1, 3, 2896, 4)


def test_repeated_request_replaces_its_files_together(encode: Encode, tmp_path: Path) -> None:
    """The metadata always describes the latent beside it."""
    encode("photo.jpg", megapixels=0.02)
    response = encode("photo.jpg", megapixels=0.03)
    latent = Path(response.latent_file_path)
    stored = Metadata.model_validate_json(Path(f"{latent}.json").read_text())
    assert stored.latent_sha256 == hashlib.sha256(latent.read_bytes()).hexdigest()
    assert len(list(tmp_path.iterdir())) == 3


def test_unexpected_fault_gets_a_response_and_is_logged(
    encoder: LatentEncoder, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug of ours ends as ENCODING_FAILED, with the exception in the log."""

    class BrokenClock:
        calls = 0

        def __call__(self) -> datetime:
            self.calls += 1
            if self.calls == 1:
                raise ZeroDivisionError("the clock stopped")
            return MOMENT

    faulty = LatentEncoder(settings, encoder.runtime, clock=BrokenClock())
    response = faulty.respond(request_for(settings, tmp_path, "photo.jpg", {}))
    assert isinstance(response, ErrorResponse)
    assert response.error_code == ErrorCode.ENCODING_FAILED
    assert "the clock stopped" in response.error_message
    assert "ZeroDivisionError: the clock stopped" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_threads_are_as_many_as_set(encoder: LatentEncoder, settings: Settings) -> None:
    """TORCH_NUM_THREADS; a tree that is loaded already can be set up again."""
    before = torch.get_num_threads()
    try:
        again = LatentEncoder.set_up(settings.model_copy(update={"torch_num_threads": 1}))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert again.runtime.path == encoder.runtime.path


def test_threads_are_no_more_than_the_container_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """loky counts them, from affinity and control group; its own limit stands for a quota here."""
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert encode_threads() == 1
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1000")
    assert 1 <= encode_threads() <= torch.get_num_threads()
