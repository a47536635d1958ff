"""The VAE files that can be found without ComfyUI, which takes seconds to start."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from config import PROJECT_DIR, Settings
from errors import VaeModelNotFound
from latent_encoder.storage.locations import shown
from latent_encoder.suggestions import FILE_NAMES, closest

SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".ckpt", ".bin")
"""Suffixes of the files that ComfyUI lists as models."""

KINDS = ("vae", "vae_approx")
"""ComfyUI's names of the folders: whole VAEs, and the pairs of TAESD."""

PAIRS = ("taesd", "taesdxl", "taesd3", "taef1")
"""Names that stand for two files in `vae_approx`, such as `taesd_encoder.safetensors` and `taesd_decoder.safetensors`."""

KNOWN_BEGINNINGS = ("tae", "pixel_")
"""Beginnings of names that stand for other files than one of that name, or for none. Newer releases may have more of them."""

MOST_NAMES_SHOWN = 20
"""Model folders may hold hundreds of files; a message stays readable with this many names."""


def vae_names(settings: Settings) -> list[str]:
    """Return the VAE files in the model folders by the names that requests give. Extra model paths are left out."""
    return sorted({name for folder in _folders(settings, KINDS[:1]) for name in _names_in(folder)})


def require_vae(name: str, settings: Settings) -> None:
    """Refuse the name of a VAE that no model folder has, unless ComfyUI may know more than these folders show.

    Raises:
        VaeModelNotFound: there is no such file. The text has the most similar name.
    """
    tree = settings.comfyui_path
    if (tree / "extra_model_paths.yaml").exists() or settings.custom_nodes:  # either may add model folders
        return
    if name in PAIRS:
        found = _has_pair(name, settings)
    elif name.startswith(KNOWN_BEGINNINGS) and not Path(name).suffix:
        found = True
    else:
        found = any(_is_file(folder / name) for folder in _folders(settings, KINDS))
    if not found:
        raise _not_found(name, settings)


def _has_pair(name: str, settings: Settings) -> bool:
    folders = _folders(settings, KINDS[1:])
    return all(any(any(folder.glob(f"{name}_{half}.*")) for folder in folders) for half in ("encoder", "decoder"))


def _not_found(name: str, settings: Settings) -> VaeModelNotFound:
    names = vae_names(settings)
    pairs = [pair for pair in PAIRS if _has_pair(pair, settings)]
    folders = _folders(settings, KINDS[1:] if name in PAIRS else KINDS[:1])
    return vae_not_found(name, folders, names, (*names, *pairs, "pixel_space"))


def vae_not_found(name: str, folders: Iterable[Path], names: Sequence[str], choices: Iterable[str]) -> VaeModelNotFound:
    """Return the error for the name of a VAE that is in none of the folders.

    Args:
        name: the name.
        folders: the folders that were searched.
        names: the VAE files in them.
        choices: the names that may have been meant.
    """
    existing = ", ".join(names[:MOST_NAMES_SHOWN]) or "none"
    if len(names) > MOST_NAMES_SHOWN:
        existing += f" and {len(names) - MOST_NAMES_SHOWN} more"
    meant = closest(name, choices, FILE_NAMES)
    suggestion = "" if meant is None else f" Did you mean {meant}?"
    return VaeModelNotFound(
        f"VAE model not found: {shown(name)}.{suggestion} Looked in: {', '.join(map(str, folders))}. "
        f"VAE files there: {existing}. "
        "Run ./setup_comfyui.sh --download-vae for qwen_image_vae.safetensors, or set MODEL_DIR to the folder of your models."
    )


def _folders(settings: Settings, kinds: tuple[str, ...]) -> list[Path]:
    """Return the folders that are searched, in order, each once."""
    places = [] if settings.model_dir is None else [settings.model_dir, *(settings.model_dir / kind for kind in kinds)]
    places += [tree / "models" / kind for tree in (settings.comfyui_path, PROJECT_DIR / "comfyui") for kind in kinds]
    return list(dict.fromkeys(place.absolute() for place in places))


def _names_in(folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # for example, too long a name
        return False
