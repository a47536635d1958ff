"""Our service in its own process, on a ComfyUI tree that the test process has not loaded.

    python tests/encode_cases.py COMFYUI_DIR MODEL_DIR CASES.json OUTPUT_DIR

Print one response a line, in the order of the cases `[image_path, vae_name, upscale_method, megapixels]`. A fifth item of a
case is the fit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import Settings
from models import EncodeRequest
from service import LatentEncoder


def main() -> None:
    comfyui, model_dir, cases, output_dir = map(Path, sys.argv[1:])
    encoder = LatentEncoder.set_up(Settings(_env_file=None, comfyui_path=comfyui, model_dir=model_dir, device="cpu"))
    for number, (image, vae, method, megapixels, *fit) in enumerate(json.loads(cases.read_text())):
        request = EncodeRequest(
            image_path=image,
            vae_model_name=vae,
            upscale_method=method,
            megapixels=megapixels,
            fit=fit[0] if fit else "crop",
            output_dir=str(output_dir),
            request_id=str(number),
        )
        sys.stdout.write(encoder.respond(request).model_dump_json() + "\n")


if __name__ == "__main__":
    main()
