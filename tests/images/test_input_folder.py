"""The private folders from which LoadImage reads: their content, place and end."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from errors import EncodingFailed, SetupError
from latent_encoder.images.input_folder import MEMORY_FOLDER, PREFIX, InputFolders, PrivateFolder
from tests.helpers import PROJECT

# Makes a private folder in the folder that is named, puts an image into it, says where, and waits to be killed.
HOLDER = (
    "import sys, time; from pathlib import Path; from latent_encoder.images.input_folder import PrivateFolder\n"
    "folder = PrivateFolder(Path(sys.argv[1]))\n"
    "with folder.file(b'image', '.jpg') as path:\n"
    "    print(path, flush=True); sys.stdin.read()\n"
)


def start_holder(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    """Start a process that holds a private folder with an image; yield both."""
    command = [sys.executable, "-c", HOLDER, str(parent)]
    holder = subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    return holder, Path(holder.stdout.readline().strip())


def end(holder: subprocess.Popen[str], sent: signal.Signals | None = None) -> None:
    if sent is not None:
        holder.send_signal(sent)
    holder.communicate()


def private_folders(parent: Path) -> list[Path]:
    return sorted(parent.glob(f"{PREFIX}*"))


def test_file_has_the_bytes_and_nobody_else_can_read_it(tmp_path: Path) -> None:
    """Its folder has mode 0700; the file has the ending of its format and is gone afterwards."""
    folder = PrivateFolder(tmp_path)
    with folder.file(b"one", ".jpg") as first, folder.file(b"two", ".png") as second:
        assert (first.read_bytes(), second.read_bytes()) == (b"one", b"two")
        assert (first.suffix, second.suffix) == (".jpg", ".png")
        assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700
        assert first.parent.parent == tmp_path
    assert list(folder.path.iterdir()) == []
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_folder_goes_with_its_process(tmp_path: Path) -> None:
    """A process that ends by itself removes its folder."""
    holder, image = start_holder(tmp_path)
    assert image.read_bytes() == b"image"
    end(holder)
    assert holder.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_folder_goes_with_a_process_that_ends_at_once(tmp_path: Path) -> None:
    """A worker that is stopped while it encodes removes its folder too."""
    code = (
        "import sys, threading, time; from pathlib import Path; from latent_encoder.exits import end_at_once\n"
        "from latent_encoder.images.input_folder import *\n"
        "folder = PrivateFolder(Path(sys.argv[1]))\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "with folder.file(b'image', '.jpg') as path:\n"
        "    end_at_once(7 if path.exists() else 8)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=PROJECT, check=False)
    assert done.returncode == 7
    assert list(tmp_path.iterdir()) == []


def test_next_start_removes_what_a_killed_process_left_and_nothing_else(tmp_path: Path) -> None:
    """The folder of a process that is alive stays, and so does a folder that only looks like one."""
    killed, left = start_holder(tmp_path)
    end(killed, signal.SIGKILL)
    assert left.read_bytes() == b"image"
    alive, held = start_holder(tmp_path)
    assert not left.parent.exists()
    link, target = tmp_path / f"{PREFIX}link", tmp_path / "target"
    target.mkdir()
    (target / "precious").touch()
    link.symlink_to(target)
    other = tmp_path / f"{PREFIX}other"
    (other / "precious").mkdir(parents=True)
    (other / "precious.jpg").touch()
    folder = PrivateFolder(tmp_path)
    assert held.read_bytes() == b"image"
    assert (target / "precious").exists()
    assert len(list(other.iterdir())) == 2
    end(alive)
    folder.close()
    assert private_folders(tmp_path) == [link, other]


def test_forked_process_leaves_its_parents_folder(tmp_path: Path) -> None:
    """A child that ends must not take the folder of the service with it."""
    folder = PrivateFolder(tmp_path)
    if (child := os.fork()) == 0:
        folder.close()
        os._exit(0)
    os.waitpid(child, 0)
    with folder.file(b"still there", ".png") as path:
        assert path.read_bytes() == b"still there"
    folder.close()


def test_folder_that_was_cleared_away_is_made_anew(tmp_path: Path) -> None:
    """Systems clear their temporary folders while services run."""
    folder = PrivateFolder(tmp_path)
    folder.path.rmdir()
    with folder.file(b"again", ".png") as path:
        assert path.read_bytes() == b"again"
    folder.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.access(MEMORY_FOLDER, os.W_OK), reason=f"this system has no {MEMORY_FOLDER} that can be written")
def test_images_are_in_memory_where_the_system_has_such_a_folder() -> None:
    """Images do not reach a disk."""
    folders = InputFolders()
    with folders.file(b"image", ".jpg") as path:
        assert path.parent.parent == MEMORY_FOLDER
    folders.close()


def test_next_folder_is_taken_where_the_first_cannot_be_written(tmp_path: Path) -> None:
    """Without a folder in memory, the temporary folder is used."""
    folders = InputFolders([tmp_path / "missing", tmp_path])
    with folders.file(b"image", ".jpg") as path:
        assert path.parent.parent == tmp_path
    folders.close()


def test_start_ends_where_no_folder_can_be_written(tmp_path: Path) -> None:
    """The message names each folder with its fault, and the next step."""
    (tmp_path / "file").touch()
    with pytest.raises(SetupError) as caught:
        InputFolders([tmp_path / "missing", tmp_path / "file"])
    assert f"{tmp_path / 'missing'} (No such file or directory), {tmp_path / 'file'} (Not a directory)" in str(caught.value)
    assert "docker: --shm-size" in str(caught.value)


def test_image_without_room_fails_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit of 8192 bytes a file stands for a full disk; the next image finds room."""
    folders = InputFolders([tmp_path])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with (
            pytest.raises(EncodingFailed, match=r"image of 8193 bytes to ComfyUI: .* \(File too large\)"),
            folders.file(bytes(8193), ".png"),
        ):
            pass
        assert [list(folder.iterdir()) for folder in private_folders(tmp_path)] == [[]]
        with folders.file(bytes(8192), ".png") as path:
            assert path.stat().st_size == 8192
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folders.close()
