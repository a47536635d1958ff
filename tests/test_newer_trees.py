"""Tests on a changed copy of the pinned release with the decoders, limits and inputs that ComfyUI has since 2026."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

from latent_encoder.images.features import FurtherImages, Orientation, SixteenBits
from latent_encoder.installer.placing import copy as copy_entry
from latent_encoder.installer.placing import place_runtime
from tests.helpers import COMFYUI, IMAGES, PROJECT, TINY_VAE, RunMain, load_latent, stock
from tests.newer_tree import make_newer

KL, TAESD = "random_kl.safetensors", "taesd"


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the changed copy."""
    tree = tmp_path_factory.mktemp("newer")
    place_runtime(COMFYUI, tree, copy_entry)
    make_newer(tree)
    return tree


@dataclass(frozen=True)
class Outcome:
    """Our service's response, and the tensors of the tree's own nodes."""

    response: dict[str, Any]
    scaled: torch.Tensor
    latent: torch.Tensor

    @property
    def metadata(self) -> dict[str, Any]:
        assert self.response["status"] == "success", self.response
        metadata: dict[str, Any] = self.response["metadata"]
        return metadata


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return image files of kinds that the test images lack."""
    folder = tmp_path_factory.mktemp("images")
    with Image.open(IMAGES / "photo.jpg") as photo:
        for value in (2, 3, 5, 8):
            exif = Image.Exif()
            exif[274] = value
            photo.save(folder / f"orientation_{value}.jpg", exif=exif, quality=95)
        # As phones write a gain map: after the photo, smaller, and grey.
        photo.save(folder / "phone.jpg", "MPO", save_all=True, append_images=[ImageOps.grayscale(photo).resize((24, 16))])
    (folder / "rgb_16_bit.png").write_bytes(SixteenBits(2).sample())
    with Image.open(IMAGES / "rgba.png") as image:
        image.convert("RGB").convert("RGBA").save(folder / "opaque.png")
    (folder / "long_orientation.jpg").write_bytes(Orientation("JPEG", 6, "exif", 4).sample())
    (folder / "turned_by_xmp.jpg").write_bytes(Orientation("JPEG", 6, "xmp").sample())
    return folder


CASES: dict[str, tuple[str, str, str, float, str]] = {
    "photo": ("photo.jpg", TINY_VAE, "lanczos", 0.02, "crop"),
    "exact": ("photo.jpg", TINY_VAE, "bicubic", 0.02, "exact"),
    "exact KL": ("photo.jpg", KL, "lanczos", 0.02, "exact"),
    "orientation 6": ("exif_orientation_6.jpg", TINY_VAE, "lanczos", 0.02, "crop"),
    **{f"orientation {n}": (f"orientation_{n}.jpg", TINY_VAE, "lanczos", 0.02, "crop") for n in (2, 3, 5, 8)},
    "orientation in XMP": ("turned_by_xmp.jpg", TINY_VAE, "lanczos", 0.02, "crop"),
    "orientation of another type": ("long_orientation.jpg", TINY_VAE, "lanczos", 0.02, "crop"),
    "transparent": ("rgba.png", TINY_VAE, "lanczos", 0.02, "crop"),
    "opaque": ("opaque.png", TINY_VAE, "lanczos", 0.02, "crop"),
    "palette": ("palette_with_transparency.png", TINY_VAE, "lanczos", 0.02, "crop"),
    "grey 16": ("grey_16_bit.png", TINY_VAE, "lanczos", 0.02, "crop"),
    "RGB 16": ("rgb_16_bit.png", TINY_VAE, "lanczos", 0.02, "crop"),
    "MPO": ("two_frames_mpo.jpg", TINY_VAE, "lanczos", 0.02, "crop"),
    "phone": ("phone.jpg", TINY_VAE, "lanczos", 0.02, "crop"),
    "no crop": ("photo.jpg", KL, "lanczos", 0.02, "crop"),
    "wrong factor": ("photo.jpg", TAESD, "lanczos", 0.02, "crop"),
}


@pytest.fixture(scope="module")
def outcomes(newer: Path, model_dir: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Run every case through our service and through the tree's own nodes, each in its own process."""
    folder = tmp_path_factory.mktemp("outcomes")
    ours, theirs = [], []
    for name, *rest, fit in CASES.values():
        image = str(IMAGES / name) if (IMAGES / name).exists() else str(images / name)
        ours.append([image, *rest, fit])
        theirs.append([image, *rest, 8 if fit == "exact" else 1])
    (folder / "theirs.json").write_text(json.dumps(theirs))
    stock("encode", model_dir, folder / "theirs.json", folder / "out.safetensors", comfyui=newer)
    expected = load_file(folder / "out.safetensors")
    (folder / "ours.json").write_text(json.dumps(ours))
    arguments = (PROJECT / "tests" / "encode_cases.py", newer, model_dir, folder / "ours.json", folder)
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    responses = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        name: Outcome(response, expected[f"{number}.scaled"], expected[f"{number}.latent"])
        for number, (name, response) in enumerate(zip(CASES, responses, strict=True))
    }


@pytest.mark.parametrize("name", CASES)
def test_latents_are_those_of_the_tree(name: str, outcomes: dict[str, Outcome]) -> None:
    """Latents are the tree's own within 2e-5 with the single-frame encoder, and to the last bit without it."""
    outcome = outcomes[name]
    latent = outcome.latent.squeeze(2) if outcome.latent.ndim == 5 else outcome.latent
    single_frame = CASES[name][1] == TINY_VAE
    assert outcome.metadata["encoder"] == ("single-frame" if single_frame else "stock")
    given = load_latent(outcome.response["latent_file_path"])
    torch.testing.assert_close(given, latent, atol=2e-5 if single_frame else 0, rtol=0)
    assert outcome.metadata["scaled_image_shape"] == list(outcome.scaled.shape[1:])


