"""Workers that die or freeze at any moment: nothing is lost, and in transactions nothing is doubled."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from config import Settings
from models import Metadata
from service import LatentEncoder
from tests.helpers import IMAGES, PROJECT, load_latent
from tests.kafka_tools import MakeBench, both_protocols, quick_failover, read_responses, request_ids, wait_until

REQUESTS = 200
KILLS = 5

pytestmark = pytest.mark.usefixtures("apache_kafka")


def assert_whole(folder: Path) -> None:
    """Assert that every file under a final name is complete, and belongs to the other files of its request."""
    metadata_files = list(folder.glob("*.pt.json"))
    assert metadata_files
    for file in metadata_files:
        metadata = Metadata.model_validate_json(file.read_bytes())
        latent = file.with_suffix("")
        assert list(load_latent(latent).shape) == list(metadata.latent_shape)
    assert {file.with_suffix("") for file in metadata_files} == set(folder.glob("*.pt"))


@both_protocols
@pytest.mark.parametrize("transactional", [False, True], ids=["at-least-once", "exactly-once"])
def test_killed_worker_loses_nothing(make_bench: MakeBench, transactional: bool, protocol: str) -> None:
    """After five `kill -9` among 200 requests each has a response, with transactions exactly one, and no file is partial."""
    bench = make_bench(partitions=4)
    for n in range(REQUESTS):
        bench.send({"request_id": f"r{n}"})
    expected = {f"r{n}" for n in range(REQUESTS)}
    responses = bench.responses
    environment = quick_failover(bench.folder, protocol) | ({"KAFKA_TRANSACTIONAL_ID": bench.group} if transactional else {})

    seed = os.environ.get("CRASH_TEST_SEED") or str(random.SystemRandom().getrandbits(32))  # other moments in each run
    print(f"To kill at the same moments again: CRASH_TEST_SEED={seed}")  # pytest shows it if the test fails
    moments = random.Random(seed)  # noqa: S311  # nothing secret depends on it
    for answered in sorted(moments.sample(range(2, REQUESTS - 10), KILLS)):
        with bench.process(**environment):
            responses.read(lambda _, answered=answered: len(request_ids(responses)) >= answered)  # type: ignore[misc]
            time.sleep(moments.uniform(0, 0.2))
    with bench.process(**environment) as last:
        responses.read(lambda _: request_ids(responses).keys() >= expected)
        wait_until(lambda: sum(bench.committed().values()) >= REQUESTS, "all offsets")
        last.signal(signal.SIGTERM)
        assert last.end() == 0
        responses.all_within(1)

    counts = request_ids(responses)
    print(f"{sum(counts.values())} responses to {REQUESTS} requests, {KILLS} kills")
    assert counts.keys() == expected
    if transactional:
        assert set(counts.values()) == {1}
    assert_whole(bench.folder / "output")
    assert bench.dead_letters.all_within(0.5) == []


@both_protocols
@pytest.mark.parametrize("transactional", [False, True], ids=["at-least-once", "exactly-once"])
def test_zombie_answers_nothing(
    make_bench: MakeBench, encoder: LatentEncoder, settings: Settings, transactional: bool, protocol: str
) -> None:
    """A worker that wakes up after the group gave its partition away sends nothing, and takes further requests.

    In transactions its response may have been on its way already: the broker refuses it.
    """
    bench = make_bench()
    responses = bench.responses
    environment = quick_failover(bench.folder, protocol)
    ids = [f"{bench.group}-{n}" if transactional else "" for n in (1, 2)]
    bench.send({"request_id": "r"})
    gate = bench.gate()
    with bench.held_process(gate, **environment, KAFKA_TRANSACTIONAL_ID=ids[0]) as zombie:
        gate.wait()
        zombie.signal(signal.SIGSTOP)
        second = bench.settings(settings, kafka_transactional_id=ids[1] or None, kafka_group_protocol=protocol)
        with bench.worker(encoder, second):
            assert read_responses(responses, 1)[0]["request_id"] == "r"
            bench.wait_for_commit({0: 1})
            gate.open()
            zombie.signal(signal.SIGCONT)
            zombie.wait_for("partitions lost")
            responses.all_within(4)
            assert request_ids(responses) == {"r": 1}
            assert bench.committed() == {0: 1}
        bench.send({"request_id": "next"})
        responses.take(2)
        bench.wait_for_commit({0: 2})
        zombie.wait_for("request answered")


def test_zombie_replaces_no_file_of_the_response(make_bench: MakeBench, encoder: LatentEncoder, settings: Settings) -> None:
    """A worker that wakes up with its files ready to be written leaves those that the response names, of another image."""
    bench = make_bench()
    image = bench.folder / "image.jpg"
    shutil.copy(IMAGES / "photo.jpg", image)
    bench.send({"request_id": "r", "image_path": str(image)})
    gate = bench.gate("write")
    with bench.held_process(gate, **quick_failover(bench.folder)) as zombie:
        gate.wait()
        zombie.signal(signal.SIGSTOP)
        shutil.copy(IMAGES / "grey.png", image)
        with bench.worker(encoder, bench.settings(settings)):
            (response,) = read_responses(bench.responses, 1)
            bench.wait_for_commit({0: 1})
            gate.open()
            zombie.signal(signal.SIGCONT)
            gate.wait_for_end()
    assert response["metadata"]["image_sha256"] == sha256(image)
    assert response["metadata"]["latent_sha256"] == sha256(Path(response["latent_file_path"]))
    assert response["metadata"]["scaled_image_sha256"] == sha256(Path(response["scaled_image_path"]))
    assert_whole(bench.folder / "output")


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_start_removes_the_temporary_files_of_a_killed_worker(make_bench: MakeBench) -> None:
    """A worker that starts removes them from OUTPUT_DIR, before it has a request."""
    bench = make_bench()
    output = bench.folder / "output"
    output.mkdir()
    writing = "from tests.outputs.test_locks import HOLDER; exec(HOLDER)"
    with subprocess.Popen(
        [sys.executable, "-c", writing, output], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as killed:
        assert killed.stdout is not None
        killed.stdout.readline()
        killed.kill()
    assert len(list(output.iterdir())) == 2
    with bench.process(WARMUP="false") as worker:
        worker.wait_for("removed the temporary files of a process that was killed")
        assert list(output.iterdir()) == []
