"""One side of the GPU check as a process: plain ComfyUI of one tree, diffusers, or ours. It encodes on request.

    python gpu_check_process.py ComfyUI|ours|diffusers COMFYUI_DIR MODEL_DIR VAE cpu|cuda

It reads and writes lines of JSON. The first line out names the device. Each line in is a command with its options, each line
out its result, or `{"error": "…"}`:

- `{"command": "encode", "precision": "fp16", "pixels": FILE, "latent": FILE, "rounds": N}` encodes pixels `[1, height, width,
  3]` once, and then `rounds` times on the clock. The peak of memory is that of the encodes on the clock.
- `{"command": "choices", "pixels": FILE, "rounds": N}` is for ours alone: see `gpu_choices.py`.
- `{"command": "stages", "kind": …, "file": FILE, "requests": N, "folder": FOLDER}` is for ours alone: see `stage_runs.py`.
  Further options are settings.

ComfyUI's side runs without any code of the service.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

PRECISIONS = ("fp32", "fp16", "bf16")
PROJECT = Path(__file__).resolve().parent.parent


class PlainComfyUI:
    """A tree's own nodes VAELoader and VAEEncode."""

    def __init__(self, comfyui_path: Path, model_dir: Path, vae: str, device: str) -> None:
        sys.path.insert(0, str(comfyui_path))
        import comfy.cli_args

        comfy.cli_args.args.cpu = device == "cpu"
        import folder_paths
        import nodes

        folder_paths.add_model_folder_path("vae", str(model_dir / "vae"), is_default=True)
        self._nodes, self._name = nodes, vae
        self._vae: Any = None
        self._tiled = False

    def load(self, precision: str) -> None:
        self._vae = None
        unload_comfyui()
        set_precision(precision)
        self._vae = self._nodes.VAELoader().load_vae(self._name)[0]
        for name in ("encode_tiled_", "encode_tiled_3d", "_encode_tiled_owned"):
            if tiles := getattr(self._vae, name, None):
                setattr(self._vae, name, self._noted(tiles))

    def _noted(self, tiles: Any) -> Any:
        def encode_tiled(*arguments: Any, **options: Any) -> Any:
            self._tiled = True
            return tiles(*arguments, **options)

        return encode_tiled

    def ready(self, pixels: Any) -> Any:
        """Return pixels as they are before the clock starts."""
        self._tiled = False
        return pixels

    def encode(self, pixels: Any) -> Any:
        return self._nodes.VAEEncode().encode(self._vae, pixels)[0]["samples"]

    @property
    def encoder(self) -> str:
        """The encoder that ran. ComfyUI uses tiles without an error if memory runs out."""
        return "in tiles, memory ran out" if self._tiled else "stock"


class Ours:
    """The service's encode on a tree."""

    def __init__(self, comfyui_path: Path, model_dir: Path, vae: str, device: str) -> None:
        sys.path.insert(0, str(PROJECT))
        from benchmarks.stage_runs import Observed
        from config import Settings
        from latent_encoder.telemetry.logs import configure_logging

        configure_logging("INFO", "text")
        self._options: dict[str, Any] = {
            "comfyui_path": comfyui_path,
            "model_dir": model_dir,
            "device": device,
            "vae_model_name": vae,
        }
        self._settings = Settings(_env_file=None, **self._options)
        self._made = Observed
        self._runtime = Observed.set_up(self._settings).runtime
        self._vae: Any = None

    def load(self, precision: str) -> None:
        self._vae = None
        unload_comfyui()
        set_precision(precision)
        self._vae = self._made(self._settings, self._runtime).vaes.get(self._settings.vae_model_name)

    def ready(self, pixels: Any) -> Any:
        """Return pixels in pinned memory, where the worker's preparation puts them."""
        from latent_encoder.vae.gpu import pinned

        return pinned(pixels, self._vae.vae.device)

    def encode(self, pixels: Any) -> Any:
        return self._vae.encode(self._runtime, pixels, "fail").samples

    @property
    def encoder(self) -> str:
        return str(self._vae.encoder)

    def choices(self, pixels: str, rounds: int) -> list[dict[str, Any]]:
        """Measure the choices of a GPU's path."""
        import torch

        from benchmarks.gpu_choices import measure_choices

        self.load("fp16" if torch.cuda.is_available() else "fp32")
        return measure_choices(self._vae.single_frame, torch.load(pixels, weights_only=True), rounds, self._vae)

    def stages(self, kind: str, file: str, requests: int, folder: str, **settings: Any) -> dict[str, Any]:
        """Run the worker's stages over a file."""
        from benchmarks.stage_runs import STAGES, run_stages
        from config import Settings

        self._vae = None
        unload_comfyui()
        set_precision("auto")
        encoder = self._made(Settings(_env_file=None, **settings, **self._options), self._runtime)
        run = run_stages(encoder, kind, Path(file), requests, Path(folder))
        shares = {stage: run.busy(stage) for stage in STAGES}
        return {**asdict(run), "per_second": run.per_second, "busy": shares, "limit": run.limit}


