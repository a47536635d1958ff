"""The last words of a run that ended early: the images that are left, and the way to go on."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from latent_encoder.standalone.inputs import ImageSelection
from latent_encoder.standalone.last_words import KEPT_SETTINGS, LONGEST_COMMAND, interrupted, stopped_by_failure

FOLDER = ImageSelection(("photos",))
ODD = ["a b", "it's", 'say "hi"', "$HOME `id` \\ !x", "two\nlines", "\x1b[31m\x079", "caf\udce9", "ä目", "-x", "", "*", "~"]
READ_ONCE = "The requests were read from a stream: give them again. "


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEPT_SETTINGS:
        monkeypatch.delenv(name.upper(), raising=False)


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """Return the command that goes on after a run that was started with these words."""
    monkeypatch.setattr(sys, "orig_argv", list(words))
    begin, _, last = interrupted(FOLDER, 3, 30, force=False).partition("\n")
    assert begin == "Interrupted; 3 of 30 images are left. This command goes on from here:"
    return last


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shell_reads_the_command_as_it_was_given(encoding: str, shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word comes back to the byte, is shown on one line, and has nothing that controls a terminal."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    with Path(os.devnull).open("w", encoding=encoding) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        last = command(monkeypatch, sys.executable, "main.py", *ODD)
    assert last.isprintable()
    last.encode(encoding)
    script = f"printf '%s\\0' {last}"
    done = subprocess.run([shell, "-c", script], capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == [os.fsencode(word) for word in (sys.executable, "main.py", *ODD)]


def test_python_is_the_one_that_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name stays if the shell finds this Python by it; otherwise its path stands there."""
    here = Path(sys.executable)
    monkeypatch.setenv("PATH", str(here.parent))
    assert command(monkeypatch, here.name, "-X", "dev", "main.py") == f"{here.name} -X dev main.py"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command(monkeypatch, here.name, "main.py") == f"{shlex.quote(sys.executable)} main.py"


def test_settings_of_the_environment_come_before_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that decide about the files are repeated, quoted; others and secrets are not."""
    monkeypatch.setenv("VAE_MODEL_NAME", "my vae.safetensors")
    monkeypatch.setenv("KAFKA_SASL_PASSWORD", "secret")
    monkeypatch.setenv("HTTP_PORT", "9")
    assert command(monkeypatch, sys.executable, "main.py") == (
        f"VAE_MODEL_NAME='my vae.safetensors' {shlex.quote(sys.executable)} main.py"
    )


def test_long_command_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of thousands of files would bury the rest."""
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "main.py", *(f"{number}.png" for number in range(LONGEST_COMMAND))])
    assert interrupted(FOLDER, 1, 1, force=False) == "Interrupted; 1 of 1 image is left. The same command goes on from here."


@pytest.mark.parametrize("name", ["-", "/dev/stdin", "/dev/fd/63", "/proc/self/fd/0", "fifo"])
@pytest.mark.parametrize("force", [True, False])
def test_stream_has_no_command(name: str, force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that was read from a stream cannot be read again; the words tell what giving it again does."""
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)
    again = "With --force, all its images are encoded anew." if force else "Images whose files are complete are skipped."
    left = None if name == "-" else 2
    begin = "Interrupted." if left is None else "Interrupted; 2 of 5 images are left."
    total = None if left is None else 5
    assert interrupted(ImageSelection(input_list=name), left, total, force=force) == f"{begin} {READ_ONCE}{again}"


def test_list_in_a_file_has_a_command(tmp_path: Path) -> None:
    (tmp_path / "list").touch()
    words = interrupted(ImageSelection(input_list=str(tmp_path / "list")), 2, 5, force=False)
    assert "This command goes on from here:\n" in words


def test_force_has_no_command() -> None:
    """With --force, nothing goes on: the command would encode everything anew."""
    assert interrupted(FOLDER, 3, 30, force=True) == (
        "Interrupted; 3 of 30 images are left. With --force, the same command encodes all images anew. "
        "Without --force, it skips those whose files are complete."
    )


def test_nothing_left_needs_no_command() -> None:
    assert interrupted(FOLDER, 0, 30, force=False) == "Interrupted, with no image left."


@pytest.mark.parametrize(
    ("left", "words"),
    [
        (29, "--fail-fast: stopped at a failure; 29 of 30 images were not tried."),
        (1, "--fail-fast: stopped at a failure; 1 of 30 images was not tried."),
        (0, "--fail-fast: the last image failed; none is left."),
        (None, "--fail-fast: stopped at a failure; the rest of standard input was not tried."),
    ],
)
def test_fail_fast(left: int | None, words: str) -> None:
    assert stopped_by_failure(left, None if left is None else 30) == words
