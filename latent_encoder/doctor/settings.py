"""Checks of the settings: those that cannot be used, the values in force with their sources, and misspelt names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from config import VARIABLES, Settings, env_file_variables
from latent_encoder.doctor.check import Check, Installation, State, cross, tick, warning
from latent_encoder.setting_names import UnknownVariable, repeated_variables, unknown_variables


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
    folded = f"{len(defaults)} settings have their default; --verbose shows them"
    yield Check("defaults", State.TICK, " ".join(defaults), folded=folded)


def check_env_file(_: Installation) -> Iterator[Check]:
    """Yield a warning for each variable that was probably meant as a setting, or that `.env` sets several times."""
    yield from map(_unknown, unknown_variables())
    for variable in repeated_variables():
        yield warning(".env", f"sets {variable}", "Remove all lines except one; the last one counts.")
    if not Path(".env").is_file():
        yield tick(".env", f"none in {Path.cwd()}")
        return
    yield tick(".env", f"{Path('.env').absolute()} sets {len(env_file_variables().keys() & VARIABLES.keys())} settings")


def _unknown(variable: UnknownVariable) -> Check:
    advice = f"Did you mean {variable.meant}?" if variable.meant else "docs/configuration.md lists all settings."
    return warning(variable.source, f"{variable.name} is no setting", advice)


def _shown(settings: Settings, field: str) -> str:
    """Return the value in the form in which it is set; a `SecretStr` shows as stars."""
    value = getattr(settings, field)
    if value is None:
        return ""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
