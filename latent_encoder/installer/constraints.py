"""Print pip constraints that keep the packages of a lock as they are installed, while a ComfyUI's own are installed.

    python latent_encoder/installer/constraints.py REQUIREMENTS LOCK

Every package of the lock stays at its installed version, except those for which REQUIREMENTS asks for another one. torch and
torchvision are never replaced: exit 1, with the requirement, if it asks for another one of them. Packages that torch needs are
not named, because an environment that was not set up here may have some that do not fit, and pip would refuse everything.
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
# The first torchaudio that does not ask for one torch. Each before fits the torch of its number only.
TORCHAUDIO_FREE = (2, 11)


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
    """Return the version of a package that is installed, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def permits(line: str | None, found: str) -> bool:
    """Return whether a requirement permits a version; a line that is none of a version permits all, and pip judges it."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        return line is None or Requirement(line).specifier.contains(found, prereleases=True)
    except InvalidRequirement:
        return True


def torchaudio(torch: str | None) -> list[str]:
    """Return the constraint that fits torchaudio to an older torch: pip would take the newest, which asks for no torch."""
    from packaging.version import Version

    number = Version(torch).release[:2] if torch else TORCHAUDIO_FREE
    return [] if number >= TORCHAUDIO_FREE else [f"torchaudio=={number[0]}.{number[1]}.*"]


if __name__ == "__main__":
    main()
