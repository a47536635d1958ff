"""Checks of the settings: those that cannot be used, the values in force with their sources, and misspelt names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from config import Settings, env_file_variables
from latent_encoder.doctor.check import Check, Installation, cross, tick, warning
from latent_encoder.suggestions import closest

TYPING_ERROR = 0.8
"""The least likeness (0 to 1) of a misspelt name: one letter wrong. `MEGAPIXEL` is 0.95 like its setting, `VAE_MODEL` 0.78."""


def check_faults(installation: Installation) -> Iterator[Check]:
    """Yield a cross for each setting that cannot be used."""
    for fault in installation.faults:
        yield cross("setting", fault, "Fix or remove it; the other checks use its default.")


def check_set(installation: Installation) -> Iterator[Check]:
    """Yield each setting that is set, with its source, and one check with all defaults."""
    settings = installation.settings
    unusable = {fault.partition(":")[0].lower() for fault in installation.faults}
    defaults = []
    for field, origin in installation.origins.items():
        if field in unusable:
            continue
        shown = f"{field.upper()}={_shown(settings, field)}"
        if origin != "default":
            yield tick("setting", f"{shown} ({origin})")
        elif not shown.endswith("="):
            defaults.append(shown)
    yield tick("defaults", " ".join(defaults))


def check_env_file(_: Installation) -> Iterator[Check]:
    """Yield a warning for each variable in `.env` that is no setting but resembles one."""
    if not Path(".env").is_file():
        yield tick(".env", f"none in {Path.cwd()}")
        return
    try:
        variables = env_file_variables()
    except (OSError, UnicodeDecodeError):
        return  # `check_faults` reports it
    unknown = variables.keys() - Settings.model_fields.keys()
    for name in sorted(unknown):
        if similar := closest(name, Settings.model_fields, TYPING_ERROR):
            yield warning(".env", f"{name.upper()} is no setting", f"Did you mean {similar.upper()}?")
    yield tick(".env", f"{Path('.env').absolute()} sets {len(variables) - len(unknown)} settings")


def _shown(settings: Settings, field: str) -> str:
    """Return the value in the form in which it is set; a `SecretStr` shows as stars."""
    value = getattr(settings, field)
    if value is None:
        return ""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
