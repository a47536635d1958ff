"""VAE files: finding them, refusing damaged and incomplete ones, and keeping VAEs loaded."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from config import Settings
from errors import ErrorCode, VaeModelInvalid
from latent_encoder.comfy_runtime import Vae
from latent_encoder.vae.cache import VaeCache
from latent_encoder.vae.checks import recorded_loads
from latent_encoder.vae.encoders import DECODER_PARTS
from models import ErrorResponse, SuccessResponse
from service import LatentEncoder
from tests.helpers import COMFYUI, PROJECT, TINY_VAE, VAE, Encode, load_latent
from tests.trees import needs_pixel_space, needs_tiny_vae

pytestmark = pytest.mark.core

TINY = PROJECT / "tiny_vae" / TINY_VAE


def whole(beside: Path) -> Path:
    """Return a sound VAE file of the Wan family that this tree loads; `beside` is any path in the VAEs' folder."""
    return TINY if VAE == TINY_VAE else beside.with_name(VAE)


class Called:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call, self.arguments


def malicious(path: Path) -> Called:
    """Return an object whose pickle creates a folder when it is loaded."""
    return Called(os.mkdir, str(path.with_suffix(".executed")))


def without_encoder_tensors(path: Path) -> None:
    weights = load_file(whole(path))
    for key in [key for key in weights if key.startswith("encoder.middle")]:
        del weights[key]
    save_file(weights, path)


def without_quantisation_convolution(path: Path) -> None:
    weights = load_file(whole(path))
    del weights["conv1.bias"]
    save_file(weights, path)


def with_wrong_shape(path: Path) -> None:
    weights = load_file(whole(path))
    weights["encoder.conv1.weight"] = torch.zeros(4, 3, 3, 3, 3)
    save_file(weights, path)


def with_nan(path: Path) -> None:
    weights = load_file(whole(path))
    weights["encoder.conv1.weight"][0, 0, 0, 0, 0] = float("nan")
    save_file(weights, path)


def of_something_else(path: Path) -> None:
    save_file({"lora.up.weight": torch.zeros(4, 4)}, path)


def empty(path: Path) -> None:
    path.touch()


def text(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\n")


def truncated(path: Path) -> None:
    path.write_bytes(whole(path).read_bytes()[:-1000])


def malicious_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(malicious(path), protocol=2))


def malicious_torch_file(path: Path) -> None:
    torch.save({"encoder": malicious(path)}, path)


def asks_for_memory(path: Path) -> None:
    """Write a few bytes that allocate 100 gigabytes when they are unpickled."""
    path.write_bytes(pickle.dumps({"encoder": Called(bytearray, 10**11)}, protocol=2))


def asks_for_memory_in_archive(path: Path) -> None:
    torch.save({"encoder": Called(bytearray, 10**11)}, path)


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))


def broken_archive(path: Path) -> None:
    torch.save(load_file(whole(path)), path)
    path.write_bytes(path.read_bytes()[:-1000])


def for_audio(path: Path) -> None:
    save_file({"vocoder.backbone.channel_layers.0.0.bias": torch.zeros(128)}, path)


def for_objects(path: Path) -> None:
    save_file({"txt_dec.blocks.3.4.conv2.weight": torch.zeros(64, 3, 3, 3, 64)}, path)


INVALID = {
    "ace_step.safetensors": (for_audio, "it is a VAE for audio (ACE-Step), which encodes no images"),
    "trellis.safetensors": (for_objects, "it is a VAE for 3-D objects (Trellis 2 texture), which encodes no images"),
    "no_encoder_middle.safetensors": (without_encoder_tensors, "lacks tensors that encoding needs: encoder.middle.0"),
    "no_conv1_bias.safetensors": (without_quantisation_convolution, "lacks tensors that encoding needs: conv1.bias"),
    "wrong_shape.safetensors": (
        with_wrong_shape,
        "it has tensors of other sizes than Wan 2.1 / Qwen-Image: encoder.conv1.weight; ",
    ),
    "nan.safetensors": (with_nan, "not finite in: encoder.conv1.weight"),
    "lora.safetensors": (of_something_else, "it is a LoRA, not a VAE; "),
    "empty.safetensors": (empty, "it is empty (0 bytes); download it again"),
    "git_lfs_pointer.safetensors": (text, "it is a Git LFS pointer, not the model; run `git lfs pull`"),
    "truncated.safetensors": (truncated, "it is truncated: it has "),
    "pickle_named.safetensors": (malicious_pickle, "it is a pickle whose name ends like that of a safetensors file; "),
    "memory.pkl": (asks_for_memory, "holds more than plain weights"),
    "memory.pt": (asks_for_memory_in_archive, "holds more than plain weights"),
    "compressed.pt": (compressed, "holds more than plain weights"),
    "broken.pt": (broken_archive, "or a damaged one"),
    "malicious.pkl": (malicious_pickle, "holds more than plain weights"),
    "malicious.pt": (malicious_torch_file, "holds more than plain weights"),
}


