"""The processes that judge images: time, memory, crashes, ends of either side, and several images at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from random import Random

import psutil
import pytest
from PIL import Image

from config import Settings
from errors import EncodingFailed, ErrorCode
from fuzz import jpegs
from latent_encoder.images import judging
from latent_encoder.images.faults import ImageDamage, ImageFault
from latent_encoder.images.judging import MOST_PROCESSES, Judges
from models import ErrorResponse
from service import LatentEncoder
from tests.helpers import IMAGES, PATIENCE_S, PROJECT, request_for
from tests.kafka_tools import wait_until

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system has no /proc to look at a process")

MAX_PIXELS = 89_478_485
LONG_S = PATIENCE_S
PHOTO = (IMAGES / "photo.jpg").read_bytes()


@pytest.fixture
def judges() -> Iterator[Judges]:
    made = Judges()
    yield made
    made.close()


def judge(judges: Judges, data: bytes, seconds: float = LONG_S) -> ImageDamage | None:
    """Return the damage of an image, None if it is whole."""
    try:
        judges.judge(data, MAX_PIXELS, seconds)
    except ImageDamage as damage:
        return damage
    return None


def process_of(judges: Judges) -> psutil.Process:
    """Return the process that the next image gets. It has judged one."""
    assert judge(judges, PHOTO) is None
    (idle,) = judges._idle
    return psutil.Process(idle.pid)


def test_process_is_used_again(judges: Judges) -> None:
    """Image after image goes to one process, also after damaged and hostile ones."""
    process = process_of(judges)
    assert judge(judges, PHOTO[:-2]) is not None
    with pytest.raises(ImageFault, match="scans"):
        judge(judges, jpegs.flat(64, 64, 101))
    assert process_of(judges) == process


def test_image_that_takes_too_long_is_refused(judges: Judges) -> None:
    """The process is killed at the time-out, leaves no zombie, and the next image gets a new one."""
    process = process_of(judges)
    process.suspend()  # as a decoder that never ends
    started = time.monotonic()
    with pytest.raises(ImageFault, match=r"takes longer to check than IMAGE_TIMEOUT_S=0\.5 s; make it smaller"):
        judge(judges, PHOTO, 0.5)
    assert time.monotonic() - started < PATIENCE_S / 10
    assert not psutil.pid_exists(process.pid)
    assert process_of(judges) != process


def test_time_is_limited_in_a_decoder(judges: Judges) -> None:
    """A JPEG whose scans take a second is stopped in the middle of its decode."""
    with pytest.raises(ImageFault, match="takes longer to check"):
        judge(judges, jpegs.flat(9000, 9000, 64), 0.1)


def test_time_out_is_an_error_response(encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> None:
    """IMAGE_TIMEOUT_S gives IMAGE_INVALID with the setting and the path."""
    path = tmp_path / "slow.jpg"
    path.write_bytes(jpegs.flat(9000, 9000, 64))
    limited = LatentEncoder(settings.model_copy(update={"image_timeout_s": 0.1}), encoder.runtime)
    response = limited.respond(request_for(settings, tmp_path, path, {}))
    assert isinstance(response, ErrorResponse)
    assert response.error_code == ErrorCode.IMAGE_INVALID
    assert "IMAGE_TIMEOUT_S=0.1 s" in response.error_message
    assert str(path) in response.error_message


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_crash_of_the_decoder_refuses_the_image(number: signal.Signals, judges: Judges) -> None:
    """A segmentation fault during a judgement is the image's fault, and only the process apart ends."""
    process = process_of(judges)
    process.suspend()
    (idle,) = judges._idle
    idle._socket.settimeout(None)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(judge, judges, PHOTO)
        wait_until(lambda: idle._socket.gettimeout() is not None, "the process is asked")
        process.send_signal(number)
        process.resume()
        with pytest.raises(ImageFault, match=rf"crashes the decoder \({number.name}\)"):
            waiting.result(PATIENCE_S)
    assert process_of(judges) != process


def test_killed_process_is_replaced(judges: Judges) -> None:
    """If somebody kills the process, idle or in a judgement, the image is judged by another one."""
    process = process_of(judges)
    process.kill()
    process.wait()
    process = process_of(judges)
    process.suspend()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(judge, judges, PHOTO)
        wait_until(lambda: not judges._idle, "the process has the image")
        process.kill()
        assert waiting.result(PATIENCE_S) is None


PNG = (IMAGES / "grey.png").read_bytes()
TAKEN_OVER = """
import socket, sys
from latent_encoder.images.judge import QUESTION, READY, Question, Verdict, received
connection = socket.socket(fileno=0)
connection.sendall(READY)
question = Question.unpacked(received(connection, QUESTION.size))
data = received(connection, question.size)
connection.sendall({response})
received(connection, 1)
"""
NONSENSE = {
    "another header": "Verdict('whole').packed(len(data)) + b'%!PS' + data[4:]",
    "a copy without end": "Verdict('whole').packed(1 << 62)",
    "a verdict without end": "bytes([255]) * 12",
    "an unknown verdict": "(2).to_bytes(4) + bytes(8) + b'[]'",
}


