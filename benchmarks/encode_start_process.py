"""One start, as a process: until the nodes can be called, of which it then prints a line.

    python encode_start_process.py ours|ComfyUI COMFYUI_DIR

It imports nothing itself, so that what it takes is what its side takes.
"""

import sys
from pathlib import Path


def start_ours(comfyui_path: Path) -> None:
    """As `main.py` does it."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import main  # noqa: F401  # for what it imports
    from config import load_settings
    from logs import configure_logging
    from service import LatentEncoder

    settings = load_settings({"comfyui_path": comfyui_path, "device": "cpu", "log_level": "WARNING"})
    configure_logging(settings.log_level, settings.log_format)
    LatentEncoder.set_up(settings)


def start_comfyui(comfyui_path: Path) -> None:
    """ComfyUI's modules with the four nodes, plainly imported."""
    sys.path.insert(0, str(comfyui_path))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import nodes  # noqa: F401
    from comfy_extras import nodes_post_processing  # type: ignore[import-not-found]  # noqa: F401


if __name__ == "__main__":
    side, folder = sys.argv[1:]
    (start_ours if side == "ours" else start_comfyui)(Path(folder))
    sys.stdout.write("the nodes can be called\n")
    sys.stdout.flush()
