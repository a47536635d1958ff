"""docs/latents.md: its code blocks are run as they stand there, with the packages that they are for.

The working folder has a `Qwen/Qwen-Image` and a Stable Diffusion of the real architectures, tiny or with random weights:
diffusers uses a folder with the name of a model instead of downloading the model.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.encode_diffusers import diffusers_key
from latent_encoder.outputs.latent_files import latent_bytes, read_latent_file
from models import ResponseMessage
from service import LatentEncoder
from tests.helpers import IMAGES, PROJECT, TINY_VAE, Encode, RunMain, load_latent

PAGE = (PROJECT / "docs" / "latents.md").read_text(encoding="utf-8")
QWEN = "Qwen/Qwen-Image"
STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"

# diffusers and transformers warn about their own dependencies, and about models without weights.
pytestmark = pytest.mark.filterwarnings("ignore")


def snippets(heading: str, language: str = "python") -> list[str]:
    """Return the code blocks under that heading, in order."""
    (text,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run(code: list[str], **names: Any) -> dict[str, Any]:
    """Run code blocks one after the other, and return the names that they leave behind."""
    for block in code:
        exec(compile(block, "docs/latents.md", "exec"), names)  # noqa: S102  # the page is part of the project
    return names


def without_variance(quant_conv: Any) -> None:
    """Remove the variance of an encoder's latents: a pipeline then samples their mean, which the service writes."""
    half = quant_conv.weight.shape[0] // 2
    quant_conv.weight.data[half:] = 0
    quant_conv.bias.data[half:] = -30


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the reader's working folder, with the photo in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(IMAGES / "photo.jpg", tmp_path)
    return tmp_path


@pytest.fixture
def diffusers() -> Any:
    return pytest.importorskip("diffusers")


@pytest.fixture
def encode_photo(encode: Encode, folder: Path) -> Callable[..., Any]:
    """Return a function that encodes the photo; the files are in the folder that the page names."""

    def encode_photo(request_id: str = "1", **fields: Any) -> Any:
        return encode(folder / "photo.jpg", request_id=request_id, output_dir=str(folder / "output"), **fields)

    return encode_photo


def covered_pixels(response: Any) -> torch.Tensor:
    """Return the part of the scaled image that the latent covers, as diffusers' `[1, 3, height, width]` in [-1, 1]."""
    with Image.open(response.scaled_image_path) as image:
        covered = image.crop(response.metadata.crop)
    pixels = torch.frombuffer(bytearray(covered.tobytes()), dtype=torch.uint8).view(1, covered.height, covered.width, 3)
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1


