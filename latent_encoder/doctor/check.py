"""What a check of the installation is: what it looks at, and what it says.

Nothing that may be missing or broken is imported here: torch is among what is examined.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

from config import Settings
from errors import LatentEncoderError, SetupError, one_line

if TYPE_CHECKING:
    from latent_encoder.comfy_runtime import ComfyRuntime
    from service import LatentEncoder


class State(StrEnum):
    """How a check ended, from the best to the worst."""

    TICK = "tick"
    WARNING = "warning"
    CROSS = "cross"

    @property
    def severity(self) -> int:
        return list(State).index(self)


@dataclass(frozen=True)
class Check:
    """One line of what was found and, unless it is a tick, what to do about it. `name` is the same in every run."""

    name: str
    state: State
    found: str
    advice: str = ""


def tick(name: str, found: str) -> Check:
    return Check(name, State.TICK, found)


def warning(name: str, found: str, advice: str) -> Check:
    return Check(name, State.WARNING, found, advice)


def cross(name: str, found: str, advice: str) -> Check:
    return Check(name, State.CROSS, found, advice)


def cross_of(name: str, error: LatentEncoderError, advice: str) -> Check:
    """For an error of ours, which tells in its first sentence what is wrong and in the rest, if any, what to do."""
    found, _, rest = str(error).partition(". ")
    return cross(name, found.removesuffix("."), rest or advice)


@dataclass
class Installation:
    """What is examined: the settings, where each came from, what is wrong with them; and ComfyUI, once it is asked for."""

    settings: Settings
    origins: Mapping[str, str]
    faults: Sequence[str] = ()

    def is_set(self, field: str) -> bool:
        """Whether somebody set it, rather than leaving it at its default."""
        return self.origins[field] != "default"

    @property
    def missing_device(self) -> str | None:
        """Why the device that is asked for cannot be had; None where it can."""
        import torch

        if self.settings.device == "cuda" and not torch.cuda.is_available():
            return f"DEVICE=cuda, but torch {torch.__version__} finds no CUDA device"
        return None

    @property
    def comfyui(self) -> ComfyRuntime | SetupError:
        """ComfyUI as the service loads it, or why it cannot be used."""
        encoder = self.encoder
        return encoder if isinstance(encoder, SetupError) else encoder.runtime

    @cached_property
    def encoder(self) -> LatentEncoder | SetupError:
        """The service as it is before its first request, or why it cannot be used.

        On any device where the one that is asked for is missing: that is another check's to say, and not to keep this one.
        """
        from service import LatentEncoder

        settings = self.settings.model_copy(update={"device": "auto"} if self.missing_device else {})
        try:
            return LatentEncoder.set_up(settings)
        except SetupError as exc:
            return exc


Examine = Callable[[Installation], Iterator[Check]]


def guarded(name: str, place: str, installation: Installation) -> Iterator[Check]:
    """The checks that the function at `place`, its module and name, makes.

    Whatever it raises is a cross of that name, imports included, and keeps no other check from running.
    """
    module, _, function = place.rpartition(".")
    try:
        examine: Examine = getattr(importlib.import_module(module), function)
        yield from examine(installation)
    except (Exception, SystemExit) as exc:  # custom nodes have been seen to exit
        advice = "Run ./setup_comfyui.sh, which installs what is missing; where that does not help, report it with this line."
        yield cross(name, f"it cannot be examined: {type(exc).__name__}: {one_line(exc)}", advice)
