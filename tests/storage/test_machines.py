"""Workers on machines with file systems of their own, which share a topic and a bucket, and are killed at random."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from obstore.store import S3Store

from latent_encoder.outputs import leftovers
from models import EncodeRequest, Metadata
from service import LatentEncoder
from tests.helpers import COMFYUI, PATIENCE_S, PROJECT, VAE
from tests.kafka_tools import Bench, MakeBench, Process, quick_failover, request_ids, wait_until
from tests.storage.conftest import Bucket
from tests.storage.faulty_proxy import Call, FaultyProxy
from tests.storage.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

REQUESTS = 24
KILLED_AFTER = [".pt", ".pt", ".png", ".lock"]
"""The ending of the object after whose write a worker is killed, for each kill. Three are between the writes of an image."""
FEWEST_HITS = 2
"""Kills that must come between the writes of an image: they leave its files without metadata."""
LATENCY_S = 0.1
"""Added to each call, so that the writes of an image take half a second."""
FILES = ("latent", "scaled_image", "preview")


@dataclass
class Machine:
    """A worker with a file system of its own: no path that it gets leads to the other's."""

    bench: Bench
    network: FaultyProxy
    environment: dict[str, str]
    worker: Process

    @property
    def folder(self) -> Path:
        return self.bench.folder

    def written(self, ending: str) -> list[Call]:
        """Return the writes so far of objects whose names end so."""
        return self._puts(ending, 200)

    def lost(self, ending: str) -> list[Call]:
        """Return those to which the worker got no response."""
        return self._puts(ending, 0)

    def _puts(self, ending: str, status: int) -> list[Call]:
        calls = [call for call in self.network.calls if call.method == "PUT" and call.status == status]
        return [call for call in calls if call.path.endswith(ending)]

    def assert_alone(self, other: Machine) -> None:
        """Assert that no path that the worker gets, and no file that it has open, is of the other machine."""
        place = Path("/proc", str(self.worker.popen.pid))
        given = (place / "environ").read_bytes() + (place / "cmdline").read_bytes()
        opened = [str(path.readlink()) for path in (place / "cwd", *(place / "fd").iterdir()) if path.is_symlink()]
        assert str(other.folder).encode() not in given
        assert not [path for path in opened if path.startswith(str(other.folder))]
        assert opened[0] == str(self.folder)


@contextmanager
def machine(bench: Bench, bucket: Bucket, number: int) -> Iterator[Machine]:
    """Run a worker with its own working folder, HOME, TMPDIR, ComfyUI, models, client properties and way to the bucket."""
    own = copy(bench)
    own.folder = bench.folder / f"machine-{number}"
    for name in ("home", "tmp", "models"):
        (own.folder / name).mkdir(parents=True)
    shutil.copy(PROJECT / "tiny_vae" / VAE, own.folder / "models" / "own.safetensors")
    (own.folder / "comfyui").symlink_to(COMFYUI)
    with FaultyProxy(bucket.proxy.port) as network, ExitStack() as running:
        network.latency_s = LATENCY_S
        environment = {
            **quick_failover(own.folder),
            **bucket.environment,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{network.port}",
            "HOME": str(own.folder / "home"),
            "TMPDIR": str(own.folder / "tmp"),
            "COMFYUI_PATH": str(own.folder / "comfyui"),
            "MODEL_DIR": str(own.folder / "models"),
            "VAE_MODEL_NAME": "own.safetensors",
            "OUTPUT_DIR": str(own.folder / "output"),
            "ALLOWED_INPUT_URLS": f"{bucket.url}/in",
            "ALLOWED_OUTPUT_URLS": f"{bucket.url}/out",
            "PREVIEW": "true",
            "KAFKA_PREFETCH": "8",
            "KAFKA_MAX_CRASHES": str(len(KILLED_AFTER)),
        }
        yield Machine(own, network, environment, running.enter_context(own.quick_process(**environment)))


