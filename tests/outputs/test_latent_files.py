"""The formats of a latent: each holds the same numbers, and is opened by those whom it is for."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from config import Settings
from errors import InvalidRequest, LatentUnreadable
from latent_encoder.kafka.records import Incoming, read_request
from latent_encoder.outputs.latent_files import latent_bytes, read_latent, read_latent_file
from latent_encoder.outputs.marks import HEADER_KEY
from latent_encoder.outputs.names import SUFFIXES
from models import FileFormat, Metadata
from service import LatentEncoder
from tests.helpers import IMAGES, TINY_VAE, Encode, RunMain, load_latent

FORMATS: tuple[FileFormat, ...] = get_args(FileFormat)
SD_VAE = "random_kl.safetensors"
SMALL_SD_VAE = "taesd"
NOT_IN_HEADER = {
    *("timings_ms", "timestamp", "processing_time_ms"),  # another time each time
    *("latent_sha256", "preview_sha256", "roundtrip"),  # not known before the latent is written
    "fingerprint",  # of the name of the file, too
    *("request_id", "origin", "source_id"),  # of the request, not of the latent
}


def written(encode: Encode, latent_format: FileFormat, **fields: Any) -> Path:
    return Path(encode("photo.jpg", latent_format=latent_format, **fields).latent_file_path)


@pytest.mark.parametrize("latent_format", ["safetensors", "comfy"])
@pytest.mark.parametrize("vae", [TINY_VAE, SMALL_SD_VAE])
def test_every_format_has_the_numbers_of_the_default(latent_format: FileFormat, vae: str, encode: Encode) -> None:
    """Each format holds the same bits, has its own suffix, and is read back in four dimensions."""
    path = written(encode, latent_format, vae_model_name=vae)
    assert path.name == f"latent_photo_test{SUFFIXES[latent_format]}"
    latent, read_format = read_latent_file(path)
    assert read_format == latent_format
    assert latent.dtype == torch.float32
    assert torch.equal(latent, load_latent(written(encode, "pt", vae_model_name=vae)))


def test_default_is_what_torch_saves(encode: Encode, tmp_path: Path) -> None:
    """A `.pt` holds its tensor and nothing else, and is read back too."""
    path = written(encode, "pt")
    latent = load_latent(path)
    with (tmp_path / "archive.pt").open("wb") as file:
        torch.save(latent, file)
    assert (tmp_path / "archive.pt").read_bytes() == path.read_bytes()
    assert torch.equal(read_latent_file(path)[0], latent)


def test_safetensors_has_one_tensor(encode: Encode) -> None:
    """The tensor is `latent`, float32, `[batch, channels, height, width]`."""
    path = written(encode, "safetensors")
    tensors = load_file(path)
    assert tensors.keys() == {"latent"}
    assert torch.equal(tensors["latent"], read_latent_file(path)[0])


@pytest.mark.parametrize("latent_format", ["safetensors", "comfy"])
def test_header_has_the_metadata(latent_format: FileFormat, encode: Encode) -> None:
    """The header has the facts of the response's metadata, as JSON in one key."""
    response = encode("photo.jpg", latent_format=latent_format)
    with safe_open(response.latent_file_path, framework="pt") as file:
        header = file.metadata()
    assert header.keys() == {HEADER_KEY}
    stated = json.loads(response.metadata.model_dump_json())
    assert json.loads(header[HEADER_KEY]) == {name: stated[name] for name in Metadata.model_fields.keys() - NOT_IN_HEADER}


@pytest.mark.parametrize("latent_format", FORMATS)
def test_same_request_gives_the_same_bytes(latent_format: FileFormat, encode: Encode, tmp_path: Path) -> None:
    """Folder and name of the file do not change its bytes."""
    first = written(encode, latent_format)
    second = written(encode, latent_format, output_dir=str(tmp_path / "elsewhere"), request_id="another")
    assert first.read_bytes() == second.read_bytes()


