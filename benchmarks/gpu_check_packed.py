"""The start of the GPU check in a packed folder, `python3 run.py [OPTIONS]`: it unpacks trees and missing wheels first.

It uses Python's own library alone, and writes nothing into the folder.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ABI3 = re.compile(r"cp3(\d+)")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        space = Path(name)
        for wheel in sorted((HERE / "wheels").glob("*.whl")):
            if is_missing(wheel) and fits(wheel):
                sys.stderr.write(f"… using {wheel.name}\n")
                unpack(wheel, space / "site")
        for tree in (archives := sorted((HERE / "trees").glob("*.zip"))):
            unpack(tree, space / tree.stem)
        trees = [option for tree in archives for option in ("--comfyui", str(space / tree.stem))]
        path = os.pathsep.join(filter(None, (str(space / "site"), str(HERE), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "benchmarks.gpu_check", *trees, *sys.argv[1:]]
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        sys.exit(subprocess.run(command, cwd=os.getcwd(), env=environment, check=False).returncode)  # noqa: S603, PTH109


def unpack(archive: Path, dest: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(dest)


def is_missing(wheel: Path) -> bool:
    """Return whether the wheel's version of its package is not installed."""
    name, wanted, *_ = wheel.name.split("-")
    try:
        return version(name) != wanted
    except PackageNotFoundError:
        return True


def fits(wheel: Path) -> bool:
    """Return whether a wheel is for this version of Python."""
    python, abi, _ = wheel.stem.split("-")[-3:]
    if abi == "none":
        return True
    if abi == "abi3":
        return any(int(minor) <= sys.version_info.minor for minor in ABI3.findall(python))
    return abi == f"cp3{sys.version_info.minor}"


if __name__ == "__main__":
    main()