class Reader:
    """A program that reads the bucket all the time, and trusts each metadata file that it sees."""

    def __init__(self, server: S3Server, bucket: Bucket) -> None:
        self._store = S3Store(
            bucket.name,
            endpoint=f"http://127.0.0.1:{server.port}",
            access_key_id=ACCESS_KEY,
            secret_access_key=SECRET_KEY,
            region="us-east-1",
            client_options={"allow_http": True},
        )
        self._seen: set[tuple[str, str | None]] = set()
        self.faults: list[str] = []
        self.checked = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(PATIENCE_S)

    def _run(self) -> None:
        while not self._ended.wait(0.05):
            try:
                self.look(again=False)
            except Exception as exc:
                self.faults.append(repr(exc))
                return

    def look(self, *, again: bool) -> None:
        """Check the files of each metadata file, those that were checked before only if `again`."""
        for page in self._store.list("out"):
            for found in page:
                version = (found["path"], found["e_tag"])
                if found["path"].endswith(".json") and (again or version not in self._seen):
                    self._seen.add(version)
                    self._check(found["path"])

    def _check(self, name: str) -> None:
        try:
            first = self._store.get(name)
            described = Metadata.model_validate_json(bytes(first.bytes()))
            wrong = [file for file, stated in _stated(name, described).items() if self._checksum(file) != stated]
            self.checked += 1
            if wrong and self._store.head(name)["e_tag"] == first.meta["e_tag"]:  # else it was replaced meanwhile
                self.faults.append(f"{name}: {wrong}")
        except FileNotFoundError:  # the metadata, which are removed before their files are replaced
            return

    def _checksum(self, name: str) -> str | None:
        try:
            return hashlib.sha256(bytes(self._store.get(name).bytes())).hexdigest()
        except FileNotFoundError:
            return None


def _stated(name: str, described: Metadata) -> dict[str, str]:
    """Return the checksums that metadata state, by the names of the files."""
    latent = name.removesuffix(".json")
    image = latent.removeprefix("out/latent_").rpartition(".")[0]
    names = {"latent": latent} | {kind: f"out/{kind}_{image}.png" for kind in ("scaled_image", "preview")}
    assert described.sha256_by_file.keys() == names.keys()
    return {names[kind]: sha256 for kind, sha256 in described.sha256_by_file.items()}


def claims_of(bucket: Bucket) -> set[str]:
    return {name for name in bucket.names() if name.endswith(".lock")}


def never_removed(bucket: Bucket) -> set[str]:
    """Return the claims whose removal met faults twice, after which it is given up."""
    failed = Counter(Path(call.path).name for call in bucket.proxy.calls if call.method == "DELETE" and call.status != 204)
    return {name for name, times in failed.items() if times >= 2}


def kill(machines: list[Machine], bucket: Bucket, ending: str, moments: random.Random, running: ExitStack) -> bool:
    """Kill a worker a moment after it wrote an object whose name ends so, and start it again.

    The worker gets no response to that write, and can write no metadata afterwards. Return whether the object is a file whose
    metadata are not there.
    """
    before = [len(each.lost(ending)) for each in machines]
    writes = [each.network.fault("lose", "PUT", rf"{re.escape(ending)}$") for each in machines]
    metadata = [each.network.fault("hold", "PUT", r"\.json$", times=0) for each in machines]
    for write, held in zip(writes, metadata, strict=True):
        write.then = held

    def writing() -> list[Machine]:
        return [each for each, count in zip(machines, before, strict=True) if len(each.lost(ending)) > count]

    wait_until(lambda: bool(writing()), f"a write of {ending}", poll_s=0.005)
    machine = writing()[0]
    time.sleep(moments.uniform(0, LATENCY_S))
    machine.worker.signal(signal.SIGKILL)
    machine.worker.popen.wait()
    for fault in writes + metadata:
        fault.times = 0
        fault.release.set()
    file = Path(machine.lost(ending)[-1].path).name
    image = file.removeprefix("latent_").removeprefix("scaled_image_").removeprefix("preview_").rpartition(".")[0]
    names = bucket.names()
    machine.worker = running.enter_context(machine.bench.quick_process(**machine.environment))
    return ending != ".lock" and file in names and f"latent_{image}.pt.json" not in names


