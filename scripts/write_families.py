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

A VAE is recognised by the names and shapes of its tensors. If several families have the same tensors, the file's name decides.

- **latent space**: the value of `latent_space` in the metadata, the name of ComfyUI's class in `comfy.latent_formats`.
- **0.3.75**, **0.33**: whether this ComfyUI release encodes with the family.
- **fast path**: our [encoder](encoder.md) that encodes it: `single-frame`, or `image-strips` for float32 on a CPU. Other
  families use ComfyUI's own encoder.
- **by name**: the part of the file's name that decides between families with the same tensors.

A VAE of an unknown family also runs if ComfyUI encodes images with it. Its `latent_space` is then `null`.
"""

OTHERS = """
## VAEs that encode no images

A request that names one of these gets the error `VAE_MODEL_INVALID`, before the file is loaded.
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
    return INTRODUCTION + table(header, map(row, images)) + OTHERS + table(("VAE", "kind"), map(other_row, others))


def row(family: Family) -> Sequence[str]:
    """Return the cells of a family that encodes images."""
    releases = ("yes" if encodes(family, release) else "no" for release in RELEASES)
    space = f"`{family.latent_space}`" if family.latent_space is not None else ""
    return (
        family.name,
        space,
        *releases,
        f"`{family.fast_encoder}`" if family.fast_encoder is not None else "",
        family.by_name or "",
    )


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
