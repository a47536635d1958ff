"""Files: their names, and that they appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from errors import OutputDirNotWritable
from latent_encoder.access import ANYWHERE
from latent_encoder.geometry import Size
from latent_encoder.outputs.files import StagedFiles, prepare_output_folder, space_needed
from latent_encoder.outputs.folder import OutputFolder, open_output_folder
from latent_encoder.outputs.latent_files import latent_bytes
from latent_encoder.outputs.png import png_bytes
from models import FileFormat
from tests.helpers import PROJECT


@contextmanager
def staging(path: Path) -> Iterator[StagedFiles]:
    with open_output_folder(path, ANYWHERE) as folder, StagedFiles(folder) as staged:
        yield staged


def test_nothing_appears_before_all_is_there(tmp_path: Path) -> None:
    """Until they are published, no file has its name; afterwards no temporary one is left."""
    with staging(tmp_path) as staged:
        staged.add("a", b"a")
        staged.add("b", b"b")
        assert not {"a", "b"} & {path.name for path in tmp_path.iterdir()}
        staged.publish()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"a", "b": b"b"}


def test_nothing_is_left_of_what_failed(tmp_path: Path) -> None:
    """An exception in the middle removes the temporary files."""

    def fail() -> None:
        with staging(tmp_path) as staged:
            staged.add("a", b"a")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_files_follow_the_umask(tmp_path: Path) -> None:
    """The umask decides if another service's user can read the files."""
    with staging(tmp_path) as staged:
        staged.add("a", b"a")
        staged.publish()
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask


def test_output_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """OUTPUT_DIR_NOT_WRITABLE names the path and the system's reason."""
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below"):
        with pytest.raises(OutputDirNotWritable, match=rf"{path} \(Not a directory\)"):
            prepare_output_folder(path, ANYWHERE, 0)


def test_folder_is_made_as_others_make_it(tmp_path: Path) -> None:
    """A missing folder is created with its parents and the umask's permissions."""
    prepare_output_folder(tmp_path / "a" / "b", ANYWHERE, 0)
    (tmp_path / "other").mkdir()
    assert (tmp_path / "a" / "b").stat().st_mode == (tmp_path / "a").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_space_is_checked(tmp_path: Path) -> None:
    """Files larger than the free space are refused with both figures, and only the folder is left."""
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    with pytest.raises(OutputDirNotWritable, match=r"\(the files may need \d+\.\d MB, \d+\.\d MB are free\)"):
        prepare_output_folder(tmp_path / "a", ANYWHERE, free + 10**12)
    assert list((tmp_path / "a").iterdir()) == []


