"""The baseline of the Kafka benchmarks: the four nodes in a plain loop, and the same writes, in a process of its own.

It has the service's encoder, because these benchmarks do not compare the encode, and nothing of its pipeline: no checks of the
image, no checksums, no Kafka, one step after the other. `BareLoop` in `kafka_bench.py` starts it. A round is a line of JSON on
standard input, its result a line on standard output.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

from config import Settings
from latent_encoder.access import ANYWHERE
from latent_encoder.comfy_runtime import ComfyRuntime, load_runtime
from latent_encoder.outputs.files import StagedFiles
from latent_encoder.outputs.folder import open_output_folder
from latent_encoder.outputs.latent_files import latent_bytes
from latent_encoder.outputs.names import OutputFiles, output_files
from latent_encoder.outputs.png import png_bytes
from latent_encoder.vae.cache import VaeCache
from latent_encoder.vae.loaded_vae import LoadedVae


@dataclass(frozen=True)
class Round:
    """One image, encoded `count` times, with the files in a `folder` that the round makes and removes."""

    image: str
    megapixels: float
    count: int
    folder: str


def main() -> None:
    """Run rounds until standard input ends; the arguments are the device and the VAE's name."""
    device, vae_name = sys.argv[1:]
    settings = Settings(_env_file=None, device=device)
    runtime = load_runtime(settings.comfyui_path, settings.device, settings.vae_precision)
    with torch.inference_mode():
        vae = VaeCache(runtime, settings).get(vae_name)
        for line in sys.stdin:
            click.echo(json.dumps(run(runtime, vae, Round(**json.loads(line)))))


def load_image(runtime: ComfyRuntime, image: Path) -> torch.Tensor:
    return runtime.load_image(image.read_bytes(), ".png" if image.suffix == ".png" else ".jpg")


def run(runtime: ComfyRuntime, vae: LoadedVae, wanted: Round) -> dict[str, Any]:
    """Run a round; return requests per second, median seconds of encode and rest, CPU seconds, and the latent's SHA-256."""
    folder = Path(wanted.folder)
    folder.mkdir()
    encodes, rests, ends = [], [], []
    cpu = time.process_time()
    for n in range(wanted.count):
        start = time.perf_counter()
        scaled = runtime.scale(load_image(runtime, Path(wanted.image)), "lanczos", wanted.megapixels)
        encode_start = time.perf_counter()
        latent = vae.encode(runtime, scaled, "fail").samples
        encode_end = time.perf_counter()
        data = write(scaled, latent, output_files(wanted.folder, wanted.image, str(n)))
        ends.append(time.perf_counter())
        encodes.append(encode_end - encode_start)
        rests.append(ends[-1] - start - encodes[-1])
    shutil.rmtree(folder)
    return {
        "per_second": (wanted.count - 1) / (ends[-1] - ends[0]),
        "encode_s": median(encodes),
        "rest_s": median(rests),
        "cpu_s": (time.process_time() - cpu) / wanted.count,
        "latent_sha256": hashlib.sha256(data).hexdigest(),
        "threads": torch.get_num_threads(),
    }


def write(scaled: torch.Tensor, latent: torch.Tensor, files: OutputFiles) -> bytes:
    """Write three files as the service does, and return the bytes of the latent file."""
    frame = latent.squeeze(2).to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
    data, png = latent_bytes(frame, "pt", frames=False, header={}), png_bytes(scaled)
    metadata = {"latent_shape": list(frame.shape), "scaled_image_shape": list(scaled.shape[1:])}
    with open_output_folder(files.folder, ANYWHERE) as folder, StagedFiles(folder) as staged:
        staged.add(files.latent.name, data)
        staged.add(files.scaled_image.name, png)
        staged.add(files.metadata.name, json.dumps(metadata, indent=2).encode())
        staged.publish()
    return data


if __name__ == "__main__":
    main()
