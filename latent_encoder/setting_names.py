"""Variables that are no settings but were probably meant as one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from config import VARIABLES, env_file, env_file_variables, environment_variables
from latent_encoder.env_file import repeated_lines
from latent_encoder.suggestions import closest
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder")

TYPING_ERROR = 0.8
"""The least likeness (0 to 1) of a misspelt name in `.env`: one letter wrong. `MEGAPIXEL` is 0.95 like its setting,
`VAE_MODEL` 0.78."""

SURE_TYPING_ERROR = 0.9
"""The least likeness in the environment, which has the variables of many programs. Their `KAFKA_TOPIC` is 0.85 like
KAFKA_DLQ_TOPIC."""

ONE_LETTER = 0.94
"""The least likeness in the environment of a name whose beginning differs from all settings': `OUPUT_DIR` is 0.947 like its
setting."""

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
    """Return the variables that resemble a setting without being one; of `.env` also others that begin with `OURS`."""
    return [*_of_env_file(), *_of_environment()]


def repeated_variables() -> list[str]:
    """Return the settings that several lines of `.env` set, with the numbers of the lines."""
    return list(repeated_lines(env_file(), VARIABLES))


def warn_of_variables() -> None:
    """Log the variables that were probably meant as a setting, and those that `.env` sets several times."""
    if unknown := unknown_variables():
        log.warning("variables are no settings", variables=[str(variable) for variable in unknown])
    if repeated := repeated_variables():
        log.warning(".env sets variables more than once; the last line counts", variables=repeated)


def _of_env_file() -> Iterator[UnknownVariable]:
    for name in sorted(env_file_variables().keys() - VARIABLES.keys()):
        meant = closest(name, VARIABLES, TYPING_ERROR)
        if meant or name.startswith(OURS):
            yield UnknownVariable(name.upper(), ".env", meant and meant.upper())


def _of_environment() -> Iterator[UnknownVariable]:
    beginnings = tuple({f"{name.partition('_')[0]}_" for name in VARIABLES if "_" in name})
    for name in sorted(environment_variables().keys() - VARIABLES.keys()):
        likeness = SURE_TYPING_ERROR if name.startswith(beginnings) else ONE_LETTER
        if meant := closest(name, VARIABLES, likeness):
            yield UnknownVariable(name.upper(), "environment", meant.upper())
