"""A trial that loads the four nodes of a ComfyUI tree in another process, and reports the missing module that ended it.

    python latent_encoder/installer/import_trial.py TREE [MODULE ...]

The named modules are inert in the trial: they can be imported, and take every use at module level. So a caller that adds the
missing module of each trial to the next one finds them all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":  # as a script, it finds the project's modules instead of those in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from errors import one_line

TRIAL_TIMEOUT_S = 300
"""Far more than an import takes on a slow disk; a trial that takes longer hangs."""


@dataclass(frozen=True)
class Trial:
    """One attempt at loading the nodes."""

    imported: Sequence[str]
    """Top-level modules that were loaded."""
    missing: str | None
    """The top-level module whose absence made it fail."""
    error: str | None
    """The reason why it failed; None if all modules were loaded."""


def try_nodes(tree: Path, replaced: Sequence[str]) -> Trial:
    """Load the nodes in another process, with inert modules in place of those in `replaced`."""
    command = [sys.executable, str(Path(__file__).resolve()), str(tree), *replaced]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Trial((), None, f"it took more than {TRIAL_TIMEOUT_S} seconds")
    if done.returncode != 0:
        last = done.stderr.strip().rpartition("\n")[2]
        return Trial((), None, last or f"the process ended with status {done.returncode}")
    return Trial(**json.loads(done.stdout))


def _load_nodes(tree: Path, replaced: Sequence[str]) -> Trial:
    """Load the nodes in this process."""
    from latent_encoder.comfy_import import import_nodes  # imports torch

    finder = _Missing(replaced)
    sys.meta_path.append(finder)
    error = missing = None
    try:
        import_nodes(tree, "cpu", "auto")
    except (Exception, SystemExit) as exc:
        error = one_line(exc)
        missing = next((name for name in _missing_modules(exc) if name in finder.missed), None)
    return Trial(sorted({name.partition(".")[0] for name in sys.modules} - {*replaced}), missing, error)


def _missing_modules(exc: BaseException | None) -> Iterator[str]:
    """Yield the top-level modules that an error and its causes report missing, the latest error first."""
    while exc is not None:
        if isinstance(exc, ModuleNotFoundError) and exc.name:
            yield exc.name.partition(".")[0]
        exc = exc.__cause__ or exc.__context__


class _Missing(MetaPathFinder, Loader):
    """A finder that comes last, so that it is asked only for missing modules; it finds inert ones for those in `replaced`."""

    def __init__(self, replaced: Sequence[str]) -> None:
        self.missed: set[str] = set()
        self._replaced = replaced

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        top = fullname.partition(".")[0]
        if top in self._replaced:
            return ModuleSpec(fullname, self, is_package=True)
        if fullname == top:
            self.missed.add(top)
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = _inert_attribute  # type: ignore[method-assign]


class _Inert:
    """An object for every use by module-level code: as a base class, decorator, annotation, or table."""

    def __getattr__(self, name: str) -> _Inert:
        return _inert_attribute(name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Return the decorated object if this is used as a decorator, else something inert."""
        only_one = len(arguments) == 1 and not named
        return arguments[0] if only_one and callable(arguments[0]) else self

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()

    def __getitem__(self, key: object) -> _Inert:
        return self

    def __iter__(self) -> Iterator[_Inert]:
        return iter(())

    def __or__(self, other: object) -> _Inert:
        return self

    __ror__ = __or__


def _inert_attribute(name: str) -> _Inert:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Inert()


def _trial_process(tree: str, *replaced: str) -> None:
    """Run a trial in this process; write its result to standard output, and the tree's own output to standard error."""
    with os.fdopen(os.dup(1), "w") as outcome:
        os.dup2(2, 1)
        json.dump(vars(_load_nodes(Path(tree), replaced)), outcome)


if __name__ == "__main__":
    _trial_process(*sys.argv[1:])
