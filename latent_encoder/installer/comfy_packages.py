"""The Python packages that a ComfyUI tree needs for the four nodes, and that are missing or too old here.

    python latent_encoder/installer/comfy_packages.py TREE

This command prints one requirement a line, as TREE's `requirements.txt` states it, for each package to install, and nothing if
all are installed. torch and torchvision are never printed, because `setup_comfyui.sh` installs them; if they do not fit, a
message on standard error names them. Exit status: 0, or 1 if there is no ComfyUI in TREE.

The packages are found by trials: another process loads the nodes as the service does. If a module is missing, the next trial
has an inert module in its place, and so on. So an import that the tree guards with `except ImportError` counts as no need. A
package whose import the service delays has to be installed, but is not loaded. No network is used.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # started as a script, it has to find the project's modules
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from errors import SetupError, one_line
from utils import find_path

if TYPE_CHECKING:
    from packaging.requirements import Requirement

BY_SETUP = ("torch", "torchvision")
"""Distributions that `setup_comfyui.sh` installs in a build that fits the machine."""

DISTRIBUTIONS = {
    "attr": "attrs",
    "cv2": "opencv-python",
    "dateutil": "python-dateutil",
    "dotenv": "python-dotenv",
    "git": "gitpython",
    "OpenGL": "pyopengl",
    "PIL": "pillow",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
"""Modules whose distributions have other names."""

TRIAL_TIMEOUT_S = 300
"""Far more than an import takes on a slow disk; a trial that takes longer hangs."""


@dataclass(frozen=True)
class Packages:
    """The requirements of a tree that this environment does not satisfy."""

    wanted: Sequence[str]
    """Requirements to install, each in pip's notation; none of `BY_SETUP`."""
    by_setup: Sequence[str]
    """Requirements of torch and torchvision."""
    stopped_by: str | None
    """The error that ended the last trial, after which more packages may be needed; None if all modules were loaded."""

    @property
    def command(self) -> str:
        """The shell command that installs `wanted` into this environment."""
        return shlex.join([sys.executable, "-m", "pip", "install", *self.wanted])


@dataclass(frozen=True)
class Trial:
    """One attempt at loading the nodes."""

    imported: Sequence[str]
    """Top-level modules that were loaded."""
    missing: str | None
    """The top-level module whose absence made it fail."""
    error: str | None
    """The reason why it failed; None if all modules were loaded."""


def unsatisfied_packages(tree: Path) -> Packages:
    """Return the packages that the tree's four nodes need and that this environment lacks, or has in a version too old.

    Raises:
        SetupError: there is no ComfyUI tree.
    """
    path = find_path(tree)
    missing: list[str] = []
    while True:
        trial = _try(path, missing)
        if trial.missing is None or trial.missing in missing:
            break
        missing.append(trial.missing)
    requirements = _requirements(path)
    needed = {*map(_distribution, missing), *_too_old(requirements, trial.imported), *BY_SETUP}
    unsatisfied = {name: requirements.get(name, name) for name in needed if not _is_satisfied(name, requirements.get(name))}
    return Packages(
        sorted(line for name, line in unsatisfied.items() if name not in BY_SETUP),
        [line for name, line in unsatisfied.items() if name in BY_SETUP],
        trial.error,
    )


def _canonical(name: str) -> str:
    """Return the form of a distribution's name in which names are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _distribution(module: str) -> str:
    return _canonical(DISTRIBUTIONS.get(module, module))


def _too_old(requirements: Mapping[str, str], imported: Sequence[str]) -> set[str]:
    """Return the distributions of imported top-level modules that are installed in a version that does not fit."""
    candidates = {name for name, line in requirements.items() if not _is_satisfied(name, line)}
    distributions = packages_distributions() if candidates else {}  # slow: it reads the metadata of every installed package
    return candidates & {_canonical(name) for module in imported for name in distributions.get(module, ())}


def _requirements(tree: Path) -> dict[str, str]:
    """Return the lines of the tree's `requirements.txt` whose markers hold on this machine, by distribution."""
    file = tree / "requirements.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    stated = [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]
    parsed = [(line, _parsed(line)) for line in stated if line and not line.startswith("-")]
    return {
        _canonical(requirement.name): line
        for line, requirement in parsed
        if requirement is not None and (requirement.marker is None or requirement.marker.evaluate())
    }


def _parsed(line: str) -> Requirement | None:
    """Return the requirement of a line; None if it is none, such as a path."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        return Requirement(line)
    except InvalidRequirement:
        return None


def _is_satisfied(distribution: str, line: str | None) -> bool:
    try:
        installed = version(distribution)
    except PackageNotFoundError:
        return False
    requirement = _parsed(line) if line is not None else None
    return requirement is None or requirement.specifier.contains(installed, prereleases=True)


# The trial


def _try(tree: Path, replaced: Sequence[str]) -> Trial:
    """Load the nodes in another process, with inert modules in place of those in `replaced`."""
    command = [sys.executable, str(Path(__file__).resolve()), "--trial", str(tree), *replaced]
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


# The command line


def main(arguments: Sequence[str]) -> int:
    """Print the requirements to install for a tree; return the exit status."""
    if len(arguments) != 1:
        sys.stderr.write("Usage: python latent_encoder/installer/comfy_packages.py TREE\n")
        return 2
    try:
        packages = unsatisfied_packages(Path(arguments[0]))
    except SetupError as exc:
        sys.stderr.write(f"Error: {exc}\n")
        return 1
    sys.stdout.writelines(f"{line}\n" for line in packages.wanted)
    if packages.by_setup:
        sys.stderr.write(
            f"This ComfyUI asks for {', '.join(packages.by_setup)}, which is not installed; run ./setup_comfyui.sh.\n"
        )
    if packages.stopped_by is not None:
        sys.stderr.write(f"More may be needed, because loading ended early: {packages.stopped_by}\n")
    return 0


def _trial_process(tree: str, *replaced: str) -> None:
    """Run a trial in this process; write its result to standard output, and the tree's own output to standard error."""
    with os.fdopen(os.dup(1), "w") as outcome:
        os.dup2(2, 1)
        json.dump(vars(_load_nodes(Path(tree), replaced)), outcome)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trial"]:
        _trial_process(*sys.argv[2:])
    else:
        sys.exit(main(sys.argv[1:]))