def storms(bucket: Bucket, moments: random.Random, ended: threading.Event) -> None:
    """Let about one of ten calls meet a fault of the storage, until the end."""
    due = 0
    while not ended.wait(0.02):
        if len(bucket.proxy.calls) >= due:
            due = len(bucket.proxy.calls) + moments.randint(5, 15)
            kind: Any = moments.choice(["status", "drop", "lose"])
            method = moments.choice(["GET"] * 6 + ["PUT"] * 4 + ["DELETE"])
            bucket.proxy.fault(kind, method, "", status=moments.choice([500, 503]))


@contextmanager
def storm(bucket: Bucket, moments: random.Random) -> Iterator[None]:
    ended = threading.Event()
    thread = threading.Thread(target=storms, args=(bucket, moments, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(PATIENCE_S)


@pytest.mark.usefixtures("apache_kafka")
def test_two_machines_that_are_killed_answer_every_request(
    make_bench: MakeBench,
    bucket: Bucket,
    s3_server: S3Server,
    worker: Callable[..., LatentEncoder],
    ask: Callable[..., EncodeRequest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two workers without a shared disk, killed at random on a faulty network, answer each request with whole files."""
    seed = os.environ.get("CRASH_TEST_SEED") or str(random.SystemRandom().getrandbits(32))
    print(f"To kill at the same moments again: CRASH_TEST_SEED={seed}")
    moments = random.Random(seed)  # noqa: S311  # nothing secret depends on it
    bench = make_bench(partitions=4)
    image = bucket.add()
    expected = {f"r{number}" for number in range(REQUESTS)}
    for request_id in sorted(expected):
        bench.send({"request_id": request_id, "image_path": image, "output_dir": f"{bucket.url}/out"})
    responses, hits, left = bench.responses, 0, set[str]()
    with ExitStack() as running:
        machines = [running.enter_context(machine(bench, bucket, number)) for number in range(2)]
        wait_until(lambda: all(each.written(".json") for each in machines), "both workers write")
        for each, other in (machines, machines[::-1]):
            each.assert_alone(other)
        reader = running.enter_context(Reader(s3_server, bucket))
        with storm(bucket, random.Random(f"{seed} storm")):  # noqa: S311
            for ending in moments.sample(KILLED_AFTER, len(KILLED_AFTER)):
                hits += kill(machines, bucket, ending, moments, running)
                left |= claims_of(bucket)
            responses.read(lambda _: request_ids(responses).keys() >= expected)
        wait_until(lambda: sum(bench.committed().values()) >= REQUESTS, "all offsets")
        assert all(SECRET_KEY not in path.read_text() for path in bench.folder.rglob("worker-*.log"))
        assert not [path for each in machines for path in (each.folder / "output").rglob("*")]
    reader.look(again=True)
    assert reader.faults == []
    assert reader.checked >= REQUESTS
    assert hits >= FEWEST_HITS
    assert bench.dead_letters.all_within(0.5) == []
    stated: dict[str, set[tuple[str, ...]]] = {}
    for record in responses.records:
        answer = json.loads(record.value or b"")
        assert answer["status"] == "success", answer
        stated.setdefault(answer["request_id"], set()).add(checked(bucket, answer))
    assert stated.keys() == expected
    assert all(len(checksums) == 1 for checksums in stated.values())
    assert claims_of(bucket) <= left | never_removed(bucket)
    monkeypatch.setattr(leftovers, "ABANDONED_S", 0.0)
    worker().encode(ask(image, f"{bucket.url}/out", request_id="later"))
    assert claims_of(bucket) == set()


def checked(bucket: Bucket, answer: dict[str, Any]) -> tuple[str, ...]:
    """Return the checksums of the files that a response names; assert that it and the metadata file state the same ones."""
    places = {kind: str(answer[f"{kind}_path"]) for kind in ("scaled_image", "preview")}
    places["latent"] = answer["latent_file_path"]
    files = {kind: bucket.folder / place.removeprefix(f"{bucket.url}/") for kind, place in places.items()}
    found = {kind: hashlib.sha256(path.read_bytes()).hexdigest() for kind, path in files.items()}
    described = json.loads(files["latent"].with_name(files["latent"].name + ".json").read_bytes())
    for metadata in (answer["metadata"], described):
        assert {kind: metadata[f"{kind}_sha256"] for kind in found} == found
    return tuple(found[kind] for kind in FILES)
