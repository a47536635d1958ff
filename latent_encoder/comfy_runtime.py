"""ComfyUI as one object: a node is a method. Only this module, `comfy_import.py` and `utils.py` know ComfyUI's modules."""

from __future__ import annotations

import hashlib
import importlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from errors import SetupError, one_line
from latent_encoder.comfy_import import (
    NODE_IDS,
    contained,
    import_nodes,
    imported_version,
    refuse_second_tree,
)
from latent_encoder.comfy_input import input_setting
from latent_encoder.comfy_node import Node
from latent_encoder.images.features import ENDINGS, Feature, decoder_of
from latent_encoder.images.input_folder import Ending, InputFolders
from latent_encoder.installer.comfy_packages import unsatisfied_packages
from latent_encoder.releases import TESTED
from models import ImageNote
from utils import add_extra_model_paths, custom_node_path, find_path, get_value_at_index, import_custom_nodes_minimal


class Vae(Protocol):
    """The part of ComfyUI's VAE object that we use."""

    first_stage_model: torch.nn.Module
    vae_dtype: torch.dtype
    device: torch.device
    latent_dim: int
    latent_channels: int

    def spacial_compression_encode(self) -> int: ...


class LatentSpace(Protocol):
    """The part of ComfyUI's `comfy.latent_formats.LatentFormat` that we use: one family's latents."""

    latent_channels: int
    latent_dimensions: int
    """2 if latents are `[batch, channels, height, width]`, 3 if frames come before the height."""
    latent_rgb_factors: Sequence[Sequence[float]] | None
    """Red, green and blue of each channel, in [-1, 1]; None if this release has no colours for the family."""
    latent_rgb_factors_bias: Sequence[float] | None
    latent_rgb_factors_reshape: Callable[[torch.Tensor], torch.Tensor] | None

    def process_in(self, latent: torch.Tensor) -> torch.Tensor:
        """Return the VAE's latent in the scale of the diffusion model."""


class LatentSpaces(Protocol):
    """The latent spaces that a ComfyUI release knows."""

    def latent_space(self, name: str) -> LatentSpace | None:
        """Return a family's latent space by its class in `comfy.latent_formats`; None if this release lacks it."""


class ImportedLatentSpaces:
    """The latent spaces of the tree that this process has imported."""

    def latent_space(self, name: str) -> LatentSpace | None:
        """Return a family's latent space by its class in `comfy.latent_formats`; None if this release lacks it."""
        formats = importlib.import_module("comfy.latent_formats")
        known = getattr(formats, name, None)
        return known() if isinstance(known, type) and issubclass(known, formats.LatentFormat) else None


def imported_latent_spaces() -> LatentSpaces | None:
    """Return the latent spaces if this process has imported a tree. Other threads may use it meanwhile."""
    return ImportedLatentSpaces() if "comfy.latent_formats" in sys.modules else None