def test_command_writes_the_format(folder: Path, run_main: RunMain) -> None:
    """The page's command, with the default VAE's name, writes the file that the rest of the page reads."""
    shutil.copy(PROJECT / "tiny_vae" / TINY_VAE, folder / "qwen_image_vae.safetensors")
    (command,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    python, main, *arguments = shlex.split(command)
    assert (python, main) == ("python", "main.py")
    done = run_main(*arguments, env={"MODEL_DIR": str(folder), "MEGAPIXELS": "0.01"})
    assert done.returncode == 0, done.stderr
    assert read_latent_file(folder / "output" / "latent_photo_1.latent")[0].shape == (1, 16, 10, 15)


def test_service_of_ones_own_reads_them(encode_photo: Callable[..., Any]) -> None:
    """The page's code reads the `.pt`, the safetensors file with its header, and the file that a Kafka response names."""
    response = encode_photo()
    encode_photo(latent_format="safetensors")
    own, header, kafka = snippets("A service of your own")
    expected = load_latent(response.latent_file_path)
    assert torch.equal(run([own])["latent"], expected)
    read = run([header])
    assert torch.equal(read["latent"], expected)
    assert (read["left"], read["upper"], read["right"], read["lower"]) == response.metadata.crop
    value = ResponseMessage.of(response, None, datetime.now(UTC)).model_dump_json().encode()
    assert torch.equal(run([kafka], value=value)["latent"], expected)


def test_page_scales_the_latent_as_comfyui_does(encode_photo: Callable[..., Any], encoder: LatentEncoder) -> None:
    """The page's code scales a latent to the numbers of `process_in`, and back."""
    response = encode_photo()
    shown = run(snippets("Scaling a latent for a model"))
    space: Any = encoder.runtime.latent_space(response.metadata.latent_space)
    expected = space.process_in(shown["latent"].unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(shown["scaled"], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shown["restored"], shown["latent"], rtol=1e-6, atol=1e-6)


def test_node_of_the_workflow_opens_the_latent(
    encoder: LatentEncoder, encode_photo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's node opens the latent if the output folder is ComfyUI's input folder."""
    path = Path(encode_photo(latent_format="comfy").latent_file_path)
    monkeypatch.setattr(importlib.import_module("folder_paths"), "input_directory", str(path.parent))
    (text,) = snippets("ComfyUI", "json")
    workflow = json.loads(text)
    node: Any = encoder.runtime.nodes[workflow["class_type"]]
    samples = getattr(node(), node.FUNCTION)(**workflow["inputs"])[0]["samples"]
    assert torch.equal(samples.squeeze(2), read_latent_file(path)[0])


def save_qwen_image(diffusers: Any, folder: Path) -> None:
    """Save a whole Qwen-Image pipeline: our tiny VAE, and very small other parts with random weights of a fixed seed."""
    torch.manual_seed(0)
    transformers: Any = importlib.import_module("transformers")
    alphabet = importlib.import_module("tokenizers.pre_tokenizers").ByteLevel.alphabet()
    vae = diffusers.AutoencoderKLQwenImage(base_dim=8)
    weights = load_file(PROJECT / "tiny_vae" / TINY_VAE)
    vae.load_state_dict({diffusers_key(key): tensor.float() for key, tensor in weights.items()})
    without_variance(vae.quant_conv)
    tokenizer = transformers.Qwen2Tokenizer(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[])
    side = {"hidden_size": 16, "intermediate_size": 16}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    rope = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2]}
    text_encoder = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={**side, **layers, "rope_scaling": rope, "rope_theta": 1e6},
            vision_config={**side, "depth": 1, "num_heads": 2, "out_hidden_size": 16},
        )
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=64,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    diffusers.QwenImageImg2ImgPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder / QWEN)


def test_diffusers_takes_the_latent_of_qwen_image(diffusers: Any, encode_photo: Callable[..., Any], folder: Path) -> None:
    """The pipeline of diffusers scales a latent to the page's numbers, and returns the image if it adds almost no noise."""
    response = encode_photo()
    save_qwen_image(diffusers, folder)
    shown = run(snippets("diffusers: Qwen-Image"))
    vae, pipeline, latent, scaled = (shown[name] for name in ("vae", "pipeline", "latent", "scaled"))
    pixels = covered_pixels(response)
    with torch.inference_mode():
        own = pipeline._encode_vae_image(pixels.unsqueeze(2), generator=None)
    torch.testing.assert_close(scaled, own, atol=2e-3, rtol=0)  # the PNG has 8 bits
    torch.testing.assert_close(shown["decoded"], vae.decode(latent.unsqueeze(2)).sample[:, :, 0], atol=1e-4, rtol=1e-4)
    assert (shown["decoded"] - pixels).abs().mean() < 0.2

    start, image = shown["start"], shown["image"]
    size = {"height": 8 * start.shape[2], "width": 8 * start.shape[3]}
    assert (image.height, image.width) == (size["height"], size["width"])
    kept = pipeline(prompt="a rose", image=start, **size, sigmas=[1e-4], output_type="pt").images
    expected = vae.decode(latent[:, :, : start.shape[2], : start.shape[3]].unsqueeze(2)).sample[:, :, 0] / 2 + 0.5
    torch.testing.assert_close(kept, expected.clamp(0, 1), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="Input is in incorrect format"):
        pipeline(prompt="a rose", image=scaled, **size)


def save_stable_diffusion(diffusers: Any, folder: Path, weights: Path) -> None:
    """Save the VAE of SD 1.5 for diffusers, with the weights that the service encoded with."""
    shape = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(**shape, **kinds)
    converted = diffusers.loaders.single_file_utils.convert_ldm_vae_checkpoint(load_file(weights), dict(vae.config))
    vae.load_state_dict({key: tensor.float() for key, tensor in converted.items()}, assign=True)
    without_variance(vae.quant_conv)
    vae.save_pretrained(folder / STABLE_DIFFUSION / "vae")


def test_diffusers_takes_the_latent_of_stable_diffusion(
    diffusers: Any, encode_photo: Callable[..., Any], folder: Path, model_dir: Path
) -> None:
    """The pipeline of diffusers makes the same noisy latent from the service's latent and from the pixels."""
    response = encode_photo("2", vae_model_name="random_kl.safetensors", megapixels=0.01)
    save_stable_diffusion(diffusers, folder, model_dir / "vae" / "random_kl.safetensors")
    shown = run(snippets("diffusers: SD, SDXL, SD3, Flux"))
    scaled = shown["scaled"]
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(
        vae=shown["vae"],
        scheduler=diffusers.DDIMScheduler(),
        **dict.fromkeys(("text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor")),
        requires_safety_checker=False,
    )

    def prepared(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        taken = pipeline.image_processor.preprocess(image)
        with torch.inference_mode():
            noisy: torch.Tensor = pipeline.prepare_latents(taken, torch.tensor([500]), 1, 1, torch.float32, "cpu", generator)
        return noisy

    own = prepared(covered_pixels(response) / 2 + 0.5, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    torch.randn(scaled.shape, generator=generator)  # the numbers that the pipeline used to sample its own latent
    torch.testing.assert_close(prepared(scaled, generator), own, atol=5e-3, rtol=5e-3)


def test_shift_is_that_of_its_pipeline(diffusers: Any, folder: Path) -> None:
    """The page scales a latent of a VAE with a shift to the numbers of Flux's pipeline, and back to the same image."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=2, latent_channels=16, shift_factor=0.1159, scaling_factor=0.3611
    )
    without_variance(vae.quant_conv)
    vae.save_pretrained(folder / STABLE_DIFFUSION / "vae")
    pixels = torch.rand(1, 3, 8, 8) * 2 - 1
    with torch.inference_mode():
        latent = vae.encode(pixels).latent_dist.mean
    (folder / "output").mkdir()
    (folder / "output" / "latent_photo_2.pt").write_bytes(latent_bytes(latent, "pt", frames=False, header={}))
    parts = ("scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
    pipeline = diffusers.FluxImg2ImgPipeline(vae=vae, **dict.fromkeys(parts))
    with torch.inference_mode():
        own = pipeline._encode_vae_image(pixels, generator=None)
        image = vae.decode(latent).sample
    shown = run(snippets("diffusers: SD, SDXL, SD3, Flux"))
    torch.testing.assert_close(shown["scaled"], own)
    torch.testing.assert_close(shown["decoded"], image, atol=1e-5, rtol=1e-5)
