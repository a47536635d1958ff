"""Is every package installed as it is locked? Much quicker than asking pip.

python latent_encoder/installer/satisfied.py --lock LOCK… LIST…

Exit 0 where it is, 1 where something is to be installed, 2 where a list of requirements has a package that no lock has.
"""

from __future__ import annotations

import argparse
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def requirements(file: Path) -> dict[str, str]:
    """The requirements in a list or a lock, without their sums, by the names that packages are compared by."""
    lines = re.findall(r"^[A-Za-z0-9][^#\\\n]*", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", line)[0]).lower(): line.strip() for line in lines}


def installed_as_locked(line: str) -> bool:
    """Whether the version of a lock's line is there, or its condition says that this system and Python need none."""
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
    except ImportError:  # of packaging, which is one of them
        sys.exit(1)


if __name__ == "__main__":
    main()
