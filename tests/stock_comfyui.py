"""Plain ComfyUI without any of our code, run as a process of its own: the source of the numbers that ours must equal.

    python tests/stock_comfyui.py COMFYUI_DIR describe MODEL_DIR
    python tests/stock_comfyui.py COMFYUI_DIR make-vaes MODEL_DIR FAMILY…
    python tests/stock_comfyui.py COMFYUI_DIR encode MODEL_DIR CASES.json OUT.safetensors
    python tests/stock_comfyui.py COMFYUI_DIR decode MODEL_DIR OUT.safetensors LATENT.pt…
    python tests/stock_comfyui.py COMFYUI_DIR load MODEL_DIR OUT.safetensors IMAGE…

`describe` prints the facts of `tests/trees.py` as JSON. `load` saves the pixels of LoadImage for images, by their number.
`make-vaes` writes VAEs of the real architectures with random weights of a fixed seed. `encode` runs the four nodes by hand
for each case `[image_path, vae_name, upscale_method, megapixels]`, and saves scaled images and latents by the case's number. A
fifth item is `resolution_steps`.
`decode` saves the images that the tiny VAE makes of latents of one frame, by their number.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMFYUI = Path(sys.argv[1])
sys.path.insert(0, str(COMFYUI))

import comfy.cli_args

comfy.cli_args.args.cpu = True

import comfy.ldm.cascade.stage_c_coder
import comfy.ldm.models.autoencoder
import comfy.ldm.wan.vae
import comfy.taesd.taesd
import folder_paths
import nodes
import torch
from comfy_extras import nodes_post_processing
from safetensors.torch import save_file

OF_TINY_VAE = Path(__file__).resolve().parent.parent / "tiny_vae"
TINY_VAE = "tiny_qwen_vae.safetensors"
TAEHV_CHANNELS = {
    "taehv": 16,
    "lighttaew2_1": 16,
    "lighttaew2_2": 48,
    "lighttaehy1_5": 32,
    "taeltx_2": 128,
    "taeh3": 24,
}

KL_CONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def describe() -> None:
    import comfyui_version

    facts = {
        "version": comfyui_version.__version__,
        "loads_tiny_vae": loads(TINY_VAE),
        "has_resolution_steps": has_resolution_steps(),
        "has_pixel_space": "pixel_space" in nodes.VAELoader.INPUT_TYPES()["required"]["vae_name"][0],
    }
    print(json.dumps(facts))


def loads(vae_name: str) -> bool:
    try:
        nodes.VAELoader().load_vae(vae_name)
    except RuntimeError as exc:
        if "size mismatch" not in str(exc):
            raise
        return False
    return True


def load(out: Path, images: list[str]) -> None:
    loaded = {}
    for number, image in enumerate(map(Path, images)):
        folder_paths.set_input_directory(str(image.parent))  # releases since 0.28.0 read nothing else
        loaded[str(number)] = nodes.LoadImage().load_image(image.name)[0].contiguous()
    save_file(loaded, out)


def make_vaes(model_dir: Path, families: list[str]) -> None:
    makers = {"kl": make_kl, "hollow-kl": make_hollow_kl, "taesd": make_taesd, "wan": make_wan, "tiny": make_tiny}
    for family in families:
        makers[family](model_dir)


def make_kl(model_dir: Path) -> None:
    model = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=KL_CONFIG, embed_dim=4)
    save_file(random_weights(model.state_dict()), model_dir / "vae" / "random_kl.safetensors")


def make_hollow_kl(model_dir: Path) -> None:
    """All zeros, and as good as no place on disk: a header, and a hole."""
    with torch.device("meta"):
        model = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=KL_CONFIG, embed_dim=4)
    header, end = {}, 0
    for key, tensor in model.state_dict().items():
        start, end = end, end + 2 * tensor.numel()
        header[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (model_dir / "vae" / "hollow_kl.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def make_taesd(model_dir: Path) -> None:
    make_pair(model_dir, "taesd", 4)


def make_pair(model_dir: Path, name: str, channels: int) -> None:
    weights = random_weights(comfy.taesd.taesd.TAESD(latent_channels=channels).state_dict())
    for part in ("encoder", "decoder"):
        prefix = f"taesd_{part}."
        weights_of_part = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        save_file(weights_of_part, model_dir / "vae_approx" / f"{name}_{part}.safetensors")


def make_wan(model_dir: Path) -> None:
    shape = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True]}
    model = comfy.ldm.wan.vae.WanVAE(dim=96, z_dim=16, dropout=0.0, **shape)
    save_file(random_weights(model.state_dict()), model_dir / "vae" / "random_wan.safetensors")


def make_tiny(model_dir: Path) -> None:
    """Every other small VAE that this release knows: TAEHVs, FLUX.2's TAESD pair, the encoder of Stable Cascade C."""
    for name in getattr(nodes.VAELoader, "video_taes", ()):
        if name in TAEHV_CHANNELS:
            weights = random_weights(
                importlib.import_module("comfy.taesd.taehv").TAEHV(latent_channels=TAEHV_CHANNELS[name]).state_dict()
            )
            dtype = torch.float16 if name == "taehv" else torch.bfloat16  # the dtype decides between HunyuanVideo and Wan 2.1
            weights = {key: value.to(dtype) for key, value in weights.items()}
            save_file(weights, model_dir / "vae_approx" / f"{name}.safetensors")
    if "taef2" in getattr(nodes.VAELoader, "image_taes", ()):
        make_pair(model_dir, "taef2", 128)
    encoder = comfy.ldm.cascade.stage_c_coder.StageC_coder().encoder
    save_file(random_weights(encoder.state_dict()), model_dir / "vae" / "effnet_encoder.safetensors")


