"""One start, as a process: it prints the line `ready SECONDS` as soon as the nodes can be called.

    python encode_start_process.py ours|ComfyUI COMFYUI_DIR

SECONDS is the part of the start that loads ComfyUI, with torch imported already. The process then waits until its standard
input is closed, so that its memory can be read. This script imports almost nothing, so that its time and memory are those of
its side.
"""

import sys
import time
from pathlib import Path


def start_ours(comfyui_path: Path) -> float:
    """Start as `main.py` does; return the seconds that loading ComfyUI took."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import main  # noqa: F401  # for its imports
    from config import load_settings
    from latent_encoder.telemetry.logs import configure_logging
    from service import LatentEncoder

    settings = load_settings({"comfyui_path": comfyui_path, "device": "cpu", "log_level": "WARNING"})
    configure_logging(settings.log_level, settings.log_format)
    start = time.perf_counter()
    LatentEncoder.set_up(settings)
    return time.perf_counter() - start


def start_comfyui(comfyui_path: Path) -> float:
    """Import ComfyUI's modules with the four nodes, plainly; return the seconds without those for torch."""
    import torch  # noqa: F401  # first, so that its time does not count

    start = time.perf_counter()
    sys.path.insert(0, str(comfyui_path))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import nodes  # noqa: F401
    from comfy_extras import nodes_post_processing  # type: ignore[import-not-found]  # noqa: F401

    return time.perf_counter() - start


if __name__ == "__main__":
    side, folder = sys.argv[1:]
    loading_s = (start_ours if side == "ours" else start_comfyui)(Path(folder))
    sys.stdout.write(f"ready {loading_s}\n")
    sys.stdout.flush()
    sys.stdin.read()
