"""Locks and left-over files: one writer of a name at a time, and nothing is left of killed processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from errors import OutputDirNotWritable
from latent_encoder.access import ANYWHERE
from latent_encoder.outputs.files import StagedFiles
from latent_encoder.outputs.folder import OutputFolder, open_output_folder
from latent_encoder.outputs.leftovers import HIDDEN, remove_abandoned
from latent_encoder.outputs.locks import LOCK, PREFIX, REPLACED, TEMPORARY, key_of, name_lock
from tests.helpers import PROJECT

HOLDER = """
import sys
from pathlib import Path
from latent_encoder.access import ANYWHERE
from latent_encoder.outputs.files import StagedFiles
from latent_encoder.outputs.folder import open_output_folder
def hold():
    print("held", flush=True)
    sys.stdin.read()
with open_output_folder(Path(sys.argv[1]), ANYWHERE) as folder, StagedFiles(folder) as staged:
    staged.add("a", b"a")
    staged.publish(hold)
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that has a temporary file and the lock of the name `a` until its standard input ends."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def opened(path: Path) -> Iterator[OutputFolder]:
    with open_output_folder(path, ANYWHERE) as folder:
        yield folder


def hidden(path: Path) -> set[str]:
    """Return the endings of our hidden files in a folder."""
    return {Path(name).suffix for name in os.listdir(path) if HIDDEN.fullmatch(name)}  # noqa: PTH208


def test_other_names_are_free_while_one_is_locked(tmp_path: Path) -> None:
    """A stopped process holds up its own name only, and that for a limited time with a reason."""
    with holder(tmp_path) as process, opened(tmp_path) as folder:
        process.send_signal(signal.SIGSTOP)
        with name_lock(folder, "b", wait_s=0):
            pass
        with (
            pytest.raises(OutputDirNotWritable, match=r"for 0\.1 s another process has been writing a"),
            name_lock(folder, "a", wait_s=0.1),
        ):
            pass
    assert hidden(tmp_path) == {TEMPORARY, LOCK}


def test_lock_ends_with_its_process(tmp_path: Path) -> None:
    """After a kill the next process gets the lock at once, and removes its file."""
    with holder(tmp_path) as process, opened(tmp_path) as folder:
        process.kill()
        process.wait()
        with name_lock(folder, "a", wait_s=0):
            assert hidden(tmp_path) == {TEMPORARY, LOCK}
    assert hidden(tmp_path) == {TEMPORARY}


def test_only_one_holds_a_lock(tmp_path: Path) -> None:
    """Eight threads, each with a descriptor of its own, are never inside together, although each removes the lock's file."""
    inside, most, rounds = 0, 0, 40
    counting = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _ in range(rounds):
            with opened(tmp_path) as folder, name_lock(folder, "a", wait_s=60):
                with counting:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0)
                with counting:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert list(tmp_path.iterdir()) == []


def test_left_over_files_are_removed(tmp_path: Path) -> None:
    """The files of a killed process are removed; a living one's and other hidden files stay."""
    (tmp_path / ".latent-encoder-notes").touch()
    with opened(tmp_path) as folder:
        with holder(tmp_path) as process:
            (tmp_path / f"{PREFIX}{key_of('a')}-0{REPLACED}").touch()
            remove_abandoned(folder)
            assert hidden(tmp_path) == {TEMPORARY, REPLACED, LOCK}
            process.kill()
            process.wait()
        (tmp_path / f"{PREFIX}{key_of('b')}-0{REPLACED}").touch()
        (tmp_path / f"{PREFIX}0123456789abcdef{TEMPORARY}").mkdir()
        remove_abandoned(folder)
        assert {path.name for path in tmp_path.iterdir()} == {
            ".latent-encoder-notes",
            f"{PREFIX}0123456789abcdef{TEMPORARY}",
        }


def test_publishing_goes_on_while_others_clean_up(tmp_path: Path) -> None:
    """A process that starts takes no file of a writer in any of its steps."""
    done = threading.Event()

    def clean() -> None:
        with opened(tmp_path) as folder:
            while not done.is_set():
                remove_abandoned(folder)

    cleaner = threading.Thread(target=clean)
    cleaner.start()
    try:
        for number in range(100):
            with opened(tmp_path) as folder, StagedFiles(folder) as staged:
                staged.add("a", str(number).encode())
                staged.add("b", str(number).encode())
                staged.publish()
    finally:
        done.set()
        cleaner.join()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"99", "b": b"99"}


def test_a_symlink_is_no_lock(tmp_path: Path) -> None:
    """A symlink in the place of the lock's file leads nowhere."""
    (tmp_path / f"{PREFIX}{key_of('a')}{LOCK}").symlink_to(tmp_path / "elsewhere")
    with opened(tmp_path) as folder, StagedFiles(folder) as staged:
        staged.add("a", b"a")
        with pytest.raises(OutputDirNotWritable, match="symbolic links"):
            staged.publish()
    assert not (tmp_path / "elsewhere").exists()