def random_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under which activations neither vanish nor explode, so that a difference anywhere shows in the latent."""
    generator = torch.Generator().manual_seed(0)
    return {key: random_tensor(key, tensor.shape, generator).to(torch.bfloat16) for key, tensor in state.items()}


def random_tensor(key: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if key.endswith("running_var"):
        return 1 + 0.1 * torch.rand(shape, generator=generator)
    if key.endswith("gamma") or (key.endswith("weight") and len(shape) == 1):
        return 1 + 0.1 * torch.randn(shape, generator=generator)
    if len(shape) < 2:
        return 0.1 * torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator) * shape[1:].numel() ** -0.5


def encode(cases_file: Path, out: Path) -> None:
    vaes: dict[str, object] = {}
    results: dict[str, torch.Tensor] = {}
    for number, (image_path, vae_name, method, megapixels, *steps) in enumerate(json.loads(cases_file.read_text())):
        if vae_name not in vaes:
            vaes[vae_name] = nodes.VAELoader().load_vae(vae_name)[0]
        folder_paths.set_input_directory(str(Path(image_path).parent))  # releases since 0.28.0 read nothing else
        image = nodes.LoadImage().load_image(Path(image_path).name)[0]
        scaled = scale(image, method, megapixels, *steps)
        results[f"{number}.scaled"] = scaled.contiguous()
        results[f"{number}.latent"] = nodes.VAEEncode().encode(vaes[vae_name], scaled)[0]["samples"].contiguous()
    save_file(results, out)


def scale(image: torch.Tensor, method: str, megapixels: float, steps: int = 1) -> torch.Tensor:
    more = (steps,) if has_resolution_steps() else ()  # releases of 2026
    return scaling_node()(image, method, megapixels, *more)[0]


def scaling_node() -> Callable[..., Any]:
    node = nodes_post_processing.ImageScaleToTotalPixels
    return node.execute if hasattr(node, "execute") else node().upscale


def has_resolution_steps() -> bool:
    return "resolution_steps" in inspect.signature(scaling_node()).parameters


def decode(out: Path, latents: list[str]) -> None:
    vae = nodes.VAELoader().load_vae(TINY_VAE)[0]
    samples = [torch.load(latent, weights_only=True).unsqueeze(2) for latent in latents]
    images = [nodes.VAEDecode().decode(vae, {"samples": sample})[0].contiguous() for sample in samples]
    save_file({str(number): image for number, image in enumerate(images)}, out)


def main() -> None:
    command, model_dir, arguments = sys.argv[2], Path(sys.argv[3]), sys.argv[4:]
    for kind in ("vae", "vae_approx"):
        (model_dir / kind).mkdir(parents=True, exist_ok=True)
        folder_paths.add_model_folder_path(kind, str(model_dir / kind), is_default=True)
    folder_paths.add_model_folder_path("vae", str(OF_TINY_VAE))
    with torch.inference_mode():
        if command == "describe":
            describe()
        elif command == "make-vaes":
            make_vaes(model_dir, arguments)
        elif command == "encode":
            encode(Path(arguments[0]), Path(arguments[1]))
        elif command == "load":
            load(Path(arguments[0]), arguments[1:])
        else:
            decode(Path(arguments[0]), arguments[1:])


if __name__ == "__main__":
    main()
