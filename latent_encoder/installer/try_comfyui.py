"""Try whether a ComfyUI tree can do the job of this service; called by setup_comfyui.sh.

    python installer/try_comfyui.py TREE

It loads the tree as the service does and runs the four nodes on a small picture, then encodes one with the tiny VAE if that is
there. It prints one line. Exit status 3 and an error message: the tree cannot do the job.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

if __name__ == "__main__":  # started as a script, it has to find the project's modules
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import Settings
from errors import SetupError
from latent_encoder.releases import is_before
from latent_encoder.vae.loading import TRIAL_VAE
from service import LatentEncoder

EXIT_CANNOT_START = 3
FIRST_WITH_TINY_VAE = "0.3.75"  # older releases take the width of a Wan VAE for granted


def main() -> None:
    logging.basicConfig(level=logging.ERROR)
    try:
        sys.stdout.write(f"ComfyUI: {try_tree(Path(sys.argv[1]))}\n")
    except SetupError as exc:
        sys.stderr.write(f"Error: {exc}\n")
        sys.exit(EXIT_CANNOT_START)


def try_tree(tree: Path) -> str:
    """Return what ran on that tree.

    Raises:
        SetupError: the tree cannot be loaded, or a node fails.
    """
    encoder = LatentEncoder.set_up(Settings(_env_file=None, comfyui_path=tree, vae_model_name=TRIAL_VAE))
    version, nodes = encoder.runtime.version, ", ".join(encoder.tried_nodes)
    if is_before(version, FIRST_WITH_TINY_VAE):
        return f"{version} ran {nodes} on a test picture; it is too old for the tiny VAE."
    encoder.warm_up()
    return f"{version} ran {nodes} on a test picture, and encoded one with {TRIAL_VAE}."


if __name__ == "__main__":
    main()
