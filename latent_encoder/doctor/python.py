"""The check of the Python that runs this, and of its packages. It needs none of them."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from itertools import chain

from latent_encoder.doctor.check import Check, Installation, cross, tick
from latent_encoder.interpreter import OLDEST_PYTHON, PACKAGES_OF_MODES, START_PACKAGES, missing_packages, next_step

TESTED_PYTHONS = ("3.11", "3.12", "3.13")


def check_python(_: Installation) -> Iterator[Check]:
    """Check the version of the Python that runs this."""
    version = platform.python_version()
    found = f"{version}, {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        yield cross("python", found, "Install Python 3.11 or newer and run ./setup_comfyui.sh.")
    else:
        tested = version.rpartition(".")[0] in TESTED_PYTHONS
        yield tick("python", found if tested else f"{found} (tested: {', '.join(TESTED_PYTHONS)})")
    if missing := missing_packages(tuple(sorted({*START_PACKAGES, *chain(*PACKAGES_OF_MODES.values())}))):
        yield cross("python packages", f"missing: {', '.join(missing)}", next_step(sys.argv[1:]))
