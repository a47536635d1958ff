"""`scripts/kafka_demo.py` as its users run it: with a broker, workers and kills of its own, all gone at the end."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.broker import ApacheKafka, choose_local
from tests.helpers import PATIENCE_S, PROJECT, clean_environment
from tests.kafka_tools import wait_until

apache_kafka = pytest.mark.skipif(choose_local() is not ApacheKafka, reason="Java 17 and Maven are not here")


@contextmanager
def demo(folder: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run the demo with its temporary folder in `folder`, and with settings that it must not use."""
    folder.mkdir()
    command = [sys.executable, "-u", PROJECT / "scripts" / "kafka_demo.py", *arguments]
    variables = {
        "TMPDIR": str(folder),
        "KAFKA_BOOTSTRAP_SERVERS": "not-this.invalid:9092",
        "MEGAPIXELS": "1e9",
        **environment,
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=clean_environment() | variables, text=True, cwd=folder.parent, **pipes) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


def processes_in(folder: Path) -> list[str]:
    """Return the processes that work in a folder, or that it is named to."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        command, working = " ".join(process.info["cmdline"] or ()), process.info["cwd"] or ""
        if str(folder) in command or working.startswith(str(folder)):
            found.append(command)
    return found


def read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    """Return the lines up to the one with that text."""
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"no {text!r} in {lines}")


@apache_kafka
def test_no_request_is_lost_and_nothing_is_left(tmp_path: Path) -> None:
    """With a worker killed halfway, each request has its response and each file its checksum; the demo leaves nothing."""
    with demo(tmp_path / "t", "--requests", "6") as process:
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, stderr) == (0, ""), stdout
    for part in (
        r"worker 1 +killed with SIGKILL; [1-5] of 6 requests have no response yet",
        r"worker 2 +is ready",
        r"result +6 of 6 requests have a response by their request_id, 6 of them a latent",
        r"result +duplicates: \d+.*; dead letters: 0",
        r"result +12 of 12 files match their checksums",
        r"clean-up +no process and no file is left",
    ):
        assert re.search(part, stdout), f"{part} is not in:\n{stdout}"
    assert {int(number) for number in re.findall(r" (\d)/6 ", stdout)} == set(range(1, 7))
    assert max(map(len, stdout.splitlines())) <= 127
    assert (processes_in(tmp_path / "t"), list((tmp_path / "t").iterdir())) == ([], [])


@apache_kafka
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_demo_leaves_nothing(number: signal.Signals, status: int, tmp_path: Path) -> None:
    """After Ctrl-C or SIGTERM while a worker starts, broker, worker and files are gone."""
    with demo(tmp_path / "t") as process:
        read_until(process, "worker 1  starts")
        assert processes_in(tmp_path / "t")
        process.send_signal(number)
        _, stderr = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, stderr) == (status, "Error: Interrupted.\n")
    assert (processes_in(tmp_path / "t"), list((tmp_path / "t").iterdir())) == ([], [])


@apache_kafka
def test_killed_demo_leaves_no_process(tmp_path: Path) -> None:
    """Broker and worker end with the demo, even if it is killed."""
    with demo(tmp_path / "t") as process:
        read_until(process, "worker 1  starts")
        process.kill()
        process.communicate()
    wait_until(lambda: not processes_in(tmp_path / "t"), "the end of broker and worker")


@apache_kafka
def test_worker_that_cannot_run(tmp_path: Path) -> None:
    """The end of a worker's log is shown; with --keep the files stay, and no process."""
    with demo(tmp_path / "t", "--keep", COMFYUI_PATH=str(tmp_path / "none")) as process:
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3
    assert stderr.startswith("Error: worker 1 has ended with status ")
    assert str(tmp_path / "none") in stderr
    (kept,) = (tmp_path / "t").iterdir()
    assert f"the files are in {kept}" in stdout
    assert (kept / "worker-1.log").is_file()
    assert processes_in(tmp_path / "t") == []


def test_machine_without_java(tmp_path: Path) -> None:
    """Without Java and Maven, one line has the next step."""
    with demo(tmp_path / "t", PATH=str(tmp_path)) as process:
        _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3
    assert re.fullmatch(r"Error: Apache Kafka needs Java 17 or newer and Maven.* Install them .*\n", stderr)
    assert list((tmp_path / "t").iterdir()) == []


def test_more_kills_than_responses(tmp_path: Path) -> None:
    """A worker is killed between two responses, so as many kills as requests are wrong usage."""
    with demo(tmp_path / "t", "--requests", "2", "--kills", "2") as process:
        _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert "--kills must be less than --requests" in stderr
