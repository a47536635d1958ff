"""Files: their names, and that they appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from errors import OutputDirNotWritable
from latent_encoder.access import ANYWHERE
from latent_encoder.geometry import Size
from latent_encoder.outputs.files import (
    StagedFiles,
    open_output_folder,
    output_files,
    prepare_output_folder,
    safe_name,
    space_needed,
)
from latent_encoder.outputs.latent_files import latent_bytes
from latent_encoder.outputs.png import png_bytes
from models import FileFormat
from tests.helpers import PROJECT


@contextmanager
def staging(path: Path) -> Iterator[StagedFiles]:
    with open_output_folder(path, ANYWHERE) as folder, StagedFiles(folder) as staged:
        yield staged


@given(st.text(), st.integers(10, 255))
def test_safe_name_is_safe_and_short(text: str, limit: int) -> None:
    """A safe name has only letters, digits, dot, underscore and dash, within the limit."""
    safe = safe_name(text, limit)
    assert len(safe) <= limit
    assert all(character.isascii() and (character.isalnum() or character in "._-") for character in safe)


@given(st.text(), st.text())
def test_different_texts_keep_different_names(first: str, second: str) -> None:
    """A checksum distinguishes texts whose safe characters are equal."""
    assert (safe_name(first, 100) == safe_name(second, 100)) == (first == second)


@given(st.from_regex(r"[A-Za-z0-9._-]{1,50}", fullmatch=True))
def test_harmless_text_stays_as_it_is(text: str) -> None:
    """A usual stem or UUID stays recognisable."""
    assert safe_name(text, 100) == text


def test_names_are_those_of_the_contract(tmp_path: Path) -> None:
    """`latent_<stem>_<request_id>.pt`, `scaled_image_<stem>_<request_id>.png`, `<latent file name>.json`."""
    files = output_files(str(tmp_path), "/data/photo.final.jpg", "123_abc")
    assert files.latent == tmp_path / "latent_photo.final_123_abc.pt"
    assert files.scaled_image == tmp_path / "scaled_image_photo.final_123_abc.png"
    assert files.metadata == tmp_path / "latent_photo.final_123_abc.pt.json"


def test_changed_name_has_eight_digits_of_its_checksum(tmp_path: Path) -> None:
    """A name that file systems or shells cannot handle is made safe, and stays unique."""
    checksum = hashlib.sha256("写真 1".encode()).hexdigest()[:8]
    assert output_files(str(tmp_path), "写真 1.png", "a/../b").latent.name.startswith(f"latent____1-{checksum}_a_.._b-")


def test_longest_names_can_be_written(tmp_path: Path) -> None:
    """A stem and an id of any length give names that the file system takes."""
    files = output_files(str(tmp_path / "not" / "yet" / "there"), "s" * 5000 + ".png", "r" * 5000)
    prepare_output_folder(files.folder, ANYWHERE, 0)
    for path in (files.latent, files.scaled_image, files.metadata):
        path.touch()
        assert len(path.name) <= os.pathconf(tmp_path, "PC_NAME_MAX")


def test_relative_folder_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path starts at the working folder."""
    monkeypatch.chdir(tmp_path)
    for folder in ("./output", "output/there/..", f"/{tmp_path}/there/../output"):
        assert output_files(folder, "x.png", "1").latent == tmp_path / "output" / "latent_x_1.pt"


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


WRITER = """
import hashlib, json, sys
from pathlib import Path
from latent_encoder.access import ANYWHERE
from latent_encoder.outputs.files import StagedFiles, open_output_folder
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
