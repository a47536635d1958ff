"""ComfyUI as this service sees it: one object, made once per process. Nothing else here knows ComfyUI's module names.

ComfyUI configures itself while it is imported and keeps that configuration in module globals. So `load_runtime` sets the
device and the precision first, imports second, and a process has one ComfyUI: a second one is refused.
"""

from __future__ import annotations

import importlib
import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from errors import SetupError, one_line
from latent_encoder.images.features import ENDINGS, Feature, ImageNote, decoder_of
from latent_encoder.images.input_folder import Ending, InputFolders
from latent_encoder.installer.comfy_packages import unsatisfied_packages
from latent_encoder.lazy_imports import lazy_imports
from latent_encoder.releases import TESTED
from utils import (
    add_comfyui_directory_to_sys_path,
    add_extra_model_paths,
    find_path,
    get_value_at_index,
    import_custom_nodes_minimal,
)

NODE_IDS = ("VAELoader", "LoadImage", "ImageScaleToTotalPixels", "VAEEncode")

# Modules that ComfyUI imports at its start and the four nodes never use: sampling, text encoders, diffusion models, audio
# VAEs, image filters. Only they need transformers, scipy, torchsde and torchaudio. torchvision and comfy_kitchen import
# torch's compiler (`torch._dynamo`), which takes a second. A release may lack some of them.
NOT_USED = (
    "comfy.controlnet",
    "comfy.ldm.ace.*",
    "comfy.ldm.lightricks.vae.audio_vae",
    "comfy.model_base",
    "comfy.samplers",
    "comfy.sd1_clip",
    "comfy.sdxl_clip",
    "comfy.supported_models",
    "comfy.text_encoders.*",
    "kornia",
    "torch._dynamo",
    "torchaudio",
    "torchvision",
)


class Vae(Protocol):
    """What we use of ComfyUI's VAE object."""

    first_stage_model: torch.nn.Module
    vae_dtype: torch.dtype
    device: torch.device
    latent_dim: int
    latent_channels: int

    def spacial_compression_encode(self) -> int: ...


class LatentFormat(Protocol):
    """What we use of ComfyUI's knowledge of a family's latents."""

    latent_channels: int
    latent_dimensions: int
    """2 where latents are `[batch, channels, height, width]`, 3 where frames come before the height."""
    latent_rgb_factors: Sequence[Sequence[float]] | None
    """Red, green and blue of each channel, in [-1, 1]."""
    latent_rgb_factors_bias: Sequence[float] | None
    latent_rgb_factors_reshape: Callable[[torch.Tensor], torch.Tensor] | None

    def process_in(self, latent: torch.Tensor) -> torch.Tensor:
        """The VAE's latent, as the diffusion model wants it."""


class Node:
    """A ComfyUI node that can be called, V1 (a class with `FUNCTION`) or V3 (`io.ComfyNode`) alike."""

    def __init__(self, node_id: str, node_class: Any, supplied: Sequence[str]) -> None:
        """Prepare to call the node with the inputs `supplied`.

        Raises:
            SetupError: this release's node requires another input and declares no default for it.
        """
        self._call = getattr(node_class(), node_class.FUNCTION)
        self._defaults = _declared_defaults(node_id, node_class, supplied)
        self.inputs = frozenset().union(*(node_class.INPUT_TYPES().get(kind, ()) for kind in ("required", "optional")))

    def __call__(self, **inputs: Any) -> Any:
        """The node's first output."""
        return get_value_at_index(self._call(**{**self._defaults, **inputs}), 0)


def _declared_defaults(node_id: str, node_class: Any, supplied: Sequence[str]) -> dict[str, Any]:
    """The node's own defaults for the required inputs that we do not supply, since newer releases may add some."""
    required: dict[str, Any] = node_class.INPUT_TYPES().get("required", {})
    options = {name: spec[1] if len(spec) > 1 else {} for name, spec in required.items() if name not in supplied}
    without = [name for name, option in options.items() if "default" not in option]
    if without:
        raise SetupError(f"This ComfyUI's node {node_id} requires {', '.join(without)}, which has no default ({TESTED}).")
    return {name: option["default"] for name, option in options.items()}


