"""Checks of the settings: which cannot be used, which are in force and why, and which are perhaps misspelt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from config import Settings, env_file_variables
from latent_encoder.doctor.check import Check, Installation, cross, tick, warning
from latent_encoder.suggestions import closest

TYPING_ERROR = 0.8  # a likeness: a letter too many, too few or another


def check_faults(installation: Installation) -> Iterator[Check]:
    """Those that cannot be used."""
    for fault in installation.faults:
        yield cross("setting", fault, "Mend or remove it; the other checks go on without it.")


def check_set(installation: Installation) -> Iterator[Check]:
    """Each that is not the default's, with where it came from, and then the others."""
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
    """Variables in `.env` that are no settings, and look as if they were meant to be."""
    if not Path(".env").is_file():
        yield tick(".env", f"none in {Path.cwd()}")
        return
    try:
        variables = env_file_variables()
    except (OSError, UnicodeDecodeError):
        return  # one of the settings' faults
    unknown = variables.keys() - Settings.model_fields.keys()
    for name in sorted(unknown):
        if similar := closest(name, Settings.model_fields, TYPING_ERROR):
            yield warning(".env", f"{name.upper()} is no setting", f"Did you mean {similar.upper()}?")
    yield tick(".env", f"{Path('.env').absolute()} sets {len(variables) - len(unknown)} settings")


def _shown(settings: Settings, field: str) -> str:
    """The value as one would set it; SecretStr shows stars of its own."""
    value = getattr(settings, field)
    if value is None:
        return ""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
