"""Plain ComfyUI, without a line of ours: what our numbers are compared with. Run as a process of its own.

    python tests/stock_comfyui.py COMFYUI_DIR make-vaes MODEL_DIR FAMILY…
    python tests/stock_comfyui.py COMFYUI_DIR encode MODEL_DIR CASES.json OUT.safetensors
    python tests/stock_comfyui.py COMFYUI_DIR decode MODEL_DIR OUT.safetensors LATENT.pt…

`make-vaes` writes VAEs of the real architectures with random weights of a fixed seed. `encode` runs the four nodes by hand
for each case `[image_path, vae_name, upscale_method, megapixels]`, and saves scaled images and latents by the case's number. A
fifth item is `resolution_steps`.
`decode` saves the pictures that the tiny VAE makes of latents of one frame, by their number.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

COMFYUI = Path(sys.argv[1])
sys.path.insert(0, str(COMFYUI))

import comfy.cli_args

comfy.cli_args.args.cpu = True

import comfy.ldm.models.autoencoder
import comfy.ldm.wan.vae
import comfy.taesd.taesd
import folder_paths
import nodes
import torch
from comfy_extras import nodes_post_processing
from safetensors.torch import save_file

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


def make_vaes(model_dir: Path, families: list[str]) -> None:
    makers = {"kl": make_kl, "hollow-kl": make_hollow_kl, "taesd": make_taesd, "wan": make_wan}
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
    weights = random_weights(comfy.taesd.taesd.TAESD(latent_channels=4).state_dict())
    for part in ("encoder", "decoder"):
        prefix = f"taesd_{part}."
        weights_of_part = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        save_file(weights_of_part, model_dir / "vae_approx" / f"taesd_{part}.safetensors")


def make_wan(model_dir: Path) -> None:
    shape = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True]}
    model = comfy.ldm.wan.vae.WanVAE(dim=96, z_dim=16, dropout=0.0, **shape)
    save_file(random_weights(model.state_dict()), model_dir / "vae" / "random_wan.safetensors")


def random_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under which activations neither vanish nor explode, so that a difference anywhere shows in the latent."""
    generator = torch.Generator().manual_seed(0)
    return {key: random_tensor(key, tensor.shape, generator).to(torch.bfloat16) for key, tensor in state.items()}


def random_tensor(key: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
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
    node = nodes_post_processing.ImageScaleToTotalPixels
    scale = node.execute if hasattr(node, "execute") else node().upscale
    more = (steps,) if "resolution_steps" in inspect.signature(scale).parameters else ()  # releases of 2026
    return scale(image, method, megapixels, *more)[0]


def decode(out: Path, latents: list[str]) -> None:
    vae = nodes.VAELoader().load_vae("tiny_qwen_vae.safetensors")[0]
    samples = [torch.load(latent, weights_only=True).unsqueeze(2) for latent in latents]
    pictures = [nodes.VAEDecode().decode(vae, {"samples": sample})[0].contiguous() for sample in samples]
    save_file({str(number): picture for number, picture in enumerate(pictures)}, out)


def main() -> None:
    command, model_dir, arguments = sys.argv[2], Path(sys.argv[3]), sys.argv[4:]
    for kind in ("vae", "vae_approx"):
        (model_dir / kind).mkdir(parents=True, exist_ok=True)
        folder_paths.add_model_folder_path(kind, str(model_dir / kind), is_default=True)
    folder_paths.add_model_folder_path("vae", str(Path(__file__).resolve().parent.parent / "tiny_vae"))
    with torch.inference_mode():
        if command == "make-vaes":
            make_vaes(model_dir, arguments)
        elif command == "encode":
            encode(Path(arguments[0]), Path(arguments[1]))
        else:
            decode(Path(arguments[0]), arguments[1:])


if __name__ == "__main__":
    main()