class ComfyRuntime:
    """A ComfyUI tree that is imported and ready, and its four nodes as methods.

    Images are float32 tensors `[1, height, width, 3]` in [0, 1] on the CPU, as ComfyUI has them (bicubic overshoots).
    What a node raises is not translated here.
    """

    def __init__(self, path: Path, custom_nodes: Sequence[str]) -> None:
        self.path = path
        self._folder_paths = importlib.import_module("folder_paths")
        self.nodes = import_custom_nodes_minimal(path, NODE_IDS, custom_nodes)
        self.version = _version()
        self.device = str(importlib.import_module("comfy.model_management").vae_device())
        self._vae_loader = self._node("VAELoader", "vae_name")
        self._load_image = self._node("LoadImage", "image")
        self._scale = self._node("ImageScaleToTotalPixels", "image", "upscale_method", "megapixels")
        self._vae_encode = self._node("VAEEncode", "pixels", "vae")
        self._notes: dict[Feature, ImageNote | None] = {}

    def _node(self, node_id: str, *supplied: str) -> Node:
        return Node(node_id, self.nodes[node_id], supplied)

    def contained(self) -> AbstractContextManager[None]:
        """Keep what ComfyUI logs and prints inside from users, except errors: it is not about a request."""
        return _contained(self.path)

    def load_vae(self, name: str) -> Vae:
        """A VAE by its name in the model folders (VAELoader), on the device and in the precision in force."""
        vae: Vae = self._vae_loader(vae_name=name)
        return vae

    def load_image(self, data: bytes, ending: Ending) -> torch.Tensor:
        """The image in a file with these bytes (LoadImage); `ending` is that of its format. Hold `PILLOW_LOCK` meanwhile.

        Raises:
            EncodingFailed: there is no room for the file that LoadImage reads.
            SetupError: there is no folder for it.
        """
        with self._input_folders.file(data, ending) as path, self._input_folder(path.parent):
            image: torch.Tensor = self._load_image(image=str(path))
        return image

    @contextmanager
    def _input_folder(self, folder: Path) -> Iterator[None]:
        """Let this be ComfyUI's input folder inside; custom nodes find their own again afterwards."""
        before: str = self._folder_paths.get_input_directory()
        self._folder_paths.set_input_directory(str(folder))
        try:
            yield
        finally:
            self._folder_paths.set_input_directory(before)

    @cached_property
    def _input_folders(self) -> InputFolders:
        return InputFolders()

    @cached_property
    def decoder(self) -> str:
        """What decodes JPEGs in LoadImage, with its version: Pillow, or PyAV with ffmpeg. Hold `PILLOW_LOCK` meanwhile."""
        return decoder_of(self.load_image)

    def note(self, feature: Feature) -> ImageNote | None:
        """The code in `image_notes` for what LoadImage does with that feature of a file. Hold `PILLOW_LOCK` meanwhile."""
        if feature not in self._notes:
            self._notes[feature] = feature.note(self.load_image(feature.sample(), ENDINGS[feature.format]))
        return self._notes[feature]

    @property
    def can_fit_exactly(self) -> bool:
        """Whether ImageScaleToTotalPixels can scale to multiples of a number of pixels."""
        return "resolution_steps" in self._scale.inputs

    def scale(self, image: torch.Tensor, upscale_method: str, megapixels: float, steps: int | None = None) -> torch.Tensor:
        """The image at about `megapixels` * 1024 * 1024 pixels (ImageScaleToTotalPixels), its aspect kept.

        With `steps`, both sides are multiples of it, which takes a node that `can_fit_exactly`.
        """
        more = {} if steps is None else {"resolution_steps": steps}
        scaled: torch.Tensor = self._scale(image=image, upscale_method=upscale_method, megapixels=megapixels, **more)
        return scaled

    def encode(self, vae: Vae, pixels: torch.Tensor) -> torch.Tensor:
        """The latent of the image (VAEEncode): float32 on the CPU, in the VAE's own number of dimensions."""
        samples: torch.Tensor = self._vae_encode(pixels=pixels, vae=vae)["samples"]
        return samples

    def decode(self, vae: Vae, samples: torch.Tensor) -> torch.Tensor:
        """The image of a latent in the VAE's own number of dimensions (VAEDecode).

        Raises:
            SetupError: this ComfyUI has no such node.
        """
        image: torch.Tensor = self._vae_decode(samples={"samples": samples}, vae=vae)
        return image

    @cached_property
    def _vae_decode(self) -> Node:
        """Looked for when it is first asked for, since a service that only encodes does well without."""
        node_class = import_custom_nodes_minimal(self.path, ("VAEDecode",))["VAEDecode"]
        return Node("VAEDecode", node_class, ("samples", "vae"))

    def latent_format(self, name: str) -> LatentFormat | None:
        """What ComfyUI knows of the latents of that class in `comfy.latent_formats`; None where this release has none."""
        formats = importlib.import_module("comfy.latent_formats")
        known = getattr(formats, name, None)
        return known() if isinstance(known, type) and issubclass(known, formats.LatentFormat) else None

    def vae_folders(self, kind: str = "vae") -> list[Path]:
        """The folders searched for VAE files, in order; `kind` is ComfyUI's, `vae` or `vae_approx`."""
        return [Path(folder) for folder in self._folder_paths.get_folder_paths(kind)]

    def vae_names(self, kind: str = "vae") -> list[str]:
        """The files in those folders and below, sorted, each by the name that a request gives."""
        names: list[str] = self._folder_paths.get_filename_list(kind)
        return names

    def vae_choices(self) -> list[str]:
        """Every name that VAELoader offers: VAE files, the TAESD pairs that are there, and `pixel_space` where it has it."""
        loader: Any = self.nodes["VAELoader"]
        return list(loader.INPUT_TYPES()["required"]["vae_name"][0])

    def vae_file(self, name: str, kind: str = "vae") -> Path | None:
        """The file that a name means, or None where there is none."""
        found: str | None = self._folder_paths.get_full_path(kind, name)
        return Path(found) if found is not None else None

    def vae_files(self, name: str) -> list[Path] | None:
        """Every file that VAELoader reads for a name (none for `pixel_space`), or None where one is missing."""
        loader: Any = self.nodes["VAELoader"]
        if name == "pixel_space" and name in self.vae_choices():
            return []
        if name in getattr(loader, "image_taes", ("taesd", "taesdxl", "taesd3", "taef1")):
            return self._taesd_pair(name)
        kind = "vae_approx" if Path(name).stem in getattr(loader, "video_taes", ()) else "vae"
        file = self.vae_file(name, kind)
        return [file] if file is not None else None

    def _taesd_pair(self, name: str) -> list[Path] | None:
        files = []
        for part in (f"{name}_encoder.", f"{name}_decoder."):
            found = next((entry for entry in self.vae_names("vae_approx") if entry.startswith(part)), None)
            file = self.vae_file(found, "vae_approx") if found is not None else None
            if file is None:
                return None
            files.append(file)
        return files

    def search_vae_folder(self, folder: Path, kind: str = "vae", *, first: bool = False) -> None:
        """Search `folder` for VAE files too, after the other folders of that kind or before them."""
        self._folder_paths.add_model_folder_path(kind, str(folder.absolute()), is_default=first)


