"""A check of the installation: the objects that it examines, and its result.

Nothing that may be missing or broken is imported here: torch itself is examined.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

from config import Settings
from errors import LatentEncoderError, SetupError, one_line
from latent_encoder.interpreter import next_step

if TYPE_CHECKING:
    from latent_encoder.comfy_runtime import ComfyRuntime
    from service import LatentEncoder


class State(StrEnum):
    """The result of a check, from the best to the worst."""

    TICK = "tick"
    WARNING = "warning"
    CROSS = "cross"

    @property
    def severity(self) -> int:
        return list(State).index(self)


@dataclass(frozen=True)
class Check:
    """One finding in `found` and, unless it is a tick, the next step in `advice`. `name` is the same in every run."""

    name: str
    state: State
    found: str
    advice: str = ""
    folded: str = ""
    """A shorter `found` for the text report."""


def tick(name: str, found: str) -> Check:
    return Check(name, State.TICK, found)


def warning(name: str, found: str, advice: str) -> Check:
    return Check(name, State.WARNING, found, advice)


def cross(name: str, found: str, advice: str) -> Check:
    return Check(name, State.CROSS, found, advice)


def cross_of(name: str, error: LatentEncoderError, advice: str) -> Check:
    """Return a cross for an error of ours: its first sentence is the finding; the rest, or else `advice`, is the next step."""
    found, _, rest = str(error).partition(". ")
    return cross(name, found.removesuffix("."), rest or advice)


@dataclass
class Installation:
    """The installation that is examined: its settings, and ComfyUI, which is loaded on first use."""

    settings: Settings
    origins: Mapping[str, str]
    """The source of each setting by field: `default`, `.env`, `environment` or `command line`."""
    faults: Sequence[str] = ()
    """The settings that cannot be used, each with its error."""

    def is_set(self, field: str) -> bool:
        """Return whether a setting has another source than its default."""
        return self.origins[field] != "default"

    @property
    def missing_device(self) -> str | None:
        """The reason why DEVICE cannot be used; None if it can."""
        import torch

        if self.settings.device == "cuda" and not torch.cuda.is_available():
            return f"DEVICE=cuda, but torch {torch.__version__} finds no CUDA device"
        return None

    @property
    def comfyui(self) -> ComfyRuntime | SetupError:
        """ComfyUI as the service loads it, or the error that keeps it from loading."""
        encoder = self.encoder
        return encoder if isinstance(encoder, SetupError) else encoder.runtime

    @cached_property
    def encoder(self) -> LatentEncoder | SetupError:
        """The service as it is before its first request, or the error that keeps it from starting.

        If the device of DEVICE is missing, another one is used: the missing device has its own check.
        """
        from service import LatentEncoder

        settings = self.settings.model_copy(update={"device": "auto"} if self.missing_device else {})
        try:
            return LatentEncoder.set_up(settings)
        except SetupError as exc:
            return exc


Examine = Callable[[Installation], Iterator[Check]]


def guarded(name: str, place: str, installation: Installation) -> Iterator[Check]:
    """Yield the checks of the function at `place`, given as module and name.

    An error that it raises, also during its import, becomes a cross called `name`. The next function runs in any case.
    """
    module, _, function = place.rpartition(".")
    try:
        examine: Examine = getattr(importlib.import_module(module), function)
        yield from examine(installation)
    except (Exception, SystemExit) as exc:  # custom nodes have been seen to exit
        advice = "Run ./setup_comfyui.sh, which installs what is missing; if that does not help, report it with this line."
        if isinstance(exc, ImportError):
            advice = next_step(sys.argv[1:])
        yield cross(name, f"it cannot be examined: {type(exc).__name__}: {one_line(exc)}", advice)
