"""Write docs/vae-families.md: the VAE families, the ComfyUI releases that encode with each, and the names of their latents.

    python scripts/write_families.py

The tables follow from `latent_encoder/vae/families.py`; the text around them is here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from latent_encoder.releases import is_older
from latent_encoder.vae.families import FAMILIES, Family

PAGE = PROJECT / "docs" / "vae-families.md"

RELEASES = ("0.3.75", "0.33.0")
"""The pinned release, and the newest tested one."""

INTRODUCTION = """\
[Latent Encoder](../README.md)

# VAE families

<!-- Written by scripts/write_families.py. -->

```bash
VAE_MODEL_NAME=tiny_qwen_vae.safetensors .venv/bin/python main.py doctor
```

lists the VAE files in your model folders, each with its family, and tries the one that is named. A VAE is recognised by the
names and shapes of its tensors. If several families have the same tensors, the file's name decides.

- **latent space**: the value of `latent_space` in the metadata, the name of ComfyUI's class in `comfy.latent_formats`.
- **0.3.75**, **0.33**: whether this ComfyUI release encodes with the family.
- **fast path**: whether the [single-frame encoder](encoder.md) encodes it. Other families use ComfyUI's own encoder.
- **by name**: the part of the file's name that decides between families with the same tensors.

A VAE of an unknown family also runs if ComfyUI encodes images with it. Its `latent_space` is then `null`.

**Names of diffusers.** A `diffusion_pytorch_model.safetensors` of Wan or Qwen-Image is read too: the service gives its tensors
the names that ComfyUI knows, and the latents are those of the same weights in ComfyUI's file, to the last bit. ComfyUI itself
converts those of SD, SDXL, SD3, FLUX and HunyuanVideo.
"""

OTHERS = """
## VAEs that encode no images

A request that names one of these gets the error `VAE_MODEL_INVALID`, before the file is loaded.
"""


REFUSED = """
## VAE files that are refused

Each gets `VAE_MODEL_INVALID` with the reason and the next step.

- **Another format**: GGUF, ONNX, HDF5, archives, web pages, JSON, Git LFS pointers, an empty file, or safetensors under
  another ending and the reverse.
- **Damage**: a truncated file, zeros in place of weights, values that are infinite or NaN.
- **Another model**: a full checkpoint, a LoRA, a text encoder, a diffusion model, one part of a model in several files.
- **Quantised weights**: integers, or 8-bit numbers with scales beside them (`scale_weight`, `weight_scale`, `comfy_quant`),
  which ComfyUI's VAEs ignore. Weights that were only rounded to `float8_e4m3fn` or `float8_e5m2` are read as in ComfyUI.
- **Tensors that do not fit**: some that encoding needs are missing, of another size, or left over. Left-over tensors of the
  decoder and of training (`loss.…`, `model_ema.…`) are harmless.
- **An implausible latent**: when a VAE is loaded, it encodes an image of 133 x 69 pixels with grey, a turn of colours and
  noise. The latent has to be finite, its root mean square below 250, and not the same everywhere.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(document(), encoding="utf-8")
    print(f"{PAGE.relative_to(PROJECT)} written")


def document() -> str:
    """Return the text of the page."""
    images = [family for family in FAMILIES if family.no_images is None]
    others = [family for family in FAMILIES if family.no_images is not None]
    header = ("family", "latent space", *(release.removesuffix(".0") for release in RELEASES), "fast path", "by name")
    return INTRODUCTION + table(header, map(row, images)) + OTHERS + table(("VAE", "kind"), map(other_row, others)) + REFUSED


def row(family: Family) -> Sequence[str]:
    """Return the cells of a family that encodes images."""
    releases = ("yes" if encodes(family, release) else "no" for release in RELEASES)
    space = f"`{family.latent_space}`" if family.latent_space is not None else ""
    return (family.name, space, *releases, "yes" if family.single_frame else "", family.by_name or "")


def other_row(family: Family) -> Sequence[str]:
    """Return the cells of a family that encodes no images."""
    return (family.name, str(family.no_images))


def encodes(family: Family, release: str) -> bool:
    """Return whether a ComfyUI release encodes with VAEs of a family."""
    return family.since is not None and not is_older(release, family.since)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, with an empty line before it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    main()
