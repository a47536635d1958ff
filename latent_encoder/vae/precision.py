"""A warning for precisions that a CPU has no instructions for."""

from __future__ import annotations

import torch

from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder")

INSTRUCTIONS = {
    "bf16": (("_is_avx512_bf16_supported", "_is_amx_tile_supported"), "AVX512_BF16 or AMX"),
    "fp16": (("_is_amx_fp16_supported",), "AMX-FP16"),
}
"""For each precision torch's functions that ask an x86 processor for its instructions, and their names."""


def warn_of_slow_precision(precision: str, device: str) -> None:
    """Log a warning if an encode in `precision` (`VAE_PRECISION`) is slower than float32 on this CPU.

    Nothing is logged for other devices, and if this torch does not tell.
    """
    if device != "cpu" or precision not in INSTRUCTIONS:
        return
    names, wanted = INSTRUCTIONS[precision]
    answers = [ask() for name in names if (ask := getattr(torch.cpu, name, None)) is not None]
    if answers and not any(answers):
        log.warning("this cpu is slow in that precision, fp32 is faster", vae_precision=precision, missing=wanted)
