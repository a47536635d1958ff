"""The check of the machine's memory. It needs no torch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import psutil

from latent_encoder.container import CGROUP_LIMIT, memory_limit
from latent_encoder.doctor.check import Check, Installation, tick, warning

PEAK_AT_MEGAPIXELS, PEAK_GB = (1.0, 4.0, 16.0), (1.2, 1.4, 2.5)
"""Peak memory of an encode with the full-size VAE in float32 on a CPU, measured: see docs/encoder.md."""


def check_memory(installation: Installation) -> Iterator[Check]:
    """Compare the available memory with the need of an encode of MEGAPIXELS on a CPU."""
    megapixels = installation.settings.megapixels
    needed = float(np.interp(megapixels, PEAK_AT_MEGAPIXELS, PEAK_GB))
    available = min(psutil.virtual_memory().available, memory_limit(CGROUP_LIMIT)) / 1e9
    found = f"{available:.1f} GB available; MEGAPIXELS={megapixels:g} takes about {needed:.1f} GB to encode on a CPU"
    if available < needed:
        yield warning("memory", found, "End other programs, ask for fewer megapixels, or give the container more memory.")
    else:
        yield tick("memory", found)
