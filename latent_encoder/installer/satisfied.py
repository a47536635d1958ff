"""Find out whether every package is installed as it is locked, much faster than pip does.

    python latent_encoder/installer/satisfied.py --lock LOCK… LIST…

Exit status: 0 if so, 1 if something has to be installed, 2 if a list of requirements has a package that no lock has.
"""

from __future__ import annotations

import argparse
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def requirements(file: Path) -> dict[str, str]:
    """Return the requirements in a list or a lock, without their checksums, by the package's name in comparable form."""
    lines = re.findall(r"^[A-Za-z0-9][^#\\\n]*", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", line)[0]).lower(): line.strip() for line in lines}


def installed_as_locked(line: str) -> bool:
    """Return whether the version in a lock's line is installed, or its marker excludes this system and Python."""
    from packaging.requirements import Requirement

    locked = Requirement(line)
    if locked.marker is not None and not locked.marker.evaluate():
        return True
    try:
        return locked.specifier.contains(version(locked.name), prereleases=True)
    except PackageNotFoundError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lock", type=Path, action="append", required=True)
    parser.add_argument("lists", type=Path, nargs="*")
    options = parser.parse_args()
    locks = [requirements(lock) for lock in options.lock]
    for file in options.lists:
        if unknown := requirements(file).keys() - set().union(*locks):
            parser.exit(2, f"Error: {', '.join(sorted(unknown))} of {file} not locked; run scripts/supply_chain.sh lock.\n")
    try:
        sys.exit(not all(installed_as_locked(line) for lock in locks for line in lock.values()))
    except ImportError:  # packaging is not installed yet, and it is locked
        sys.exit(1)


if __name__ == "__main__":
    main()