@pytest.fixture
def load_in_comfyui(encoder: LatentEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """Return ComfyUI's LoadLatent, with the folder of the latents as its input folder."""
    monkeypatch.setattr(importlib.import_module("folder_paths"), "input_directory", str(tmp_path))
    node: Any = encoder.runtime.nodes["LoadLatent"]

    def load(path: Path) -> Any:
        assert path.name in node.INPUT_TYPES()["required"]["latent"][0], "the node does not list it"
        assert node.VALIDATE_INPUTS(path.name) is True
        return node().load(path.name)[0]

    return load


@pytest.mark.parametrize(("vae_name", "shape"), [(TINY_VAE, (1, 16, 1, 10, 15)), (SD_VAE, (1, 4, 10, 15))])
def test_comfyui_opens_and_decodes_it(
    vae_name: str,
    shape: tuple[int, ...],
    encoder: LatentEncoder,
    encode: Encode,
    load_in_comfyui: Callable[[Path], dict[str, torch.Tensor]],
) -> None:
    """LoadLatent gives VAEEncode's result, in ComfyUI's own shape, and VAEDecode accepts it."""
    response = encode("photo.jpg", latent_format="comfy", vae_model_name=vae_name, megapixels=0.01)
    loaded = load_in_comfyui(Path(response.latent_file_path))
    assert tuple(loaded["samples"].shape) == shape
    with torch.inference_mode():
        vae = encoder.runtime.load_vae(vae_name)
        scaled = encoder.runtime.scale(
            encoder.runtime.load_image((IMAGES / "photo.jpg").read_bytes(), ".jpg"), "lanczos", 0.01
        )
        torch.testing.assert_close(loaded["samples"], encoder.runtime.encode(vae, scaled), atol=2e-5, rtol=0)
        (decoded,) = encoder.runtime.nodes["VAEDecode"]().decode(vae, loaded)
    left, upper, right, lower = response.metadata.crop
    assert tuple(decoded.shape) == (1, lower - upper, right - left, 3)
    if vae_name == TINY_VAE:  # the other one's weights are random
        assert (decoded - scaled[:, upper:lower, left:right]).abs().mean() < 0.1


@pytest.mark.parametrize(("frames", "shape"), [(True, (1, 16, 1, 3, 5)), (False, (1, 16, 3, 5))])
def test_what_comfyui_saves_is_read(
    frames: bool, shape: tuple[int, ...], encoder: LatentEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of ComfyUI's SaveLatent node is read; ours has the same tensors."""
    monkeypatch.setattr(importlib.import_module("folder_paths"), "output_directory", str(tmp_path))
    samples = torch.randn(shape)
    encoder.runtime.nodes["SaveLatent"]().save({"samples": samples}, "saved")
    saved = tmp_path / "saved_00001_.latent"
    latent = read_latent_file(saved)[0]
    assert torch.equal(latent, samples.view(1, 16, 3, 5))
    ours, theirs = tmp_path / "ours.latent", load_file(saved)
    ours.write_bytes(latent_bytes(latent, "comfy", frames=frames, header={}))
    assert load_file(ours).keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in load_file(ours).items())


@hypothesis_settings(max_examples=30)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 48), st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from(FORMATS),
    st.booleans(),
    st.dictionaries(st.text(), st.text() | st.integers() | st.none()),
)
def test_any_latent_comes_back(
    shape: tuple[int, int, int, int], latent_format: FileFormat, frames: bool, header: dict[str, str | int | None]
) -> None:
    """Any shape and header is read back in four dimensions, and the bytes are the same each time."""
    latent = torch.randn(shape)
    data = latent_bytes(latent, latent_format, frames=frames, header=header)
    assert torch.equal(read_latent(data, latent_format), latent)
    assert latent_bytes(latent.clone(), latent_format, frames=frames, header=header) == data


def test_kafka_request_may_ask_for_a_format(settings: Settings) -> None:
    """The field has that name; another word is refused with the list of formats."""

    def asked(latent_format: str) -> str:
        value = json.dumps({"image_path": "x.png", "latent_format": latent_format}).encode()
        return read_request(Incoming("requests", 0, 0, None, None, value, ()), settings).latent_format

    assert [asked(name) for name in FORMATS] == ["pt", "safetensors", "comfy"]
    with pytest.raises(InvalidRequest, match=r"latent_format: .*'pt', 'safetensors' or 'comfy' \(got 'npz'\)"):
        asked("npz")


