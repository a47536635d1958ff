"""Variables that are no settings but were probably meant as one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from config import VARIABLES, env_file_variables, environment_variables
from latent_encoder.suggestions import closest
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder")

TYPING_ERROR = 0.8
"""The least likeness (0 to 1) of a misspelt name in `.env`: one letter wrong. `MEGAPIXEL` is 0.95 like its setting,
`VAE_MODEL` 0.78."""

SURE_TYPING_ERROR = 0.9
"""The least likeness in the environment, which has the variables of many programs. Their `KAFKA_TOPIC` is 0.85 like
KAFKA_DLQ_TOPIC."""

OURS = "kafka_"
"""The beginning of names that are listed if they stand in `.env`, also if they resemble no setting."""


class UnknownVariable(NamedTuple):
    """A variable that is no setting."""

    name: str
    source: str
    """`.env` or `environment`."""
    meant: str | None
    """The setting that resembles it; None if none does."""

    def __str__(self) -> str:
        return f"{self.name} ({self.source})" + (f", did you mean {self.meant}?" if self.meant else "")


def unknown_variables() -> list[UnknownVariable]:
    """Return the variables that resemble a setting without being one; of `.env` also others that begin with `OURS`.

    Raises:
        OSError, UnicodeDecodeError: `.env` cannot be read.
    """
    return [*_of_env_file(), *_of_environment()]


def warn_of_unknown_variables() -> None:
    """Log the variables that are no settings but were probably meant as one."""
    if unknown := unknown_variables():
        log.warning("variables are no settings", variables=[str(variable) for variable in unknown])


def _of_env_file() -> Iterator[UnknownVariable]:
    for name in sorted(env_file_variables().keys() - VARIABLES.keys()):
        meant = closest(name, VARIABLES, TYPING_ERROR)
        if meant or name.startswith(OURS):
            yield UnknownVariable(name.upper(), ".env", meant and meant.upper())


def _of_environment() -> Iterator[UnknownVariable]:
    beginnings = tuple({f"{name.partition('_')[0]}_" for name in VARIABLES if "_" in name})
    for name in sorted(environment_variables().keys() - VARIABLES.keys()):
        if name.startswith(beginnings) and (meant := closest(name, VARIABLES, SURE_TYPING_ERROR)):
            yield UnknownVariable(name.upper(), "environment", meant.upper())