@pytest.mark.parametrize("name", INVALID)
def test_file_that_cannot_encode_is_refused(name: str, model_dir: Path, respond: Encode, tmp_path: Path) -> None:
    """The response is VAE_MODEL_INVALID with the file and the reason; no code in the file runs and nothing is written."""
    make, words = INVALID[name]
    path = model_dir / "vae" / name
    make(path)
    response = respond("photo.jpg", vae_model_name=name)
    assert isinstance(response, ErrorResponse)
    assert response.error_code == ErrorCode.VAE_MODEL_INVALID
    assert words in response.error_message
    assert str(path) in response.error_message
    assert "\n" not in response.error_message
    assert not path.with_suffix(".executed").exists()
    assert list(tmp_path.iterdir()) == []


def test_decoder_is_not_needed(model_dir: Path, encode: Encode) -> None:
    """A file without tensors that only decoding uses gives the latent of the whole file."""
    weights = load_file(whole(model_dir / "vae" / VAE))
    for key in [key for key in weights if key.startswith(("decoder.upsamples", "conv2."))]:
        del weights[key]
    save_file(weights, model_dir / "vae" / "no_decoder.safetensors")
    latent = load_latent(encode("photo.jpg", vae_model_name="no_decoder.safetensors").latent_file_path)
    assert torch.equal(latent, load_latent(encode("photo.jpg").latent_file_path))


def test_torch_file_of_plain_weights_is_fine(model_dir: Path, encode: Encode) -> None:
    """A `.pt` with the same weights gives the same latent."""
    torch.save(load_file(whole(model_dir / "vae" / VAE)), model_dir / "vae" / "plain.pt")
    latent = load_latent(encode("photo.jpg", vae_model_name="plain.pt").latent_file_path)
    assert torch.equal(latent, load_latent(encode("photo.jpg").latent_file_path))


@pytest.mark.parametrize("name", ["nowhere.safetensors", "sub/nowhere.safetensors", "taesd3"])
def test_error_for_a_missing_model_says_how_to_get_one(
    name: str, model_dir: Path, encoder: LatentEncoder, respond: Encode
) -> None:
    """The message has the folders that were searched, the files in them, and both ways to get a model."""
    existing = encoder.runtime.vae_names()[0]  # the first, because other tests leave more files here than a message names
    response = respond("photo.jpg", vae_model_name=name)
    assert isinstance(response, ErrorResponse)
    assert response.error_code == ErrorCode.VAE_MODEL_NOT_FOUND
    for words in (name, str(model_dir), str(PROJECT / "comfyui/models/vae"), existing, "--download-vae", "MODEL_DIR"):
        assert words in response.error_message


def test_folders_are_searched_in_order(encoder: LatentEncoder, model_dir: Path) -> None:
    """The order is MODEL_DIR itself, its `vae/`, ComfyUI's own folder, then that of `comfyui/` if another tree is used."""
    trees = dict.fromkeys([COMFYUI / "models/vae", PROJECT / "comfyui/models/vae"])
    assert [folder for folder in encoder.runtime.vae_folders() if folder in [model_dir, model_dir / "vae", *trees]] == [
        model_dir,
        model_dir / "vae",
        *trees,
    ]


def test_name_in_a_sub_folder_is_found(model_dir: Path, respond: Encode) -> None:
    """`qwen/x.safetensors` is a name like any other."""
    (model_dir / "qwen").mkdir()
    shutil.copy(whole(model_dir / "vae" / VAE), model_dir / "qwen" / "x.safetensors")
    assert isinstance(respond("photo.jpg", vae_model_name="qwen/x.safetensors"), SuccessResponse)