def test_mistyped_format_is_an_invalid_request(run_main: RunMain) -> None:
    """The command line refuses it like any field that is out of range."""
    done = run_main("--image_path", IMAGES / "photo.jpg", "--latent-format", "safetensor")
    response = json.loads(done.stdout)
    assert (done.returncode, response["error_code"]) == (2, "INVALID_REQUEST")
    assert response["error_message"].startswith("Invalid request: latent_format: ")


class Called:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.folder),)


def save_of(value: object) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


def tensors_of(**tensors: torch.Tensor) -> Callable[[Path], None]:
    return lambda path: save_file(tensors, path)


def truncated(path: Path) -> None:
    (latent_format,) = (name for name, suffix in SUFFIXES.items() if suffix == path.suffix)
    path.write_bytes(latent_bytes(torch.zeros(1, 4, 8, 8), latent_format, frames=False, header={})[:-100])


def pickle_with_code(path: Path) -> None:
    path.write_bytes(pickle.dumps(Called(path.with_suffix(".executed")), protocol=2))


def archive_with_code(path: Path) -> None:
    torch.save(Called(path.with_suffix(".executed")), path)


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))


NOT_PLAIN = "its tensor is not a plain, contiguous one of floating-point numbers"
NOT_TORCH = "it is truncated, or not a plain tensor that torch.save wrote"
NOT_SAFETENSORS = "it is empty, truncated or not a safetensors file"
PLAIN, OTHER = torch.zeros(1, 4, 2, 2), torch.zeros(4, 4)
UNREADABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated.pt": (truncated, NOT_TORCH),
    "truncated.safetensors": (truncated, NOT_SAFETENSORS),
    "truncated.latent": (truncated, NOT_SAFETENSORS),
    "empty.pt": (Path.touch, NOT_TORCH),
    "empty.latent": (Path.touch, NOT_SAFETENSORS),
    "pickle.pt": (pickle_with_code, NOT_TORCH),
    "archive.pt": (archive_with_code, NOT_TORCH),
    "pickle.latent": (pickle_with_code, NOT_SAFETENSORS),
    "compressed.pt": (compressed, NOT_TORCH),
    "dict.pt": (save_of({"samples": PLAIN}), "it holds no tensor, but an object of the type dict"),
    "matrix.pt": (save_of(OTHER), "its tensor of shape [4, 4] is not the latent of one image"),
    "huge.pt": (save_of(torch.zeros(1).expand(1, 16, 10**6, 10**6)), NOT_PLAIN),
    "sparse.pt": (save_of(torch.zeros(1, 4, 2, 2).to_sparse()), NOT_PLAIN),
    "meta.pt": (save_of(torch.zeros(1, 4, 2, 2, device="meta")), NOT_PLAIN),
    "whole.pt": (save_of(PLAIN.int()), NOT_PLAIN),
    "none.safetensors": (
        tensors_of(latent=torch.zeros(1, 4, 0, 2)),
        "its tensor of shape [1, 4, 0, 2] is not the latent of one",
    ),
    "other.safetensors": (tensors_of(weight=OTHER), "it has no tensor named latent"),
    "other.latent": (tensors_of(latent=PLAIN), "it has no tensor named latent_tensor"),
    "early.latent": (tensors_of(latent_tensor=PLAIN), "an early ComfyUI wrote it, which scaled latents"),
    "video.latent": (
        tensors_of(latent_tensor=torch.zeros(1, 16, 3, 2, 2), latent_format_version_0=torch.empty(0)),
        "its tensor of shape [1, 16, 3, 2, 2] is not the latent of one image",
    ),
    "latent.npz": (Path.touch, "its name ends in none of .pt, .safetensors, .latent"),
    "nowhere.pt": (lambda _: None, "No such file or directory"),
    "folder.latent": (Path.mkdir, "Is a directory"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor:UserWarning")
@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_latent_is_refused(name: str, tmp_path: Path) -> None:
    """One sentence names the file and its fault; no code in it is run."""
    make, reason = UNREADABLE[name]
    path = tmp_path / name
    make(path)
    with pytest.raises(LatentUnreadable) as caught:
        read_latent_file(path)
    message = str(caught.value)
    assert message.startswith(f"Cannot read {path} as a latent: ")
    assert reason in message
    assert message.endswith(".")
    assert "\n" not in message
    assert not path.with_suffix(".executed").exists()
