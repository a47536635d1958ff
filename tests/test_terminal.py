"""Standard output and standard error that take nothing: each exit status is the documented one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import IMAGES, TINY_VAE, RunMain

VERSION, WRONG_USAGE = ("--version",), ("--no-such-option",)
REFUSED = ("--image_path", "x.png", "--megapixels", "17")
ENCODED = (*("--image_path", IMAGES / "photo.jpg", IMAGES / "astronaut_masked.png"), *("--megapixels", "0.02"))

UNEXPECTED = "Error: Unexpected error: [Errno {}] {}. Run again with --debug for details.\n"
FULL, CLOSED = (28, "No space left on device"), (9, "Bad file descriptor")


def redirected(redirection: str) -> list[str]:
    """Return a prefix for a command whose streams the shell redirects."""
    return ["sh", "-c", f'exec "$@" {redirection}', "sh"]


@pytest.mark.parametrize(("redirection", "fault"), [(">/dev/full", FULL), (">&-", CLOSED)])
def test_standard_output_that_takes_nothing_is_status_3(redirection: str, fault: tuple[int, str], run_main: RunMain) -> None:
    """The failure is the last line, for text that is printed at once and for a response; Python adds nothing at its end."""
    done = run_main(*VERSION, prefix=redirected(redirection))
    assert (done.returncode, done.stderr) == (3, UNEXPECTED.format(*fault))
    done = run_main(*REFUSED, prefix=redirected(redirection))
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1] == f"Error: Cannot write the response to standard output ({fault[1]})."


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
@pytest.mark.parametrize(
    ("arguments", "status"), [(VERSION, 0), (ENCODED, 0), (REFUSED, 2), (WRONG_USAGE, 2), (("--mode", "health"), 1)]
)
def test_standard_error_that_takes_nothing_leaves_the_status_alone(
    redirection: str, arguments: tuple[str | Path, ...], status: int, run_main: RunMain
) -> None:
    """A full disk behind the log turns no success into a failure, and no failure into another."""
    done = run_main(*arguments, prefix=redirected(redirection), env={"VAE_MODEL_NAME": TINY_VAE, "HTTP_PORT": "9"})
    assert (done.returncode, bool(done.stdout)) == (status, arguments in (VERSION, ENCODED, REFUSED))


@pytest.mark.parametrize(("arguments", "status"), [(VERSION, 3), (REFUSED, 3), (ENCODED, 3), (WRONG_USAGE, 2)])
def test_both_that_take_nothing(arguments: tuple[str | Path, ...], status: int, run_main: RunMain) -> None:
    """The status stays true if neither stream takes anything, also in the middle of a run of several images."""
    done = run_main(*arguments, prefix=redirected(">/dev/full 2>&1"), env={"VAE_MODEL_NAME": TINY_VAE})
    assert done.returncode == status


@pytest.mark.parametrize(
    ("arguments", "written"), [(REFUSED, "the response to"), (("--mode", "inspect", "--json", "x.pt"), "to")]
)
def test_pipe_that_nobody_reads_is_status_3(arguments: tuple[str, ...], written: str, run_main: RunMain) -> None:
    """A broken pipe behind standard output is status 3, and the last line names it."""
    done = run_main(*arguments, prefix=["bash", "-c", '"$@" | true; exit ${PIPESTATUS[0]}', "bash"])
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1] == f"Error: Cannot write {written} standard output (Broken pipe)."