def test_vae_sha256_is_that_of_the_file(encode: Encode, model_dir: Path) -> None:
    """`vae_sha256` equals the output of `sha256sum` for the file."""
    file = whole(model_dir / "vae" / VAE)
    expected = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True).stdout.split()[0]
    assert encode("photo.jpg").metadata.vae_sha256 == expected


@needs_pixel_space
def test_vae_without_a_file_has_no_sha256(encode: Encode) -> None:
    """`pixel_space` is built into ComfyUI."""
    assert encode("photo.jpg", vae_model_name="pixel_space").metadata.vae_sha256 is None


def vae_of(cache: VaeCache, name: str) -> Vae:
    return cache.get(name).vae


def test_vae_stays_loaded(encoder: LatentEncoder, settings: Settings) -> None:
    """A second request uses the very same object."""
    cache = VaeCache(encoder.runtime, settings)
    assert vae_of(cache, VAE) is vae_of(cache, VAE)


def test_least_recently_used_vae_is_evicted_first(encoder: LatentEncoder, settings: Settings) -> None:
    """With room for two, a third VAE evicts the one that was used longest ago."""
    cache = VaeCache(encoder.runtime, settings.model_copy(update={"vae_cache_size": 2}))
    wan, taesd = vae_of(cache, VAE), vae_of(cache, "taesd")
    assert vae_of(cache, VAE) is wan
    vae_of(cache, "random_kl.safetensors")
    assert vae_of(cache, VAE) is wan
    assert vae_of(cache, "taesd") is not taesd


@pytest.mark.parametrize("make", [empty, text, truncated, asks_for_memory, of_something_else, for_audio])
def test_damaged_or_foreign_file_evicts_no_vae(
    make: Callable[[Path], None], encoder: LatentEncoder, settings: Settings, model_dir: Path
) -> None:
    """With room for one, that VAE stays loaded when a request names a damaged file or another model."""
    cache = VaeCache(encoder.runtime, settings.model_copy(update={"vae_cache_size": 1}))
    taesd = vae_of(cache, "taesd")
    name = f"{make.__name__}.{'pt' if make is asks_for_memory else 'safetensors'}"
    make(model_dir / "vae" / name)
    with pytest.raises(VaeModelInvalid):
        cache.get(name)
    assert vae_of(cache, "taesd") is taesd


def test_replaced_file_is_loaded_again(model_dir: Path, encode: Encode) -> None:
    """After other weights have replaced a file under the same name, requests get the latents of the new weights."""
    path = model_dir / "vae" / "replaced.safetensors"
    shutil.copy(whole(path), path)
    before = encode("photo.jpg", vae_model_name=path.name)
    first = load_latent(before.latent_file_path)
    weights = load_file(whole(path))
    weights["conv1.bias"] += 1
    save_file(weights, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    after = encode("photo.jpg", vae_model_name=path.name)
    assert after.metadata.vae_sha256 != before.metadata.vae_sha256
    assert not torch.equal(load_latent(after.latent_file_path), first)


@needs_tiny_vae
def test_trial_vae_is_logged_as_one(
    encoder: LatentEncoder, settings: Settings, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Loading the trial VAE logs a warning; loading another VAE does not."""
    vaes = VaeCache(encoder.runtime, settings)
    vaes.get(TINY_VAE)
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert warning.getMessage().startswith("this vae is for trying the service")
    caplog.clear()
    shutil.copy(TINY, model_dir / "another.safetensors")
    vaes.get("another.safetensors")
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


def test_decoder_is_read_only_if_it_decodes(encoder: LatentEncoder) -> None:
    """Loading for encoding alone leaves the decoder unread, reports none of it as missing, and refuses other shapes."""
    with torch.no_grad():
        model = encoder.runtime.load_vae(VAE).first_stage_model
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    with recorded_loads(decodes=False) as loads:
        model.load_state_dict(state, strict=False)
        assert list(loads[id(model)].missing) == []
        changed = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, state[name])}
        assert changed
        assert not any(name.startswith(DECODER_PARTS) for name in changed)
        name = next(name for name in state if name.startswith(DECODER_PARTS))
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_state_dict({**state, name: torch.zeros(7)}, strict=False)
    with recorded_loads():
        model.load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