def load_runtime(comfyui_path: Path, device: str, precision: str, custom_nodes: Sequence[str] = ()) -> ComfyRuntime:
    """Import ComfyUI from `comfyui_path`, once per process.

    `device` is `auto`, `cpu` or `cuda`; `precision`, of the VAE, is `auto`, `fp32`, `fp16` or `bf16`.

    Raises:
        SetupError: no tree there, another one is loaded already, it or one of the four nodes cannot be imported, or torch
            does not have the device.
    """
    path = find_path(comfyui_path)
    _refuse_second_tree(path)
    with _contained(path):
        try:
            import_nodes(path, device, precision)
            add_extra_model_paths(path)
            return ComfyRuntime(path, custom_nodes)
        except Exception as exc:
            if isinstance(exc.__cause__ if isinstance(exc, SetupError) else exc, (ImportError, AttributeError)):
                _refuse_unsatisfied_packages(path, exc)
            if isinstance(exc, SetupError):
                raise
            raise SetupError(f"ComfyUI in {path} cannot be loaded: {one_line(exc)} ({TESTED}).") from exc


def import_nodes(path: Path, device: str, precision: str) -> None:
    """Import the modules of the tree at `path` that have the four nodes; what the nodes do not use waits."""
    add_comfyui_directory_to_sys_path(path)
    with lazy_imports(*NOT_USED):
        _configure(importlib.import_module("comfy.cli_args").args, device, precision)
        import_custom_nodes_minimal(path, NODE_IDS)


def _refuse_unsatisfied_packages(path: Path, exc: Exception) -> None:
    """Raise a SetupError that names every package that the tree needs and this environment lacks, if there are any."""
    packages = unsatisfied_packages(path)
    if packages.wanted:
        raise SetupError(
            f"ComfyUI in {path} needs packages that are missing or too old: {', '.join(packages.wanted)}. "
            f"Install them with: {packages.command}, or run ./setup_comfyui.sh --from {shlex.quote(str(path))}."
        ) from exc


def _refuse_second_tree(path: Path) -> None:
    loaded = getattr(sys.modules.get("comfy"), "__path__", None)
    if loaded and Path(next(iter(loaded))).resolve() != (path / "comfy").resolve():
        raise SetupError(f"This process has loaded ComfyUI from {next(iter(loaded))} already; it cannot load {path} too.")


def _configure(args: Any, device: str, precision: str) -> None:
    """Set ComfyUI's own options, which its modules read while they are imported."""
    accelerator = torch.accelerator.is_available()
    if device == "cuda" and not torch.cuda.is_available():
        raise SetupError(
            f"DEVICE=cuda, but torch {torch.__version__} finds no CUDA device; check the driver, or use DEVICE=auto."
        )
    args.cpu = device == "cpu" or not accelerator
    for name in ("fp32", "fp16", "bf16"):
        setattr(args, f"{name}_vae", name == precision)


@contextmanager
def _contained(path: Path) -> Iterator[None]:
    """Undo what importing ComfyUI does to the process: log handlers, warning filters, output, its entry in `sys.path`.

    What it logs meanwhile is about parts that never run here (no torchaudio, …): only errors, except with level DEBUG.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    if level > logging.DEBUG:
        root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        # A bare `import utils` or `import lora` must not find ComfyUI's modules of those names.
        inner = (path / "comfy").resolve()
        sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != inner]


def _version() -> str:
    try:
        return str(importlib.import_module("comfyui_version").__version__)
    except (ImportError, AttributeError):
        return "unknown"
