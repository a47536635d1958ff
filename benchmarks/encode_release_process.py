"""One ComfyUI release as a process that encodes on request: by its own node, or by our encoder.

    python encode_release_process.py ours|ComfyUI COMFYUI_DIR MODEL_DIR VAE

It reads and writes lines of JSON:

- The first line out is written when the VAE is loaded, and names the encoder that runs: `"stock"` or `"single-frame"`.
- Each line in names two files, `["pixels.pt", "latent.pt"]`: pixels `[1, height, width, 3]`, and where to write the latent.
- The line out is the seconds of the encode alone.

ComfyUI's own side runs without any code of the service.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Encode = Callable[[Any], Any]


def load_ours(comfyui_path: Path, model_dir: Path, vae: str) -> tuple[str, Encode]:
    """Load the VAE as the service does on that tree; return the encoder that runs, and its call."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from benchmarks.encode_sides import OURS, Workbench
    from latent_encoder.telemetry.logs import configure_logging

    configure_logging("WARNING", "text")
    side = Workbench(comfyui_path, model_dir).side(OURS, vae)
    return side.encoder, side.encode


def load_comfyui(comfyui_path: Path, model_dir: Path, vae: str) -> tuple[str, Encode]:
    """Load the VAE with the tree's own nodes; return `stock`, and the call of VAEEncode."""
    sys.path.insert(0, str(comfyui_path))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import folder_paths
    import nodes

    folder_paths.add_model_folder_path("vae", str(model_dir / "vae"), is_default=True)
    loaded = nodes.VAELoader().load_vae(vae)[0]
    node = nodes.VAEEncode()
    return "stock", lambda pixels: node.encode(loaded, pixels)[0]["samples"]


def main() -> None:
    side, comfyui_path, model_dir, vae = sys.argv[1:]
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # ComfyUI prints to standard output, which has only results
    import torch

    with torch.inference_mode():
        encoder, encode = (load_ours if side == "ours" else load_comfyui)(Path(comfyui_path), Path(model_dir), vae)
        print(json.dumps(encoder), file=results, flush=True)
        for line in sys.stdin:
            pixels_file, latent_file = json.loads(line)
            pixels = torch.load(pixels_file, weights_only=True)
            start = time.perf_counter()
            latent = encode(pixels)
            seconds = time.perf_counter() - start
            torch.save(latent.contiguous(), latent_file)
            print(json.dumps(seconds), file=results, flush=True)


if __name__ == "__main__":
    main()
