"""Pack the GPU check with all it needs into a folder, for a machine without a network.

    .venv/bin/python scripts/pack_gpu_check.py FOLDER [--comfyui DIR]… [--diffusers] [--no-wheels]

On that machine, with Python 3.12 and torch: `python3 FOLDER/run.py --json gpu.json`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from benchmarks.encode_trees import trees_of

MOST_BYTES = 64 * 1024**2
"""Most bytes of the folder: as much as travels to a machine that is lent for minutes."""

PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")

WHEELS = (
    "annotated-types",
    "av",
    "isal",
    "loky",
    "pydantic",
    "pydantic-core",
    "pydantic-settings",
    "python-dotenv",
    "structlog",
    "torchsde",
    "trampoline",
    "typing-extensions",
    "typing-inspection",
)
"""Packages that a machine with torch, transformers, scipy and the like may lack. Their versions are those of the lock."""

WHEELS_OF_TREES = ("comfy-aimdo", "comfy-kitchen", "kornia")
"""Packages that newer trees need: those of them that a tree's `requirements.txt` has, in its versions."""

PURE = ("comfy-kitchen",)
"""Packages that have a wheel without compiled code, which suffices here: the other one has 58 MB."""

NEEDED_BY = {"kornia": ("kornia-rs",)}

WHEELS_OF_DIFFUSERS = ("diffusers", "importlib-metadata")

PROJECT_FOLDERS = ("latent_encoder", "benchmarks", "tiny_vae")
PROJECT_FILES = ("tests/stock_comfyui.py", "tests/fixtures/test_images/astronaut.png", "LICENSE")

NOT_OF_TREES = {
    *(
        ".git",
        "__pycache__",
        "api_server",
        "blueprints",
        "comfy_api_nodes",
        "input",
        "models",
        "output",
        "tests",
        "tests-unit",
    ),
    *("user", "web"),
}
"""Folders of a tree that the nodes do not need: its server's and web page's, other nodes, the user's files."""

KEPT_FOLDERS = ("models/vae", "models/vae_approx", "input", "output")
"""Folders that ComfyUI expects, left empty."""

LARGEST_BYTES = 256 * 1024
"""Largest file of a tree that is no Python: larger ones are vocabularies of text encoders."""


class TooLarge(Exception):
    """The folder has more than `MOST_BYTES`."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Pack the GPU check with all it needs into a new folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--comfyui", type=Path, action="append", metavar="DIR", help="further ComfyUI tree; the first is ./comfyui"
    )
    parser.add_argument("--diffusers", action="store_true", help="carry diffusers too")
    parser.add_argument("--no-wheels", action="store_true", help="carry no packages: the machine has them all")
    options = parser.parse_args(arguments)
    trees = [PROJECT / "comfyui", *(options.comfyui or [])]
    try:
        pack(options.folder, trees, wheels=not options.no_wheels, diffusers=options.diffusers)
    except (OSError, TooLarge, subprocess.CalledProcessError) as exc:
        sys.stderr.write(f"The GPU check cannot be packed into {options.folder}: {exc}\n")
        return 1
    print(f"{size_of(options.folder) / 1024**2:.1f} MiB in {options.folder}. There: python3 run.py --json gpu.json")
    return 0


def pack(folder: Path, trees: Sequence[Path], *, wheels: bool = True, diffusers: bool = False) -> None:
    """Fill a new folder.

    Raises:
        FileExistsError: the folder exists.
        CalledProcessError: a wheel cannot be downloaded; pip has written the reason.
        TooLarge: it has become too large.
    """
    folder.mkdir(parents=True)
    copy_project(folder)
    for number, tree in enumerate(trees_of(trees)):
        pack_tree(tree.path, folder / "trees" / f"{number}-{tree.release.split()[0]}")
    (folder / "wheels").mkdir()
    if wheels:
        download([*WHEELS, *(WHEELS_OF_DIFFUSERS if diffusers else ())], trees, folder / "wheels")
    if (size := size_of(folder)) > MOST_BYTES:
        raise TooLarge(f"it has {size / 1024**2:.1f} MiB, more than {MOST_BYTES // 1024**2}; carry fewer trees")


def copy_project(folder: Path) -> None:
    """Copy the parts of the project that the check runs, and its start."""
    for source in PROJECT.glob("*.py"):
        shutil.copy2(source, folder)
    for name in PROJECT_FOLDERS:
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in PROJECT_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / name, folder / name)
    shutil.copy2(PROJECT / "benchmarks" / "gpu_check_packed.py", folder / "run.py")


def pack_tree(tree: Path, dest: Path) -> None:
    """Pack a ComfyUI tree into the archive `dest`.zip, without its web page, its models and its large files."""

    def ignored(folder: str, names: list[str]) -> Iterable[str]:
        here = Path(folder)
        return [name for name in names if (here == tree and name in NOT_OF_TREES) or is_unwanted(here / name)]

    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "tree"
        shutil.copytree(tree, copy, ignore=ignored)
        for name in KEPT_FOLDERS:
            (copy / name).mkdir(parents=True, exist_ok=True)
        shutil.make_archive(str(dest), "zip", copy)


def is_unwanted(path: Path) -> bool:
    """Return whether a file or folder of a tree is left behind wherever it stands."""
    if path.is_dir():
        return path.name == "__pycache__"
    return path.suffix != ".py" and path.stat().st_size > LARGEST_BYTES


def download(names: Sequence[str], trees: Sequence[Path], folder: Path) -> None:
    """Download wheels for the other machine: with the lock's versions and checksums, and with the versions of the trees."""
    with tempfile.TemporaryDirectory() as temporary:
        locked = Path(temporary) / "locked.txt"
        locked.write_text("".join(locked_entries(names)), encoding="utf-8")
        pip(["--require-hashes", "-r", str(locked)], folder)
    wanted = sorted(set(of_trees(trees)))
    for pure in (False, True):
        if lines := [line for line in wanted if (package(line) in PURE) == pure]:
            pip(lines, folder, pure=pure)


def locked_entries(names: Sequence[str]) -> Iterator[str]:
    """Yield the entries of packages in the locks: a line with the version, and lines with checksums."""
    entry = re.compile(r"^(\S+)==.*(?:\n    .*)*\n", re.MULTILINE)
    found: dict[str, str] = {}
    for lock in ("benchmark.txt", "runtime.txt"):
        text = (PROJECT / "requirements" / "lock" / lock).read_text(encoding="utf-8")
        found |= {match[1]: match[0] for match in entry.finditer(text)}
    return (found[name] for name in names)


def of_trees(trees: Sequence[Path]) -> Iterator[str]:
    """Yield the lines of the trees' requirements that name packages of `WHEELS_OF_TREES`, and what these need."""
    for tree in trees:
        file = tree / "requirements.txt"
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            if package(line) in WHEELS_OF_TREES:
                yield line.strip()
                yield from NEEDED_BY.get(package(line), ())


def package(line: str) -> str:
    """Return the name of the package in a line of requirements."""
    return re.split(r"[^\w.-]", line.strip(), maxsplit=1)[0].lower()


def pip(wanted: Sequence[str], folder: Path, *, pure: bool = False) -> None:
    kind = ["--implementation", "py", "--abi", "none", "--platform", "any"] if pure else ["--implementation", "cp"]
    platforms = [] if pure else [option for name in PLATFORMS for option in ("--platform", name)]
    options = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, *kind, *platforms, "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, *wanted]
    subprocess.run(command, check=True)  # noqa: S603  # the names are those above


def size_of(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
