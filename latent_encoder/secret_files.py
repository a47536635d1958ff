"""Secrets that come from files: `KAFKA_SASL_PASSWORD_FILE` names the file that holds KAFKA_SASL_PASSWORD."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from latent_encoder.small_files import read_small_file
from latent_encoder.user_paths import setting_path

Sources = Mapping[str, Mapping[str, str | None]]
"""The variables of each source by their names in lower case; the source that wins comes first."""


def file_variable(field: str) -> str:
    """Return the name, in lower case, of the variable that names the file of a secret."""
    return f"{field}_file"


def source_of(variable: str, sources: Sources) -> str | None:
    """Return the first source that sets a variable; None if none does."""
    return next((source for source, variables in sources.items() if variables.get(variable)), None)


def secrets_in_files(fields: Iterable[str], sources: Sources) -> tuple[dict[str, str], list[str]]:
    """Return the secrets that come from files, by field, and a list of faults, each beginning with its variable."""
    secrets, faults = {}, []
    for field in fields:
        source = source_of(file_variable(field), sources)
        if source is None:
            continue
        variable = file_variable(field).upper()
        if also := source_of(field, sources):
            faults.append(f"{field.upper()}: is set ({also}), and so is {variable} ({source}); remove one of them")
            continue
        name = str(sources[source][file_variable(field)])
        try:
            secrets[field] = _content(name)
        except ValueError as exc:
            faults.append(f"{variable}: {_shown(name)} cannot be used ({exc})")
    return secrets, faults


def _content(name: str) -> str:
    """Return the content of a file without the newline at its end.

    Raises:
        ValueError: there is none. The text has the reason.
    """
    text = read_small_file(Path(setting_path(name)))
    secret = text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
    if not secret:
        raise ValueError("empty")
    return secret


def _shown(name: str) -> str:
    """Return the name for a message. A name that does not look like a path may be the secret itself."""
    path_like = (
        name.startswith(("/", "./", "../", "~/")) or Path(name).is_file() or ("/" in name and Path(name).parent.is_dir())
    )
    return name if path_like else "a file whose name is not shown, because it may be the secret itself,"