@pytest.mark.parametrize("response", NONSENSE)
def test_process_that_an_image_has_taken_over_is_ended(
    response: str, judges: Judges, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A response that no judgement gives refuses the image. LoadImage gets no copy with another header."""
    (tmp_path / "taken_over.py").write_text(TAKEN_OVER.format(response=NONSENSE[response]))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(judging, "MODULE", "taken_over")
        judges.start()
    (process,) = (psutil.Process(idle.pid) for idle in judges._idle)
    with pytest.raises(ImageFault, match="makes the decoder respond with nonsense"):
        judge(judges, PNG)
    assert not psutil.pid_exists(process.pid)
    assert judge(judges, PNG) is None


def test_copy_that_does_not_come_refuses_the_image(judges: Judges, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that stops in the middle of its copy is ended."""
    (tmp_path / "taken_over.py").write_text(TAKEN_OVER.format(response="Verdict('whole').packed(100) + data[:50]"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(judging, "MODULE", "taken_over")
    monkeypatch.setattr(judging, "COPY_S", 0.2)
    with pytest.raises(ImageFault, match="takes longer to check"):
        judge(judges, PNG)
    assert not judges._idle


def test_copies_of_large_images_come_whole(judges: Judges) -> None:
    """Many at a time, each larger than a socket holds, and of its own image."""
    files = []
    for number in range(4):
        file = BytesIO()
        pixels = bytes(Random(number).choices(range(16), k=800 * 500 * 3))  # noqa: S311  # the same each time
        Image.frombytes("RGB", (800, 500), pixels).save(file, "PNG")
        files.append(file.getvalue())
    with ThreadPoolExecutor(8) as pool:
        copies = list(pool.map(lambda data: judges.judge(data, MAX_PIXELS, LONG_S), files * 4))
    for data, copy in zip(files * 4, copies, strict=True):
        assert len(copy) > 1_000_000
        with Image.open(BytesIO(data)) as expected, Image.open(BytesIO(copy)) as found:
            assert found.tobytes() == expected.tobytes()


def test_installation_that_cannot_judge_is_no_fault_of_the_image(judges: Judges, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends at its start gives an error that may be retried, with the command that shows the reason."""
    monkeypatch.setattr(judging, "MODULE", "latent_encoder.images.no_such_module")
    with pytest.raises(EncodingFailed, match=r"Cannot judge images, twice: .* ended with status 1; `cd .* shows why"):
        judge(judges, PHOTO)


def test_signals_for_the_parent_do_not_end_the_process(judges: Judges) -> None:
    """Ctrl-C and a stop of the whole container are the parent's affair: it finishes its requests."""
    process = process_of(judges)
    assert os.getsid(process.pid) != os.getsid(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
    assert process_of(judges) == process


def test_process_has_no_files_secrets_or_torch(judges: Judges, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has three descriptors, few variables, a limited address space, and neither torch nor Pillow for a JPEG."""
    monkeypatch.setenv("KAFKA_SASL_PASSWORD", "a secret")
    with (IMAGES / "photo.jpg").open("rb") as file:
        os.set_inheritable(file.fileno(), True)
        process = process_of(judges)
    assert process.num_fds() == 3
    assert not {name for name in process.environ() if name.startswith("KAFKA_")}
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "_imaging" not in maps
    soft, _ = process.rlimit(psutil.RLIMIT_AS)
    assert 16 * MAX_PIXELS < soft < 16 * MAX_PIXELS + 1024**3


STARTS = f"""
import pathlib, sys, time
from latent_encoder.images.judging import JUDGES
JUDGES.judge(pathlib.Path({str(IMAGES / "photo.jpg")!r}).read_bytes(), 10**8, 60)
print(JUDGES._idle[0].pid, flush=True)
if "--end" not in sys.argv:
    time.sleep({PATIENCE_S})
"""


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_process_ends_with_its_parent(how: str) -> None:
    """It is gone after its parent ended, also if SIGKILL let the parent do nothing about it. There is no output."""
    arguments = [sys.executable, "-W", "error", "-c", STARTS, *(["--end"] if how == "ended" else [])]
    with subprocess.Popen(arguments, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stderr is not None
        judge = int(parent.stdout.readline())
        if how == "killed":
            parent.kill()
        parent.wait(PATIENCE_S)
        wait_until(lambda: not is_running(judge), "the end of the process")
        assert parent.stderr.read() == ""


def is_running(pid: int) -> bool:
    """Return whether a process runs; a zombie of another parent does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_images_are_judged_side_by_side(judges: Judges) -> None:
    """Each of many threads gets the verdict on its own image, from a bounded number of processes."""
    images = [PHOTO, PHOTO[:-2], jpegs.flat(64, 64, 101)] * 8
    with ThreadPoolExecutor(len(images)) as pool:
        verdicts = list(pool.map(lambda data: verdict_of(judges, data), images))
    assert verdicts == ["whole", "damaged", "refused"] * 8
    assert 1 <= len(judges._idle) <= MOST_PROCESSES


def verdict_of(judges: Judges, data: bytes) -> str:
    try:
        return "whole" if judge(judges, data) is None else "damaged"
    except ImageFault:
        return "refused"


def test_forked_process_has_its_own(judges: Judges) -> None:
    """A process that was forked does not talk to its parent's process, and starts its own."""
    script = (
        "import os, pathlib\n"
        "from latent_encoder.images.judging import JUDGES\n"
        f"data = pathlib.Path({str(IMAGES / 'photo.jpg')!r}).read_bytes()\n"
        "JUDGES.judge(data, 10**8, 60)\n"
        "mine = JUDGES._idle[0].pid\n"
        "child = os.fork()\n"
        "assert JUDGES.judge(data, 10**8, 60) == data\n"
        "assert (JUDGES._idle[0].pid == mine) == bool(child)\n"
        "assert not child or os.waitpid(child, 0)[1] == 0\n"
    )
    del judges
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
