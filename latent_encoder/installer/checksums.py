"""The SHA-256 checksums of a tree's Python files: recorded when a release is fetched, and compared later.

A list has the format of `sha256sum`: checksum, two spaces, and the file's path in the tree.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

CHECKSUMS = ".source.sha256"


def recorded_checksums(dest: Path) -> Path | None:
    """Return the list that was recorded when the tree was fetched; None if there is none."""
    checksums = dest / CHECKSUMS
    return checksums if checksums.is_file() else None


def record_checksums(fresh: Path) -> None:
    """Write the list of all Python files in a tree to a file in it."""
    files = sorted(file.relative_to(fresh).as_posix() for file in fresh.rglob("*.py"))
    (fresh / CHECKSUMS).write_text("".join(f"{sha256(fresh / file)}  {file}\n" for file in files), encoding="utf-8")


def wrong_files(tree: Path, checksums: Path | None) -> list[str]:
    """Return the files of a list that are missing from `tree` or have another checksum."""
    lines = checksums.read_text(encoding="utf-8").splitlines() if checksums else []
    return [name for expected, name in (line.split(maxsplit=1) for line in lines) if sha256(tree / name) != expected]


def sha256(file: Path) -> str | None:
    """Return a file's checksum in hexadecimal; None if there is no such file."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
