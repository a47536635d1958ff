"""The paths that a user gives: `~` and `~name` at the beginning stand for a home folder, as in a shell.

A `file://` URL stands for its path. Settings, options and the lines of a list are read so. In a Kafka request `~` is a
character as any other: its sender is another user, perhaps on another machine.
"""

from __future__ import annotations

import os
import pwd

from latent_encoder.storage.locations import path_of_file_url


def setting_path(text: str) -> str:
    """Return the path that a setting has: without the spaces around it, and with `~` expanded.

    Raises:
        ValueError: it is no path. The text has the reason, without the path.
    """
    path = text.strip()
    if not path:
        raise ValueError("must be a path; remove the variable for the default")
    if "\0" in path:
        raise ValueError("must not contain a NUL byte")
    return expanded(path)


def expanded(path: str) -> str:
    """Return the path with the home folder in place of `~` or `~name` at its beginning, or that of a `file://` URL.

    Raises:
        ValueError: that home folder is not known, or the URL names no file of this machine. The text has the reason,
            without the path.
    """
    if not path.startswith("~"):
        return path_of_file_url(path)
    name, slash, rest = path[1:].partition("/")
    return f"{_home(name).rstrip('/')}{slash}{rest}" or "/"


def expanded_file(path: str) -> str:
    """Return the path of a file `expanded`. A file that exists under a name such as `~$letter.png` keeps it.

    Raises:
        ValueError: the home folder is not known, and no such file exists.
    """
    try:
        return expanded(path)
    except ValueError:
        if os.path.lexists(path):
            return path
        raise


def _home(name: str) -> str:
    """Return the home folder of a user, or of the one who runs this process if the name is empty."""
    home = (os.environ.get("HOME") if not name else None) or _home_of_account(name)
    if not home.startswith("/"):
        raise ValueError(f"~ cannot be expanded: the home folder is {home!r}, which is no absolute path")
    return home


def _home_of_account(name: str) -> str:
    try:
        return (pwd.getpwnam(name) if name else pwd.getpwuid(os.getuid())).pw_dir
    except (KeyError, ValueError):  # ValueError: a NUL byte in the name
        reason = "no user has the name after ~; write ./~ for a name that begins so" if name else "HOME is not set"
        raise ValueError(f"~ cannot be expanded: {reason}") from None
