"""The Python packages that a ComfyUI tree needs for the four nodes, and that are missing or too old here.

    python latent_encoder/installer/comfy_packages.py TREE

This command prints one requirement a line, as TREE's `requirements.txt` states it, for each package to install, and nothing if
all are installed. torch and torchvision are never printed, because `setup_comfyui.sh` installs them; if they do not fit, a
message on standard error names them. Exit status: 0, or 1 if there is no ComfyUI in TREE.

The packages are found by trials: see `import_trial.py`. An import that the tree guards with `except ImportError` counts as no
need. A package whose import the service delays has to be installed, but is not loaded. No network is used.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # started as a script, it has to find the project's modules
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from errors import SetupError
from latent_encoder.installer.import_trial import try_nodes
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


def unsatisfied_packages(tree: Path) -> Packages:
    """Return the packages that the tree's four nodes need and that this environment lacks, or has in a version too old.

    Raises:
        SetupError: there is no ComfyUI tree.
    """
    path = find_path(tree)
    missing: list[str] = []
    while True:
        trial = try_nodes(path, missing)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
