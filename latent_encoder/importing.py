"""Imports of packages that may be missing or broken, with the error that a user can act on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from errors import OUT_OF_MEMORY, LatentEncoderError, SetupError, one_line, outside_cause
from latent_encoder.interpreter import PACKAGES_OF_MODES, next_step, package_of, unfitness, unimportable

BROKEN = (ImportError, OSError, RuntimeError, AttributeError, ValueError, SyntaxError)
"""The errors that packages raise while they are imported, if files are missing or versions do not fit each other."""


def require_packages(mode: str) -> None:
    """Check that this Python finds the packages that a mode needs. Nothing is imported.

    Raises:
        SetupError: one is missing. The text names the Python, the packages and the next step.
    """
    if lack := unfitness(PACKAGES_OF_MODES[mode]):
        raise SetupError(f"{lack} {next_step(sys.argv[1:])}")


@contextmanager
def explained_imports() -> Iterator[None]:
    """Explain an import inside that fails, such as that of a torch without its shared libraries.

    Raises:
        SetupError: it failed. The text names the Python, the package, the reason and the next step.
    """
    try:
        yield
    except LatentEncoderError:
        raise
    except BROKEN as exc:
        system_failed = isinstance(exc, OSError) and exc.errno is not None  # for example too many open files
        if system_failed or outside_cause(exc) == OUT_OF_MEMORY or not package_of(exc):
            raise
        raise SetupError(f"{unimportable(exc, one_line(exc))} {next_step(sys.argv[1:])}") from exc
