"""The sides of the benchmark, in one process: ComfyUI's own encode, ours, ours compiled, and diffusers'.

All sides encode the same pixels with the same weights. ComfyUI's own and ours use the node VAEEncode of one runtime, each with
its own loaded VAE.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.encode_diffusers import Unavailable, load_diffusers
from benchmarks.encode_report import megapixels_text, progress
from config import Settings
from errors import one_line
from latent_encoder.vae.single_frame import SingleFrameEncoder, UnknownArchitecture
from service import LatentEncoder
from tests.helpers import IMAGES

COMFYUI, OURS, COMPILED, DIFFUSERS, HALF = "ComfyUI", "ours", "ours, compiled", "diffusers", "ours, bfloat16"
SIDES = (COMFYUI, OURS, COMPILED, DIFFUSERS)
"""The sides in float32."""
SETTINGS: dict[str, dict[str, Any]] = {COMFYUI: {"encoder": "stock"}, OURS: {}, COMPILED: {"compile": True}}

PHOTO = IMAGES / "astronaut.png"
FULL_SIZE_VAE = "random_wan.safetensors"
CELL = 16  # pixels; heights and widths are cropped to multiples of it, so that no VAE crops further


@dataclass(frozen=True)
class Side:
    """A loaded VAE, and the call that encodes an image with it."""

    name: str
    encoder: str
    """`single-frame`, `stock` or `diffusers`."""
    load_s: float
    model: nn.Module
    encode: Callable[[Tensor], Tensor]
    """The call, from pixels `[1, height, width, 3]` in [0, 1] to the latent `[1, channels, (1,) height / 8, width / 8]`."""


@dataclass(frozen=True)
class FirstEncode:
    """The latent and the seconds of a side's first encode of a size."""

    latent: Tensor
    seconds: float


class Workbench:
    """The sides, each made at its first use."""

    def __init__(self, comfyui_path: Path, model_dir: Path) -> None:
        """Load ComfyUI for the CPU."""
        self._options: dict[str, Any] = {"comfyui_path": comfyui_path, "model_dir": model_dir, "device": "cpu"}
        self.model_dir = model_dir
        self.runtime = LatentEncoder.set_up(self.settings()).runtime
        self._sides: dict[tuple[str, str], Side | Unavailable] = {}
        self._first: dict[tuple[str, str, float], FirstEncode] = {}

    def settings(self, **options: Any) -> Settings:
        return Settings(_env_file=None, **self._options, **options)

    def pixels(self, megapixels: float) -> Tensor:
        """Return the photo at about that size, `[1, height, width, 3]` in [0, 1]."""
        scaled = self.runtime.scale(self.runtime.load_image(PHOTO.read_bytes(), ".png"), "lanczos", megapixels)
        height, width = (side // CELL * CELL for side in scaled.shape[1:3])
        return scaled[:, :height, :width].contiguous()

    def side(self, name: str, vae: str = FULL_SIZE_VAE) -> Side:
        """Return one of `SIDES`, or `HALF`, with one of the VAEs.

        Raises:
            Unavailable: it cannot run here.
        """
        key = (name, vae)
        if key not in self._sides:
            progress(f"loading {vae} for {name}")
            try:
                load = {DIFFUSERS: self._load_diffusers, HALF: self._load_half}.get(name)
                self._sides[key] = load(vae) if load is not None else self._load(name, vae)
            except Unavailable as exc:
                self._sides[key] = exc
        side = self._sides[key]
        if isinstance(side, Unavailable):
            raise side
        return side

    def first(self, name: str, megapixels: float, vae: str = FULL_SIZE_VAE) -> FirstEncode:
        """Return the first encode of that size, which is remembered.

        Raises:
            Unavailable: the side cannot run here, or is not ComfyUI's own and fails.
        """
        key = (name, vae, megapixels)
        if key not in self._first:
            side, pixels = self.side(name, vae), self.pixels(megapixels)
            progress(f"first encode of {megapixels_text(megapixels)} by {name}")
            start = time.perf_counter()
            try:
                latent = side.encode(pixels)
            except Exception as exc:
                if name == COMFYUI:
                    raise
                self._sides[name, vae] = failure = Unavailable(f"it fails: {one_line(exc)}")
                raise failure from exc
            self._first[key] = FirstEncode(latent, time.perf_counter() - start)
        return self._first[key]

    def forget(self) -> None:
        """Free the memory of all sides."""
        self._sides.clear()
        self._first.clear()

    def _load(self, name: str, vae: str) -> Side:
        settings = self.settings(**SETTINGS[name])
        encoder = LatentEncoder(settings, self.runtime)
        start = time.perf_counter()
        loaded = encoder.vaes.get(vae)
        load_s = time.perf_counter() - start

        def comfyui(pixels: Tensor) -> Tensor:
            return self.runtime.encode(loaded.vae, pixels)

        def ours(pixels: Tensor) -> Tensor:
            return loaded.encode(self.runtime, pixels, settings.oom_policy).samples

        encode = comfyui if name == COMFYUI else ours
        return Side(name, loaded.encoder, load_s, loaded.vae.first_stage_model, encode)

    def _load_half(self, vae: str) -> Side:
        """Make our encoder in bfloat16 from ComfyUI's model: a process has one precision for VAELoader."""
        stock = self.side(COMFYUI, vae).model
        start = time.perf_counter()
        try:
            model = SingleFrameEncoder(copy.deepcopy(stock).to(torch.bfloat16))
        except UnknownArchitecture as exc:
            raise Unavailable(str(exc)) from exc
        load_s = time.perf_counter() - start

        def encode(pixels: Tensor) -> Tensor:
            latent: Tensor = model(as_frame(pixels, torch.bfloat16))
            return latent.float()

        return Side(HALF, "single-frame", load_s, model, encode)

    def _load_diffusers(self, vae: str) -> Side:
        start = time.perf_counter()
        model = load_diffusers(self.model_dir / "vae" / vae)
        load_s = time.perf_counter() - start

        def encode(pixels: Tensor) -> Tensor:
            latent: Tensor = model.encode(as_frame(pixels)).latent_dist.mean
            return latent

        return Side(DIFFUSERS, "diffusers", load_s, model, encode)


def as_frame(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return pixels in the form that the models themselves take: `[1, 3, 1, height, width]` in [-1, 1]."""
    return (pixels * 2 - 1).movedim(-1, 1).unsqueeze(2).to(dtype)