@given(
    st.integers(8, 400),
    st.integers(8, 400),
    st.sampled_from([(8, 4), (8, 16), (1, 3), (16, 48)]),
    st.sampled_from(get_args(FileFormat)),
)
def test_space_is_never_less_than_what_is_written(
    width: int, height: int, vae: tuple[int, int], latent_format: FileFormat
) -> None:
    """The estimate holds for noise, which does not compress, with a few kilobytes of metadata in the latent's header too."""
    factor, channels = vae
    needed = space_needed(Size(width, height), factor, channels)
    latent = torch.zeros(1, channels, height // factor, width // factor)
    data = latent_bytes(latent, latent_format, frames=True, header={"facts": "x" * 8192})
    assert len(data) + len(png_bytes(torch.rand(1, height, width, 3))) + 8192 <= needed


def test_file_that_is_read_back_is_one(tmp_path: Path) -> None:
    """A symlink, a folder and a pipe without a writer are not read."""
    (tmp_path / "file").write_bytes(b"data")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with open_output_folder(tmp_path, ANYWHERE) as folder:
        assert folder.read("file") == b"data"
        for name in ("link", "folder", "pipe", "nothing"):
            with pytest.raises(OSError, match=r"."):
                folder.read(name)


def test_renamed_folder_is_still_the_one_that_was_opened(tmp_path: Path) -> None:
    """A folder that gets the name of the opened one gets none of its files."""
    with open_output_folder(tmp_path / "a", ANYWHERE) as folder, StagedFiles(folder) as staged:
        (tmp_path / "a").rename(tmp_path / "b")
        (tmp_path / "a").mkdir()
        staged.add("x", b"x")
        staged.publish()
    assert list((tmp_path / "a").iterdir()) == []
    assert (tmp_path / "b" / "x").read_bytes() == b"x"


NAMES = ("latent.pt", "scaled.png", "preview.png", "latent.pt.json")
OTHER = "latent.safetensors.json"
"""Metadata that describe the scaled image, too."""


def publish(path: Path, version: str) -> None:
    """Publish a set of files: three with that content, and without the one in the middle, which is removed."""
    with staging(path) as staged:
        for name in NAMES:
            staged.add_or_remove(name, None if name == "preview.png" else version.encode())
        staged.publish()


def contents(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir() if file.is_file()}


@pytest.mark.parametrize("former", [{}, dict.fromkeys(NAMES, "old")], ids=["nothing", "a whole set"])
@pytest.mark.parametrize("obstacle", NAMES)
def test_folder_in_the_way_changes_nothing(obstacle: str, former: dict[str, str], tmp_path: Path) -> None:
    """Whichever name is that of a folder, the former files stay and no new one is left."""
    before = {name: text for name, text in former.items() if name != obstacle}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    (tmp_path / obstacle).mkdir()
    with pytest.raises(OutputDirNotWritable, match=f"Is a directory: {obstacle}"):
        publish(tmp_path, "new")
    assert contents(tmp_path) == before
    assert (tmp_path / obstacle).is_dir()


@pytest.mark.parametrize("former", [{}, dict.fromkeys(NAMES, "old")], ids=["nothing", "a whole set"])
@pytest.mark.parametrize("gone", [0, 1, 2])
def test_failed_rename_is_undone(gone: int, former: dict[str, str], tmp_path: Path) -> None:
    """If one of the files cannot get its name, for example because somebody removed it, each name has its former file."""
    for name, text in former.items():
        (tmp_path / name).write_text(text)
    temporaries: list[Path] = []
    with staging(tmp_path) as staged:
        for name in NAMES:
            staged.add_or_remove(name, None if name == "preview.png" else b"new")
            temporaries += set(tmp_path.glob(".latent-encoder-*.tmp")) - set(temporaries)
        temporaries[gone].unlink()
        with pytest.raises(OutputDirNotWritable, match="No such file") as caught:
            staged.publish()
    assert caught.value.errno == errno.ENOENT
    assert contents(tmp_path) == former


@dataclass(frozen=True)
class FailingFolder(OutputFolder):
    """A folder whose file system refuses some of the changes, counted from the first one on."""

    refused: Container[int] = ()
    changes: Iterator[int] = field(default_factory=count)

    def _change(self) -> None:
        if next(self.changes) in self.refused:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def link(self, name: str, new: str) -> None:
        self._change()
        super().link(name, new)

    def rename(self, name: str, new: str) -> None:
        self._change()
        super().rename(name, new)

    def flush(self) -> None:
        self._change()
        super().flush()


def publish_with(path: Path, refused: Container[int]) -> OutputDirNotWritable | None:
    """Publish a set of files in a `FailingFolder`, and return the error."""
    with open_output_folder(path, ANYWHERE) as folder:
        failing = FailingFolder(folder.path, folder.descriptor, refused)
        with StagedFiles(failing) as staged:
            for name in NAMES:
                staged.add_or_remove(name, None if name == "preview.png" else b"new")
            staged.remove_first(OTHER)
            try:
                staged.publish()
            except OutputDirNotWritable as exc:
                return exc
    return None


@pytest.mark.parametrize("former", [{}, dict.fromkeys((*NAMES, OTHER), "old")], ids=["nothing", "a whole set"])
@pytest.mark.parametrize("step", range(10))
def test_every_step_can_fail(step: int, former: dict[str, str], tmp_path: Path) -> None:
    """Whichever change is refused, one whole set is there afterwards. If undoing fails too, no metadata describe a mix."""
    new = {name: "new" for name in NAMES if name != "preview.png"}
    for name, text in former.items():
        (tmp_path / name).write_text(text)
    error = publish_with(tmp_path, [step])
    assert contents(tmp_path) == (new if error is None else former)
    assert error is None or error.errno == errno.ENOSPC

    for name, text in former.items():
        (tmp_path / name).write_text(text)
    error = publish_with(tmp_path, range(step, 100))
    there = {name: text for name, text in contents(tmp_path).items() if name in (*NAMES, OTHER)}
    assert NAMES[-1] not in there or there in (former, new)
    assert OTHER not in there or there["scaled.png"] == there["preview.png"] == "old"
    assert error is None or there == former or "files of this attempt stay there" in str(error)


def test_a_name_is_never_without_its_file(tmp_path: Path) -> None:
    """While a set replaces another, a reader finds the former or the new latent."""
    publish(tmp_path, "0")
    done = threading.Event()
    missed: list[OSError] = []

    def read() -> None:
        while not done.is_set():
            try:
                (tmp_path / "latent.pt").read_bytes()
            except OSError as exc:
                missed.append(exc)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(200):
        publish(tmp_path, str(number))
    done.set()
    reader.join()
    assert missed == []


def test_file_system_that_cannot_flush_is_no_failure() -> None:
    """A folder of processes cannot be flushed (EINVAL), as on some file systems; a closed descriptor still fails."""
    with open_output_folder(Path("/proc/self/task"), ANYWHERE) as folder:
        with pytest.raises(OSError, match=r".") as caught:
            os.fsync(folder.descriptor)
        assert caught.value.errno == errno.EINVAL
        folder.flush()
    with pytest.raises(OSError, match="Bad file descriptor"):
        folder.flush()


def test_full_disk_leaves_the_former_files(tmp_path: Path) -> None:
    """A file that the system cuts off (RLIMIT_FSIZE stands for a full disk) leaves neither itself nor a temporary file."""
    publish(tmp_path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OutputDirNotWritable) as caught:
            publish(tmp_path, "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert caught.value.errno == errno.EFBIG
    assert set(contents(tmp_path).values()) == {"old"}
    assert len(contents(tmp_path)) == 3


WRITER = """
import hashlib, json, sys
from pathlib import Path
from latent_encoder.access import ANYWHERE
from latent_encoder.outputs.files import StagedFiles
from latent_encoder.outputs.folder import open_output_folder
for number in range(10**9):
    data = number.to_bytes(8, "big") * 200_000
    with open_output_folder(Path(sys.argv[1]), ANYWHERE) as folder, StagedFiles(folder) as staged:
        staged.add("latent.pt", data)
        staged.add("scaled.png", data)
        staged.add("latent.pt.json", json.dumps({"sha256": hashlib.sha256(data).hexdigest()}).encode())
        staged.publish()
    if number == 0:
        print("written", flush=True)
"""


def test_killed_writer_leaves_no_partial_file(tmp_path: Path) -> None:
    """At any moment each file is whole, and the metadata belong to the files beside them."""
    described = 0  # metadata are absent between the removal of the old ones and the last rename
    kills = 0
    while kills < 4 or not described:
        kills += 1
        assert kills < 40, "no kill left metadata behind"
        pause = 0.05 + 0.06 * (kills % 4) + 0.001 * kills  # another moment of a write each time
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"written\n"
            time.sleep(pause)
            writer.send_signal(signal.SIGKILL)
        for name in ("latent.pt", "scaled.png"):
            data = (tmp_path / name).read_bytes()
            assert data == data[:8] * 200_000
        if (tmp_path / "latent.pt.json").exists():
            described += 1
            stated = json.loads((tmp_path / "latent.pt.json").read_bytes())["sha256"]
            for name in ("latent.pt", "scaled.png"):
                assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == stated
    assert (tmp_path / "latent.pt").exists()