class ComfyRuntime(ImportedLatentSpaces):
    """An imported ComfyUI tree, with its four nodes as methods.

    Images are float32 tensors `[1, height, width, 3]` on the CPU, in [0, 1]; bicubic scaling overshoots that range.
    Errors that a node raises pass through unchanged.
    """

    def __init__(self, path: Path, custom_nodes: Sequence[str]) -> None:
        self.path = path
        self._folder_paths = importlib.import_module("folder_paths")
        self._input_setting = input_setting(self._folder_paths)
        self.nodes = import_custom_nodes_minimal(path, NODE_IDS, custom_nodes)
        self.custom_nodes = {name: checksum_of_package(custom_node_path(path, name)) for name in sorted(set(custom_nodes))}
        """Checksum of the code of each custom node package that is loaded: a package may change ComfyUI's own functions."""
        self.version = imported_version()
        self.device = str(importlib.import_module("comfy.model_management").vae_device())
        self._vae_loader = self._node("VAELoader", "vae_name")
        self._load_image = self._node("LoadImage", "image")
        self._scale = self._node("ImageScaleToTotalPixels", "image", "upscale_method", "megapixels")
        self._vae_encode = self._node("VAEEncode", "pixels", "vae")
        self._notes: dict[Feature, ImageNote | None] = {}

    def _node(self, node_id: str, *supplied: str) -> Node:
        return Node(node_id, self.nodes[node_id], supplied)

    def contained(self) -> AbstractContextManager[None]:
        """Keep ComfyUI's own output away from users, except errors: it is not about a request."""
        return contained(self.path)

    def load_vae(self, name: str) -> Vae:
        """Load a VAE by its name in the model folders (VAELoader), on the device and in the precision of `load_runtime`."""
        vae: Vae = self._vae_loader(vae_name=name)
        return vae

    def read_weights(self, file: Path) -> dict[str, torch.Tensor]:
        """Return the tensors of a file of weights by name, as VAELoader reads them."""
        weights: dict[str, torch.Tensor] = importlib.import_module("comfy.utils").load_torch_file(str(file))
        return weights

    def vae_of(self, weights: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> Vae:
        """Return the VAE with these weights, as VAELoader makes it. `names` has other names for some of them."""
        vae = importlib.import_module("comfy.sd").VAE(sd={names.get(name, name): tensor for name, tensor in weights.items()})
        vae.throw_exception_if_invalid()
        loaded: Vae = vae
        return loaded

    @contextmanager
    def files_read_by(self, read: Callable[[Path], tuple[dict[str, torch.Tensor], dict[str, str]]]) -> Iterator[None]:
        """Let VAELoader read each file by a function that returns its tensors and its header's texts.

        ComfyUI's own function is replaced for the whole process, so nothing else may be loaded meanwhile.
        """
        utils: Any = importlib.import_module("comfy.utils")
        own = utils.load_torch_file

        def load_torch_file(path: str, *_: Any, return_metadata: bool = False, **__: Any) -> Any:
            found = read(Path(path))
            return found if return_metadata else found[0]

        utils.load_torch_file = load_torch_file
        try:
            yield
        finally:
            utils.load_torch_file = own

    def load_image(self, data: bytes, ending: Ending) -> torch.Tensor:
        """Return the image in a file with these bytes (LoadImage).

        `ending` is the file name's ending for its format.

        Raises:
            EncodingFailed: there is no room for the file that LoadImage reads.
            SetupError: there is no folder for it.
        """
        return self.load_image_and_mask(data, ending)[0]

    def load_image_and_mask(self, data: bytes, ending: Ending) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the image as `load_image` does, and LoadImage's mask `[frames, height, width]`, 1 for transparent pixels.

        The mask of an image without transparency may be of another size. None if this LoadImage gives no mask.
        """
        with self._input_folders.file(data, ending) as path, self._input_setting.entered(path.parent):
            outputs = self._load_image.run(image=str(path))
        image: torch.Tensor = get_value_at_index(outputs, 0)
        with suppress(LookupError):
            mask: torch.Tensor = get_value_at_index(outputs, 1)
            return image, mask
        return image, None

    @cached_property
    def _input_folders(self) -> InputFolders:
        return InputFolders()

    @cached_property
    def decoder(self) -> str:
        """The JPEG decoder of LoadImage with its version: Pillow, or PyAV with ffmpeg."""
        return decoder_of(self.load_image)

    def note(self, feature: Feature) -> ImageNote | None:
        """Return the code in `image_notes` for how LoadImage treats a feature of a file."""
        if feature not in self._notes:
            self._notes[feature] = feature.note(self.load_image(feature.sample(), ENDINGS[feature.format]))
        return self._notes[feature]

    @property
    def can_fit_exactly(self) -> bool:
        """The ability of ImageScaleToTotalPixels to scale both sides to multiples of a number of pixels."""
        return "resolution_steps" in self._scale.inputs

    def scale(self, image: torch.Tensor, upscale_method: str, megapixels: float, steps: int | None = None) -> torch.Tensor:
        """Return the image scaled to about `megapixels` * 1024 * 1024 pixels, its aspect kept (ImageScaleToTotalPixels).

        With `steps`, both sides are multiples of it. That needs a node that `can_fit_exactly`.
        """
        more = {} if steps is None else {"resolution_steps": steps}
        scaled: torch.Tensor = self._scale(image=image, upscale_method=upscale_method, megapixels=megapixels, **more)
        return scaled

    def encode(self, vae: Vae, pixels: torch.Tensor) -> torch.Tensor:
        """Return the latent of an image (VAEEncode): float32 on the CPU, `[1, channels, (1,) height, width]`."""
        samples: torch.Tensor = self._vae_encode(pixels=pixels, vae=vae)["samples"]
        return samples

    def decode(self, vae: Vae, samples: torch.Tensor) -> torch.Tensor:
        """Return the image of a latent that has the VAE's own number of dimensions (VAEDecode).

        Raises:
            SetupError: this ComfyUI has no such node.
        """
        image: torch.Tensor = self._vae_decode(samples={"samples": samples}, vae=vae)
        return image

    @cached_property
    def _vae_decode(self) -> Node:
        """The node VAEDecode, looked up on first use: a service that only encodes does not need it."""
        node_class = import_custom_nodes_minimal(self.path, ("VAEDecode",))["VAEDecode"]
        return Node("VAEDecode", node_class, ("samples", "vae"))

    def vae_folders(self, kind: str = "vae") -> list[Path]:
        """Return the folders that are searched for VAE files, in order; `kind` is ComfyUI's, `vae` or `vae_approx`."""
        return [Path(folder) for folder in self._folder_paths.get_folder_paths(kind)]

    def vae_names(self, kind: str = "vae") -> list[str]:
        """Return the files in those folders and below, sorted, each by the name that a request gives."""
        names: list[str] = self._folder_paths.get_filename_list(kind)
        return names

    def vae_choices(self) -> list[str]:
        """Return every name that VAELoader offers: VAE files, complete TAESD pairs, and `pixel_space` in newer releases."""
        loader: Any = self.nodes["VAELoader"]
        return list(loader.INPUT_TYPES()["required"]["vae_name"][0])

    def vae_file(self, name: str, kind: str = "vae") -> Path | None:
        """Return the file of that name, or None if there is none."""
        found: str | None = self._folder_paths.get_full_path(kind, name)
        return Path(found) if found is not None else None

    def vae_files(self, name: str) -> list[Path] | None:
        """Return every file that VAELoader reads for a name, none for `pixel_space`; None if a file is missing."""
        loader: Any = self.nodes["VAELoader"]
        if name == "pixel_space" and name in self.vae_choices():
            return []
        if name in getattr(loader, "image_taes", ("taesd", "taesdxl", "taesd3", "taef1")):
            return self._taesd_pair(name)
        kind = "vae_approx" if Path(name).stem in getattr(loader, "video_taes", ()) else "vae"
        file = self.vae_file(name, kind)
        return [file] if file is not None else None

    def _taesd_pair(self, name: str) -> list[Path] | None:
        """Return the encoder's and the decoder's file; None if one is missing."""
        files = []
        for part in (f"{name}_encoder.", f"{name}_decoder."):
            found = next((entry for entry in self.vae_names("vae_approx") if entry.startswith(part)), None)
            file = self.vae_file(found, "vae_approx") if found is not None else None
            if file is None:
                return None
            files.append(file)
        return files

    def search_vae_folder(self, folder: Path, kind: str = "vae", *, first: bool = False) -> None:
        """Add a folder to those searched for VAE files of that kind: last, or with `first` before the others."""
        self._folder_paths.add_model_folder_path(kind, str(folder.absolute()), is_default=first)


def load_runtime(comfyui_path: Path, device: str, precision: str, custom_nodes: Sequence[str] = ()) -> ComfyRuntime:
    """Import ComfyUI from `comfyui_path` and return it. A process can load one tree.

    `device` is `auto`, `cpu` or `cuda`. `precision` is that of the VAE: `auto`, `fp32`, `fp16` or `bf16`.

    Raises:
        SetupError: there is no tree, this process has loaded another one, the tree or one of the four nodes cannot be
            imported, or torch does not have the device.
    """
    path = find_path(comfyui_path)
    refuse_second_tree(path)
    with contained(path), _errors_explained(path):
        import_nodes(path, device, precision)
        add_extra_model_paths(path)
        return ComfyRuntime(path, custom_nodes)


def checksum_of_package(place: Path) -> str:
    """Return the SHA-256 of the Python files of a node package, with their names, in hexadecimal."""
    files = sorted(place.resolve().rglob("*.py")) if place.is_dir() else [place]
    total = hashlib.sha256()
    for file in files:
        name = str(file.relative_to(place.resolve())) if place.is_dir() else file.name
        content = file.read_bytes() if file.is_file() else b""
        total.update(f"{name} {hashlib.sha256(content).hexdigest()} ".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


@contextmanager
def _errors_explained(path: Path) -> Iterator[None]:
    """Raise each error inside as a SetupError, which names missing packages if they are the reason."""
    try:
        yield
    except Exception as exc:
        if isinstance(exc.__cause__ if isinstance(exc, SetupError) else exc, (ImportError, AttributeError)):
            _refuse_unsatisfied_packages(path, exc)
        if isinstance(exc, SetupError):
            raise
        raise SetupError(f"ComfyUI in {path} cannot be loaded: {one_line(exc)} ({TESTED}).") from exc


def _refuse_unsatisfied_packages(path: Path, exc: Exception) -> None:
    """Raise a SetupError that names every package that the tree needs and this environment lacks, if there are any."""
    packages = unsatisfied_packages(path)
    if packages.wanted:
        raise SetupError(
            f"ComfyUI in {path} needs packages that are missing or too old: {', '.join(packages.wanted)}. "
            f"Install them with: {packages.command}, or run ./setup_comfyui.sh --from {shlex.quote(str(path))}."
        ) from exc
