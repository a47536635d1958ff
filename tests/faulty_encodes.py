"""Workers that some requests kill or hang: `python -m tests.faulty_encodes [OPTIONS OF main.py]`.

A request whose id begins with `kill` ends the process by SIGKILL, as the kernel does if memory runs out. One whose id begins
with `hang` never gets past its image. After one whose id begins with `lose`, CUDA's device is lost. All others are encoded as
usual.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from typing import Any

import torch

import service
from latent_encoder.outputs.encoded import Encoded, Prepared
from models import EncodeRequest
from service import LatentEncoder
from tests.helpers import PROJECT

FOREVER_S = 3600.0
DEVICE_LOST = "CUDA error: an illegal memory access was encountered"


class FaultyEncoder(LatentEncoder):
    """The real encoder, except for the three kinds of requests."""

    def prepare(self, request: EncodeRequest, *more: Any) -> Prepared:
        if request.request_id.startswith("hang"):
            time.sleep(FOREVER_S)
        return super().prepare(request, *more)

    def encode_prepared(self, prepared: Prepared) -> Encoded:
        if prepared.request.request_id.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if prepared.request.request_id.startswith("lose"):
            raise torch.AcceleratorError(DEVICE_LOST)
        return super().encode_prepared(prepared)


if __name__ == "__main__":
    service.LatentEncoder = FaultyEncoder  # type: ignore[misc]
    sys.argv = [str(PROJECT / "main.py"), *sys.argv[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