NOTES = {
    "photo": [],
    "orientation 6": ["exif_orientation_applied"],
    "orientation 3": ["exif_orientation_applied"],
    "orientation 8": ["exif_orientation_applied"],
    "orientation 2": ["exif_orientation_misapplied"],
    "orientation 5": ["exif_orientation_misapplied"],
    "orientation in XMP": ["exif_orientation_ignored"],
    "orientation of another type": ["exif_orientation_ignored"],
    "transparent": ["alpha_dropped"],
    "opaque": [],
    "palette": ["alpha_dropped"],
    "grey 16": [],
    "RGB 16": [],
    "MPO": ["first_frame_used"],
    "phone": ["first_frame_used"],
}


@pytest.mark.parametrize("name", NOTES)
def test_notes_say_what_this_tree_did(name: str, outcomes: dict[str, Outcome]) -> None:
    """Image notes describe this tree's treatment of a file, not the pinned release's."""
    assert outcomes[name].metadata["image_notes"] == NOTES[name]


def test_metadata_names_the_decoder(outcomes: dict[str, Outcome]) -> None:
    """Metadata name the decoder with its version and that of ffmpeg."""
    av = pytest.importorskip("av")
    assert outcomes["photo"].metadata["image_decoder"] == f"PyAV {av.__version__}, ffmpeg {av.ffmpeg_version_info}"


def test_exact_fit_leaves_nothing_to_crop(outcomes: dict[str, Outcome]) -> None:
    """With the exact fit, both sides are multiples of the factor and nothing is cropped; other fits crop."""
    for name in ("exact", "exact KL"):
        metadata = outcomes[name].metadata
        height, width, _ = metadata["scaled_image_shape"]
        assert (height % 8, width % 8) == (0, 0)
        assert metadata["crop"] == [0, 0, width, height]
        assert metadata["fit"] == "exact"
    assert outcomes["photo"].metadata["fit"] == "crop"
    assert outcomes["photo"].metadata["crop"] == [0, 3, 176, 115]


def test_crop_is_what_the_model_was_given(outcomes: dict[str, Outcome]) -> None:
    """The crop is the whole image if ComfyUI crops nothing, and multiples of the stated factor if that is wrong."""
    assert outcomes["no crop"].metadata["scaled_image_shape"] == [118, 177, 3]
    assert outcomes["no crop"].metadata["crop"] == [0, 0, 177, 118]
    assert outcomes["no crop"].metadata["latent_shape"] == [1, 4, 14, 22]
    assert outcomes["wrong factor"].metadata["crop"] == [0, 1, 176, 117]
    assert outcomes["wrong factor"].metadata["latent_shape"] == [1, 4, 15, 22]


def test_model_that_tiles_by_itself_is_not_short_of_memory(outcomes: dict[str, Outcome]) -> None:
    """A model that always tiles is not reported as tiled for lack of memory."""
    assert outcomes["wrong factor"].metadata["tiled"] is False


def test_stock_encoder_gives_the_same_bits(
    newer: Path, model_dir: Path, tmp_path: Path, outcomes: dict[str, Outcome], run_main: RunMain
) -> None:
    """With ENCODER=stock, the command line gives the same bits as the tree's own nodes."""
    done = run_main(
        *("--image_path", IMAGES / "photo.jpg", "--vae_model_name", TINY_VAE, "--megapixels", "0.02", "--device", "cpu"),
        env={"COMFYUI_PATH": str(newer), "MODEL_DIR": str(model_dir), "ENCODER": "stock"},
    )
    assert done.returncode == 0, done.stderr
    response = json.loads(done.stdout)
    assert response["metadata"]["encoder"] == "stock"
    assert torch.equal(load_latent(response["latent_file_path"]), outcomes["photo"].latent.squeeze(2))
    assert Path(response["latent_file_path"]).parent == tmp_path / "output"


def test_pictures_of_an_image_that_is_not_cropped(newer: Path, model_dir: Path, run_main: RunMain) -> None:
    """Preview and round trip show the whole image; inspecting the latent afterwards draws the same preview."""
    env = {"COMFYUI_PATH": str(newer), "MODEL_DIR": str(model_dir), "DEVICE": "cpu"}
    options = ("--vae_model_name", KL, "--megapixels", "0.02", "--preview", "--roundtrip")
    done = run_main("--image_path", IMAGES / "photo.jpg", *options, env=env)
    assert done.returncode == 0, done.stderr
    response = json.loads(done.stdout)
    with Image.open(response["preview_path"]) as preview, Image.open(response["roundtrip_path"]) as decoded:
        assert preview.size == (2 * 177, 118)
        assert decoded.size == (176, 112)
    assert response["metadata"]["roundtrip"]["psnr_db"] > 0
    drawn = Path(response["preview_path"]).read_bytes()
    Path(response["preview_path"]).unlink()
    done = run_main("--mode", "inspect", response["latent_file_path"], env={"COMFYUI_PATH": str(newer)})
    assert "preview" in done.stdout
    assert Path(response["preview_path"]).read_bytes() == drawn


def test_further_images_are_a_feature_of_phone_photos(images: Path) -> None:
    """The photo of this test is like those of phones: Pillow finds two images in it."""
    with Image.open(images / "phone.jpg") as image:
        assert getattr(image, "n_frames", 1) == 2
    assert FurtherImages().format == "JPEG"
