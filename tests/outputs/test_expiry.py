"""The sweep that removes expired output files: whole sets of ours, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from config import Settings
from errors import AccessDenied
from latent_encoder.access import ANYWHERE, AllowedFolders
from latent_encoder.outputs.expiry import JOURNAL, Removed, Sweep
from latent_encoder.outputs.folder import open_output_folder
from latent_encoder.outputs.holds import hold, renewed
from latent_encoder.outputs.locks import PREFIX, key_of, name_lock
from latent_encoder.outputs.names import OutputFiles
from models import SuccessResponse
from service import LatentEncoder
from tests.helpers import PROJECT, Encode, request_for

DAY_S = 86_400.0
TWO_DAYS_AGO = -2 * DAY_S


def sweep(folder: Path, allowed: AllowedFolders = ANYWHERE, most_sets: int = 1000) -> Removed:
    """Remove the sets of a folder that are older than a day."""
    run = Sweep(DAY_S, most_sets)
    run.run(folder, allowed)
    return run.removed


def age(metadata: str | Path, seconds: float = TWO_DAYS_AGO) -> None:
    """Let a metadata file be of another time: its last change, and the time that it states."""
    path, moment = Path(metadata), time.time() + seconds
    fields = json.loads(path.read_text())
    fields["timestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))
    path.write_text(json.dumps(fields))
    os.utime(path, (moment, moment))


def metadata_of(response: SuccessResponse) -> Path:
    return Path(f"{response.latent_file_path}.json")


def aged(response: SuccessResponse, seconds: float = TWO_DAYS_AGO) -> SuccessResponse:
    age(metadata_of(response), seconds)
    return response


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_whole_sets_are_removed_and_young_ones_stay(encode: Encode, tmp_path: Path) -> None:
    """All files of an expired set go, also in a folder below; those of a young one stay."""
    young = encode("photo.jpg", request_id="young")
    old, below = (aged(encode("photo.jpg", request_id=name)) for name in ("old", "older"))
    (tmp_path / "a" / "b").mkdir(parents=True)
    kept = names(tmp_path) - {path for path in names(tmp_path) if "_older." in path or "_old." in path}
    for path in tmp_path.glob("*_older.*"):
        path.rename(tmp_path / "a" / "b" / path.name)
    size = sum((tmp_path / name).stat().st_size for name in names(tmp_path) - kept)

    removed = sweep(tmp_path)
    assert (removed.sets, removed.files, removed.bytes, removed.failures) == (2, 6, size, 0)
    assert names(tmp_path) == kept
    assert Path(young.latent_file_path).exists()
    assert not Path(old.latent_file_path).exists()
    assert below is not None


def test_preview_and_roundtrip_go_with_their_set(encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> None:
    """Every file that the metadata state a checksum of is part of the set."""
    seeing = LatentEncoder(settings.model_copy(update={"preview": True, "roundtrip": True}), encoder.runtime)
    aged(seeing.encode(request_for(settings, tmp_path, "photo.jpg", {})))
    assert (sweep(tmp_path).files, names(tmp_path)) == (5, set())


def test_formats_of_a_latent_are_one_set(encode: Encode, tmp_path: Path) -> None:
    """The formats share the images, so all go together, when the youngest has expired."""
    formats = [encode("photo.jpg", latent_format=each) for each in ("pt", "safetensors", "comfy")]
    before = names(tmp_path)
    for response in formats[:2]:
        aged(response)
    assert (sweep(tmp_path).files, names(tmp_path)) == (0, before)
    aged(formats[2])
    assert (sweep(tmp_path).files, names(tmp_path)) == (7, set())


def test_files_of_others_stay(encode: Encode, tmp_path: Path) -> None:
    """A name of ours without our metadata, a changed file, and every other file stay, however old."""
    response = aged(encode("photo.jpg"))
    scaled = Path(response.scaled_image_path)
    scaled.write_bytes(b"retouched")
    foreign = {
        "notes.json": b"{}",
        "latent_mine_1.pt": b"mine",
        "latent_mine_1.pt.json": json.dumps({"latent_shape": [1, 16, 2, 2]}).encode(),
        "latent_list.pt.json": b"[]",
        "latent_broken.pt.json": b"{",
        "scaled_image_mine_1.png": b"mine",
        "preview_photo_test.png": b"of this name, and in no metadata",
        ".latent-encoder-0123456789abcdef.expired": b"no journal",
    }
    for name, content in foreign.items():
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, (0, 0))
    assert (sweep(tmp_path).sets, names(tmp_path)) == (1, {*foreign, scaled.name})


@pytest.mark.parametrize("changed", ["mtime", "timestamp"])
def test_times_in_the_future_keep_a_set(changed: str, encode: Encode, tmp_path: Path) -> None:
    """The later one of the file's last change and the stated time counts, so a wrong clock removes nothing early."""
    response = encode("photo.jpg")
    age(metadata_of(response), 400 * DAY_S)
    if changed == "timestamp":
        os.utime(metadata_of(response), (0, 0))
    else:
        future = metadata_of(response).stat().st_mtime
        age(metadata_of(response))
        os.utime(metadata_of(response), (future, future))
    before = names(tmp_path)
    assert (sweep(tmp_path).sets, names(tmp_path)) == (0, before)


