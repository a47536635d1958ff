"""Try whether the service can encode with a ComfyUI tree; called by setup_comfyui.sh.

    python latent_encoder/installer/try_comfyui.py TREE

It loads the tree as the service does and runs the four nodes on a small image, then encodes one with the tiny VAE unless the
release is too old for that. It prints one line. If the tree cannot encode, it prints an error and the exit status is 3.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

if __name__ == "__main__":  # as a script, it finds the project's modules instead of those in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from config import Settings
from errors import SetupError
from latent_encoder.releases import is_older
from latent_encoder.vae.loading import TRIAL_VAE
from service import LatentEncoder

EXIT_CANNOT_START = 3
FIRST_WITH_TINY_VAE = "0.3.75"
"""Older releases accept only a Wan VAE of the full width."""


def main() -> None:
    logging.basicConfig(level=logging.ERROR)
    try:
        sys.stdout.write(f"ComfyUI: {try_tree(Path(sys.argv[1]))}\n")
    except SetupError as exc:
        sys.stderr.write(f"Error: {exc}\n")
        sys.exit(EXIT_CANNOT_START)


def try_tree(tree: Path) -> str:
    """Return a sentence that names the tree's version and the nodes that ran.

    Raises:
        SetupError: the tree cannot be loaded, or a node fails.
    """
    encoder = LatentEncoder.set_up(Settings(_env_file=None, comfyui_path=tree, vae_model_name=TRIAL_VAE))
    version, nodes = encoder.runtime.version, ", ".join(encoder.tried_nodes)
    if is_older(version, FIRST_WITH_TINY_VAE):
        return f"{version} ran {nodes} on a test image; it is too old for the tiny VAE."
    encoder.warm_up()
    return f"{version} ran {nodes} on a test image, and encoded one with {TRIAL_VAE}."


if __name__ == "__main__":
    main()
