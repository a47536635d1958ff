"""The last words of a run that ended early: the images that are left, and the command that continues with them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from config import REQUEST_SETTINGS, environment_variables
from latent_encoder.standalone.inputs import STDIN, ImageSelection
from latent_encoder.storage.locations import is_url, shown

KEPT_SETTINGS = (
    *REQUEST_SETTINGS,
    *("preview", "roundtrip", "comfyui_path", "model_dir", "custom_nodes", "device", "vae_precision", "encoder", "compile"),
    *("allowed_input_dirs", "allowed_output_dirs", "damaged_images", "max_image_bytes", "max_image_pixels"),
    *("allowed_input_urls", "allowed_output_urls", "allowed_private_networks", "storage_timeout_s", "storage_max_retries"),
)
"""The settings that decide which files a run finds or makes. None of them is a secret."""

LONGEST_COMMAND = 4000
"""Characters. A longer command fills a window; it names hundreds of files that the shell found for a pattern."""


_OPTION = re.compile(r"--[\w-]+=|-[A-Za-z](?=[A-Za-z])")
"""An option before its value in one word: `--image_path=https://…`, `-ihttps://…`."""


def interrupted(selection: ImageSelection, left: int | None, total: int | None, *, force: bool) -> str:
    """Return the last words of an interrupted run, with `left` of its `total` images; None for both if that is not known."""
    if left == 0:
        return "Interrupted, with no image left."
    begin = "Interrupted." if left is None else f"Interrupted; {left} of {_images(total)} {_are(left)} left."
    return f"{begin} {_continuation(selection, force=force)}"


def stopped_by_failure(left: int | None, total: int | None) -> str:
    """Return the last words of a run that `--fail-fast` ended."""
    if left == 0:
        return "--fail-fast: the last image failed; none is left."
    if left is None:
        return "--fail-fast: stopped at a failure; the rest of standard input was not tried."
    return f"--fail-fast: stopped at a failure; {left} of {_images(total)} {'was' if left == 1 else 'were'} not tried."


def _images(count: int | None) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _continuation(selection: ImageSelection, *, force: bool) -> str:
    """Return the way to go on, as sentences."""
    if _read_once(selection.input_list):
        again = "With --force, all its images are encoded anew." if force else "Images whose files are complete are skipped."
        return f"The requests were read from a stream: give them again. {again}"
    if force:
        return (
            "With --force, the same command encodes all images anew. Without --force, it skips those whose files are complete."
        )
    command = _command()
    if len(command) > LONGEST_COMMAND:
        return "The same command goes on from here."
    if any(_without_query(word) != word for word in sys.orig_argv):
        return f"This command goes on from here; give its URLs with their queries, which may be secret, again:\n{command}"
    return f"This command goes on from here:\n{command}"


def _read_once(input_list: str | None) -> bool:
    """Return whether a list cannot be read again by its name: standard input, or a pipe such as that of `<(command)`."""
    if input_list is None:
        return False
    return (
        input_list == STDIN
        or input_list.startswith(("/dev/", "/proc/"))
        or not (is_url(input_list) or Path(input_list).is_file())
    )


def _command() -> str:
    """Return the command line of this process for a shell, with the settings that come from the environment before it."""
    return " ".join((*_assignments(), *map(_quoted, (_python(), *map(_without_query, sys.orig_argv[1:])))))


def _without_query(word: str) -> str:
    """Return a word of the command line, a URL of a web server in it without user, password and query."""
    option = found[0] if (found := _OPTION.match(word)) else ""
    return option + shown(word.removeprefix(option))


def _python() -> str:
    """Return this Python as it was named, if the shell finds it by that name, or its path."""
    named = sys.orig_argv[0]
    found = shutil.which(named)
    return named if found is not None and Path(found).absolute() == Path(sys.executable) else sys.executable


def _assignments() -> Iterator[str]:
    """Yield settings of the environment as assignments: some may stand before the command and not in the shell itself."""
    variables = environment_variables()
    for name in KEPT_SETTINGS:
        if value := variables.get(name):
            yield f"{name.upper()}={_quoted(value)}"


def _quoted(word: str) -> str:
    r"""Return a word for a shell. One that a terminal cannot show is written like `$'\033'`, for bash, zsh and POSIX 2024."""
    if word.isprintable() and _can_write(word):
        return shlex.quote(word)
    plain: Sequence[int] = [byte for byte in range(0x20, 0x7F) if chr(byte) not in "'\\"]
    return "$'" + "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in os.fsencode(word)) + "'"


def _can_write(word: str) -> bool:
    try:
        word.encode(sys.stderr.encoding)
    except UnicodeEncodeError:
        return False
    return True
