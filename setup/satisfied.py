"""Exit 0 where every package of the requirement files is installed as pinned; much quicker than asking pip.

python setup/satisfied.py CONSTRAINTS REQUIREMENTS…
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def names_and_pins(file: str) -> dict[str, str]:
    """The packages that a requirement file lists, each with what stands after its name."""
    lines = (line.split("#")[0].strip() for line in Path(file).read_text(encoding="utf-8").splitlines())
    matches = (re.match(r"([\w.-]+)(.*)", line) for line in lines)
    return {found[1].lower().replace("_", "-"): found[2] for found in matches if found}


def installed(name: str) -> str | None:
    try:
        return f"=={version(name)}"
    except PackageNotFoundError:
        return None


def main() -> None:
    constraints, *lists = sys.argv[1:]
    pins = names_and_pins(constraints)
    wanted = {name for file in lists for name in names_and_pins(file)}
    sys.exit(any(installed(name) != pins[name] for name in wanted))


if __name__ == "__main__":
    main()