class Diffusers:
    """diffusers' model with the same weights."""

    def __init__(self, _: Path, model_dir: Path, vae: str, device: str) -> None:
        sys.path.insert(0, str(PROJECT))
        from benchmarks.encode_diffusers import load_diffusers

        self._load, self._file, self._device = load_diffusers, model_dir / "vae" / vae, device
        self._model: Any = None

    encoder = "diffusers"

    def load(self, precision: str) -> None:
        import torch

        self._dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        self._model = None
        self._model = self._load(self._file).to(self._device, self._dtype)

    def ready(self, pixels: Any) -> Any:
        return pixels

    def encode(self, pixels: Any) -> Any:
        frame = (pixels * 2 - 1).movedim(-1, 1).unsqueeze(2).to(self._dtype).to(self._device)
        return self._model.encode(frame).latent_dist.mean.float().cpu()


def set_precision(precision: str) -> None:
    """Set the option from which ComfyUI takes the precision of the VAE that it loads next; `auto` is its own choice."""
    import comfy.cli_args

    for name in PRECISIONS:
        setattr(comfy.cli_args.args, f"{name}_vae", name == precision)


def unload_comfyui() -> None:
    """Free the GPU's memory that other precisions of the VAE take."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


class Server:
    """The commands of a side."""

    def __init__(self, side: Any, device: str) -> None:
        self._side, self._on_gpu = side, device == "cuda"
        self._loaded: str | None = None

    def run(self, command: str, **options: Any) -> Any:
        if command == "encode":
            return self.encode(**options)
        self._loaded = None
        return getattr(self._side, command)(**options)

    def encode(self, precision: str, pixels: str, latent: str, rounds: int) -> dict[str, Any]:
        import torch

        if self._loaded != precision:
            self._loaded = None
            self._side.load(precision)
            self._loaded = precision
        ready = self._side.ready(torch.load(pixels, weights_only=True))
        torch.save(self._side.encode(ready).float().contiguous(), latent)
        self._restart_peak()
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            self._side.encode(ready)
            seconds.append(time.perf_counter() - start)
        result = {"seconds": seconds, "encoder": self._side.encoder, **self._peaks()}
        self._restart_peak()  # other sides use the same GPU, and torch would keep the memory
        return result

    def _restart_peak(self) -> None:
        import torch

        gc.collect()
        if self._on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _peaks(self) -> dict[str, int | None]:
        import torch

        if not self._on_gpu:
            return {"allocated": None, "reserved": None}
        return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def main() -> None:
    name, comfyui_path, model_dir, vae, device = sys.argv[1:]
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # ComfyUI prints to standard output, which has only results
    import torch

    side_class = {"ComfyUI": PlainComfyUI, "ours": Ours, "diffusers": Diffusers}[name]
    with torch.inference_mode():
        server = Server(side_class(Path(comfyui_path), Path(model_dir), vae, device), device)
        gpu = torch.cuda.get_device_name() if device == "cuda" else None
        print(json.dumps({"gpu": gpu, "torch": torch.__version__}), file=results, flush=True)
        for line in sys.stdin:
            try:
                result = server.run(**json.loads(line))
            except Exception as exc:
                result = {"error": f"{type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}"[:300]}
            print(json.dumps(result), file=results, flush=True)


if __name__ == "__main__":
    main()
