"""The ComfyUI releases that the test suite has run on, and comparisons with them. Imports only the standard library."""

from __future__ import annotations

PINNED_RELEASE = "0.3.75"
"""The release that `setup_comfyui.sh` installs."""

TESTED_RELEASES = ("0.3.52", "0.3.64", "0.3.75", "0.33.0")

TESTED = f"tested releases: {', '.join(TESTED_RELEASES[:-1])} and {TESTED_RELEASES[-1]}"
"""`TESTED_RELEASES` for an error message."""


def is_tested(version: str) -> bool:
    """Return whether the suite has run on that release, compared as versions: `0.33` is `0.33.0`, `0.3.5` is not `0.3.52`."""
    from packaging.version import InvalidVersion, Version

    try:
        return Version(version) in map(Version, TESTED_RELEASES)
    except InvalidVersion:
        return False


def is_older(version: str, other: str) -> bool:
    """Return whether a release is older than `other`; False if `version` is not a version, such as `unknown`."""
    from packaging.version import InvalidVersion, Version

    try:
        return Version(version) < Version(other)
    except InvalidVersion:
        return False