def test_clock_that_is_ahead_of_the_file_systems(encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose clock is a year ahead removes nothing that is young by the clock of the file system."""
    encode("photo.jpg")
    before, now = names(tmp_path), time.time()
    monkeypatch.setattr(time, "time", lambda: now + 365 * DAY_S)
    assert (sweep(tmp_path).sets, names(tmp_path)) == (0, before)


def test_symlinks_are_not_followed(encode: Encode, tmp_path: Path) -> None:
    """A folder behind a symlink keeps its files, and so does a file behind one; the swept folder may be a symlink itself."""
    aged(encode("photo.jpg", request_id="elsewhere", output_dir=str(tmp_path / "elsewhere")))
    real = aged(encode("photo.jpg", request_id="real", output_dir=str(tmp_path / "real")))
    (tmp_path / "real" / "link").symlink_to(tmp_path / "elsewhere")
    latent = Path(real.latent_file_path)
    latent.rename(tmp_path / "moved.pt")
    latent.symlink_to(tmp_path / "moved.pt")
    (tmp_path / "output").symlink_to(tmp_path / "real")
    before = names(tmp_path / "elsewhere")

    assert sweep(tmp_path / "output").files == 2
    assert names(tmp_path / "elsewhere") == before
    assert (tmp_path / "moved.pt").exists()
    assert latent.is_symlink()


def test_metadata_behind_a_symlink_stay(encode: Encode, tmp_path: Path) -> None:
    """A metadata file that is a symlink does not identify a set."""
    metadata = metadata_of(aged(encode("photo.jpg")))
    metadata.rename(tmp_path / "real.json")
    metadata.symlink_to(tmp_path / "real.json")
    before = names(tmp_path)
    assert (sweep(tmp_path).sets, names(tmp_path)) == (0, before)


def test_snapshots_and_other_hidden_folders_stay(encode: Encode, tmp_path: Path) -> None:
    """A folder whose name begins with a dot is not looked into."""
    aged(encode("photo.jpg", output_dir=str(tmp_path / ".snapshot")))
    assert sweep(tmp_path).sets == 0
    assert len(names(tmp_path)) == 3


def test_folder_outside_of_the_allowed_ones(encode: Encode, tmp_path: Path) -> None:
    """A folder that ALLOWED_OUTPUT_DIRS leaves out is not swept."""
    aged(encode("photo.jpg"))
    with pytest.raises(AccessDenied):
        sweep(tmp_path, AllowedFolders("ALLOWED_OUTPUT_DIRS", (tmp_path / "other",)))
    assert len(names(tmp_path)) == 3


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    """A folder that no request has made yet has nothing to remove, and is not made."""
    assert sweep(tmp_path / "none").sets == 0
    assert not (tmp_path / "none").exists()


def test_count_of_sets_is_limited(encode: Encode, tmp_path: Path) -> None:
    """A sweep ends after as many sets as it may remove; the next one goes on."""
    for number in range(3):
        aged(encode("photo.jpg", request_id=str(number)))
    assert [sweep(tmp_path, most_sets=2).sets for _ in range(3)] == [2, 1, 0]


def test_set_that_is_being_written_stays(encode: Encode, tmp_path: Path) -> None:
    """While another process holds the lock of the name, the set stays and nobody waits."""
    response = aged(encode("photo.jpg"))
    with open_output_folder(tmp_path, ANYWHERE) as folder, name_lock(folder, Path(response.scaled_image_path).name):
        removed = sweep(tmp_path)
        assert (removed.sets, removed.failures) == (0, 0)
    assert sweep(tmp_path).sets == 1


HOLDER = """
import fcntl, sys
with open(sys.argv[1], "rb") as file:
    fcntl.flock(file, fcntl.LOCK_SH)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_reader_keeps_a_set(encode: Encode, tmp_path: Path) -> None:
    """A set stays while any program has a shared lock on its metadata file, and goes after that program was killed."""
    response = aged(encode("photo.jpg"))
    command = [sys.executable, "-c", HOLDER, str(metadata_of(response))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"held\n"
        assert sweep(tmp_path).sets == 0
        reader.kill()
    assert sweep(tmp_path).sets == 1


def test_held_response_keeps_its_files(encode: Encode, tmp_path: Path) -> None:
    """The files of a response that waits for its acknowledgement stay until it is there."""
    response = aged(encode("photo.jpg"))
    held = hold(response, ANYWHERE)
    assert held is not None
    with held:
        assert sweep(tmp_path).sets == 0
    assert sweep(tmp_path).sets == 1
    assert hold(response, ANYWHERE) is None


def test_stored_response_makes_its_files_young(encode: Encode) -> None:
    """Files whose response is given again are kept for the whole time from then on; files that are gone are reported."""
    response = encode("photo.jpg")
    files = OutputFiles.of(Path(response.latent_file_path))
    os.utime(files.metadata, (0, 0))
    assert renewed(files, response.metadata, ANYWHERE)
    assert files.metadata.stat().st_mtime > time.time() - 60
    assert not renewed(files, response.metadata.model_copy(update={"fingerprint": "other"}), ANYWHERE)
    files.metadata.unlink()
    assert not renewed(files, response.metadata, ANYWHERE)


def test_removed_files_are_encoded_anew(encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> None:
    """A request whose stored response has expired is encoded like a new one, to the same bytes."""
    request = request_for(settings, tmp_path, "photo.jpg", {})
    first = encoder.encode(request)
    aged(first)
    sweep(tmp_path)
    assert encoder.stored_response(request) is None
    assert encoder.encode(request).metadata.latent_sha256 == first.metadata.latent_sha256


KILLED = """
import os, signal, sys
from pathlib import Path
from latent_encoder.access import ANYWHERE
from latent_encoder.outputs.expiry import Sweep
from latent_encoder.outputs.folder import OutputFolder
OutputFolder.flush = lambda self: os.kill(os.getpid(), signal.SIGKILL)
Sweep(86400.0, 10).run(Path(sys.argv[1]), ANYWHERE)
"""


def kill_in_the_middle(folder: Path) -> None:
    """Sweep in a process that is killed when the metadata are gone and the other files are not."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], cwd=PROJECT, check=False)
    assert done.returncode == -signal.SIGKILL


def test_removal_that_was_killed_is_ended(encode: Encode, tmp_path: Path) -> None:
    """After a kill between metadata and files, the next sweep removes the rest."""
    response = aged(encode("photo.jpg"))
    kill_in_the_middle(tmp_path)
    assert not metadata_of(response).exists()
    assert Path(response.latent_file_path).exists()
    removed = sweep(tmp_path)
    assert (removed.files, names(tmp_path)) == (2, set())


def test_removal_that_was_killed_spares_new_files(encode: Encode, tmp_path: Path) -> None:
    """If the request came again after the kill, the next sweep removes only the journal."""
    aged(encode("photo.jpg"))
    kill_in_the_middle(tmp_path)
    again = encode("photo.jpg")
    assert sweep(tmp_path).files == 0
    assert names(tmp_path) == {Path(again.latent_file_path).name, Path(again.scaled_image_path).name, metadata_of(again).name}


@pytest.mark.parametrize("latent", ["../latent_a.pt", "latent_a/../../b.pt", "other.pt"])
def test_journal_of_somebody_else(latent: str, tmp_path: Path) -> None:
    """A journal removes no file that is not in the set that its name stands for."""
    folder = tmp_path / "output"
    folder.mkdir()
    (tmp_path / "latent_a.pt").write_bytes(b"")
    files = OutputFiles.of(folder / latent)
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    journal = {"latent": latent, "sha256": {"../latent_a.pt": [empty]}}
    (folder / f"{PREFIX}{key_of(files.shared_name)}{JOURNAL}").write_text(json.dumps(journal))
    assert sweep(folder).files == 0
    assert (tmp_path / "latent_a.pt").exists()


def test_many_sweeps_at_once(encode: Encode, tmp_path: Path) -> None:
    """Each set is removed and counted once, and none fails."""
    encode("photo.jpg", request_id="0")
    for number in range(1, 20):
        for path in tmp_path.glob("*_0.*"):
            shutil.copy(path, tmp_path / path.name.replace("_0.", f"_{number}."))
    for path in tmp_path.glob("*.json"):
        age(path)
    found: list[Removed] = []
    threads = [threading.Thread(target=lambda: found.append(sweep(tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.append(sweep(tmp_path))  # a set whose lock a neighbour held is left to the next sweep
    assert (sum(each.sets for each in found), sum(each.failures for each in found)) == (20, 0)
    assert names(tmp_path) == set()


def test_folder_that_cannot_be_written(encode: Encode, tmp_path: Path) -> None:
    """A set that cannot be removed is counted with the reason, and the others are removed."""
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    aged(encode("photo.jpg", output_dir=str(tmp_path / "read-only")))
    aged(encode("photo.jpg", output_dir=str(tmp_path / "writable")))
    (tmp_path / "read-only").chmod(0o500)
    removed = sweep(tmp_path)
    (tmp_path / "read-only").chmod(0o700)
    assert (removed.sets, removed.failures) == (1, 1)
    assert "Permission denied" in str(removed.reason)
