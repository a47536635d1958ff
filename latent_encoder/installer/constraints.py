"""Print pip constraints that keep the packages of a lock as they are installed, while a ComfyUI's own are installed.

    python latent_encoder/installer/constraints.py REQUIREMENTS LOCK

Every package of the lock stays at its installed version, except those for which REQUIREMENTS asks for another one. torch and
torchvision are never replaced: if REQUIREMENTS asks for another one of them, the exit status is 1, with the requirement in the
error. Packages that torch needs are left out: an environment that was not set up here may have some that do not fit, and pip
would refuse everything.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

if __name__ == "__main__":  # started as a script, it has to find the project's modules
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from latent_encoder.installer.satisfied import requirements

NEVER_REPLACED = ("torch", "torchvision")
TORCHAUDIO_FREE = (2, 11)
"""The first torchaudio that requires no certain torch. Each earlier one fits only the torch of its own number."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("requirements", type=Path)
    parser.add_argument("lock", type=Path)
    options = parser.parse_args()
    asked = requirements(options.requirements)
    for name in [*NEVER_REPLACED, *requirements(options.lock)]:
        if (found := installed(name)) is None:
            continue
        if permits(asked.get(name), found):
            print(f"{name}=={found}")
        elif name in NEVER_REPLACED:
            sys.exit(
                f"Error: this ComfyUI asks for {asked[name]}, and {name} {found} is installed, which setup never replaces. "
                "Install a torch and a torchvision that fit and run setup again, or use another ComfyUI."
            )
    for line in torchaudio(installed("torch")):
        print(line)


def installed(name: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def permits(line: str | None, found: str) -> bool:
    """Return whether a requirement permits a version. A line such as a URL, which pip will judge, permits all."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        return line is None or Requirement(line).specifier.contains(found, prereleases=True)
    except InvalidRequirement:
        return True


def torchaudio(torch: str | None) -> list[str]:
    """Return the constraint that fits torchaudio to an older torch; pip would choose the newest, which requires none."""
    from packaging.version import Version

    number = Version(torch).release[:2] if torch else TORCHAUDIO_FREE
    return [] if number >= TORCHAUDIO_FREE else [f"torchaudio=={number[0]}.{number[1]}.*"]


if __name__ == "__main__":
    main()
