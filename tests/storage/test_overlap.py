"""Calls to storage that overlap the encode and each other, and the bounds on that."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Queue

import pytest

from config import Settings
from latent_encoder.cpus import WAITING, most_prepared, prefetch
from latent_encoder.outputs import bucket as bucket_folders
from latent_encoder.outputs.bucket import side_by_side
from latent_encoder.outputs.files import PUBLISHING_S, Writers
from latent_encoder.outputs.folder import OutputFolder
from latent_encoder.stages import Stages
from latent_encoder.standalone.engines import ImageJob
from latent_encoder.storage.watching import CallThreads
from latent_encoder.telemetry.health import Health
from models import EncodeRequest, SuccessResponse
from service import LatentEncoder
from tests.helpers import COMFYUI, IMAGES, PATIENCE_S, PROJECT, VAE, RunMain, clean_environment
from tests.kafka_tools import wait_until
from tests.storage.conftest import Bucket
from tests.storage.test_buckets import described_files_are_whole

MakeWorker = Callable[..., LatentEncoder]
Ask = Callable[..., EncodeRequest]
Result = SuccessResponse | BaseException

LATENCY_S = 0.3


@contextmanager
def running(encoder: LatentEncoder) -> Iterator[Callable[[Sequence[EncodeRequest]], list[Result]]]:
    """Run the stages; yield a function that returns the results of requests that are all in hand at the same time."""
    results: Queue[Result] = Queue()
    stages = Stages[ImageJob](encoder, lambda _, result: results.put(result), Health(PATIENCE_S))

    def results_of(requests: Sequence[EncodeRequest]) -> list[Result]:
        for number, request in enumerate(requests):
            stages.submit(ImageJob(number, request, threading.Event()))
        return [results.get(timeout=PATIENCE_S) for _ in requests]

    yield results_of
    stages.close()
    for thread in stages.threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_waits_for_storage_overlap(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """Eight images with slow calls take less than half of the time that they take one after the other."""
    image, out = bucket.add(), f"{bucket.url}/out"
    with running(worker()) as results_of:
        results_of([ask(image, out, request_id="warm")])
        bucket.proxy.latency_s = LATENCY_S
        start = time.perf_counter()
        results_of([ask(image, out, request_id="alone")])
        alone = time.perf_counter() - start
        start = time.perf_counter()
        results = results_of([ask(image, out, request_id=f"r{number}") for number in range(8)])
        together = time.perf_counter() - start
    assert all(isinstance(result, SuccessResponse) for result in results)
    assert together < 8 * alone / 2, (together, alone)
    for number in range(8):
        assert described_files_are_whole(bucket.folder / "out" / f"latent_astronaut_r{number}.pt.json", f"astronaut_r{number}")


def test_calls_of_an_image_in_the_stages(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """An image takes the calls that the page about object storage names, and its repetition takes fewer."""
    image, calls = bucket.add(), bucket.proxy.calls
    with running(worker()) as results_of:
        results_of([ask(image, f"{bucket.url}/out", request_id="first")])  # the folder is new, and the conditions are proved
        calls.clear()
        (first,) = results_of([ask(image, f"{bucket.url}/out")])
        of_first = Counter(call.method for call in calls)
        calls.clear()
        (again,) = results_of([ask(image, f"{bucket.url}/out")])
        of_again = Counter(call.method for call in calls)
    assert again == first
    assert of_first == {"GET": 7, "PUT": 4, "DELETE": 1}
    assert of_again == {"GET": 3, "HEAD": 2}


def test_files_on_disk_are_read_once_before_the_encode(
    worker: MakeWorker, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On disk, metadata are looked for once before the encode, and once under the lock. Without URLs no thread is started."""
    read: list[str] = []
    original = OutputFolder.read

    def counted(folder: OutputFolder, name: str) -> bytes:
        read.append(name)
        return original(folder, name)

    monkeypatch.setattr(OutputFolder, "read", counted)
    image, described = str(IMAGES / "photo.jpg"), "latent_photo_test.pt.json"
    before = {thread.name for thread in threading.enumerate()}
    with running(worker()) as results_of:
        (first,) = results_of([ask(image, str(tmp_path))])
        of_first = Counter(read)
        read.clear()
        assert results_of([ask(image, str(tmp_path))]) == [first]
        started = {thread.name for thread in threading.enumerate()} - before
    others = ("latent_photo_test.safetensors.json", "latent_photo_test.latent.json")
    assert of_first == dict.fromkeys((described, *others), 2)
    assert Counter(read) == {described: 2, "latent_photo_test.pt": 1, "scaled_image_photo_test.png": 1}
    assert not [name for name in started if name.startswith(("fetch", "publish"))]


def test_images_that_are_fetched_ahead_are_not_prepared_ahead(
    bucket: Bucket, worker: MakeWorker, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one image is encoded, many others are fetched, and only as many as before are scaled."""
    each, go, prepared = worker(), threading.Event(), []
    encode, prepare = each.encode_prepared, each.prepare

    def held(given: object) -> object:
        assert go.wait(PATIENCE_S)
        return encode(given)  # type: ignore[arg-type]

    def noted(request: EncodeRequest, *more: object) -> object:
        prepared.append(request.request_id)
        return prepare(request, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(each, "encode_prepared", held)
    monkeypatch.setattr(each, "prepare", noted)
    image, out = bucket.add(), f"{bucket.url}/out"
    results: Queue[Result] = Queue()
    stages = Stages[ImageJob](each, lambda _, result: results.put(result), Health(PATIENCE_S))
    for number in range(8):
        stages.submit(ImageJob(number, ask(image, out, request_id=f"r{number}"), threading.Event()))
    wait_until(lambda: bucket.proxy.count("GET", r"astronaut\.png$") == 8, "all images")
    wait_until(lambda: len(prepared) == each.most_prepared, "as many as may be scaled")
    go.set()
    assert all(isinstance(results.get(timeout=PATIENCE_S), SuccessResponse) for _ in range(8))
    stages.close()


def claims(bucket: Bucket) -> int:
    """Return the number of claims so far."""
    return sum(call.method == "PUT" and "lock" in call.path and call.status == 200 for call in bucket.proxy.calls)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_during_writes_loses_nothing(bucket: Bucket, signals: int) -> None:
    """A worker that is stopped, also at once, during several writes leaves whole files for each of them, and no claim."""
    for number in range(10):
        bucket.add(key=f"in/{number}.png")
    lines = "".join(json.dumps({"image_path": f"{bucket.url}/in/{number}.png"}) + "\n" for number in range(10))
    bucket.proxy.latency_s = LATENCY_S
    command = [sys.executable, str(PROJECT / "main.py"), "--input-list", "-", "--output_dir", f"{bucket.url}/out"]
    command += ["--megapixels", "0.02", "--vae_model_name", VAE]
    environment = {**clean_environment(), **bucket.environment, "COMFYUI_PATH": str(COMFYUI), "DEVICE": "cpu"}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        process.stdin.write(lines)
        process.stdin.flush()
        wait_until(lambda: claims(bucket) >= 3, "several writes", patience=PATIENCE_S)
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.02)  # two signals at once would be one
        output, _ = process.communicate(timeout=PATIENCE_S)
    wait_until(lambda: bucket.proxy.under_way == 0, "the last calls")
    names = bucket.names()
    described = [name for name in names if name.endswith(".json")]
    assert len(described) >= 3
    assert len(names) == 3 * len(described), names
    for name in described:
        assert described_files_are_whole(bucket.folder / "out" / name, name.removeprefix("latent_").removesuffix(".pt.json"))
    if signals == 1:
        assert len(output.splitlines()) == len(described)


def test_a_run_fetches_ahead_and_writes_side_by_side(bucket: Bucket, run_main: RunMain) -> None:
    """A run over images in a bucket has many calls under way, in one process and in two."""
    images = [bucket.add(key=f"in/{number}.png") for number in range(10)]
    bucket.proxy.latency_s = LATENCY_S
    usual = ["--megapixels", "0.02", "--vae_model_name", VAE]
    env = {**bucket.environment, "COMFYUI_PATH": str(COMFYUI), "DEVICE": "cpu"}
    done = run_main("--image_path", *images, "--output_dir", f"{bucket.url}/out", *usual, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads(line)["status"] for line in done.stdout.splitlines()] == ["success"] * 10
    assert bucket.proxy.most_under_way >= 10


def test_more_requests_are_in_hand_if_urls_are_allowed(settings: Settings) -> None:
    """KAFKA_PREFETCH is larger by default if URLs are allowed. The number of scaled images stays, and so does a set value."""
    threads = {"prepare_threads": 2}
    usual = settings.model_copy(update=threads)
    allowing = settings.model_copy(update={**threads, "allowed_output_urls": ("s3://bucket/out",)})
    assert (prefetch(usual), prefetch(allowing)) == (3, 3 + WAITING)
    assert most_prepared(usual) == most_prepared(allowing) == 4
    assert prefetch(allowing.model_copy(update={"kafka_prefetch": 2})) == 2


def test_the_end_waits_for_writers_and_lets_none_begin() -> None:
    """The one who ends the process waits for the writers, and no other begins."""
    writers, ended, begun = Writers(), threading.Event(), threading.Event()

    def end() -> None:
        writers.end()
        ended.set()

    def begin() -> None:
        with writers:
            begun.set()

    with writers:
        threading.Thread(target=end, daemon=True).start()
        wait_until(lambda: writers._ended, "the end has begun")
        threading.Thread(target=begin, daemon=True).start()
        assert not ended.wait(0.1)
    assert ended.wait(PATIENCE_S)
    assert not begun.wait(0.1)


STEPS = {"fetch": "fetch", "prepare": "prepare", "encode": "encode_prepared", "write": "write_later", "publish": "_publish"}
"""The method that each stage calls: of the encoder, for the last stage of its `Publishing`."""


@pytest.mark.parametrize("error", [SystemExit, MemoryError, ValueError])
@pytest.mark.parametrize("stage", STEPS)
def test_failures_leave_the_stages_working(
    bucket: Bucket, worker: MakeWorker, ask: Ask, monkeypatch: pytest.MonkeyPatch, stage: str, error: type[BaseException]
) -> None:
    """After more failures in a stage than there is room for images, the next request succeeds."""
    image, each, method = bucket.add(), worker(), STEPS[stage]
    owner = each._publishing if stage == "publish" else each
    count = 2 * each.most_prepared + 2
    original, failures = getattr(owner, method), iter(range(count))

    def failing(*given: object, **more: object) -> object:
        if next(failures, None) is None:
            return original(*given, **more)
        raise error("on purpose")

    monkeypatch.setattr(owner, method, failing)
    with running(each) as results_of:
        failed = results_of([ask(image, f"{bucket.url}/out", request_id=f"r{number}") for number in range(count)])
        (after,) = results_of([ask(image, f"{bucket.url}/out")])
    assert [type(result) for result in failed] == [error] * count
    assert isinstance(after, SuccessResponse)
    assert len(bucket.names()) == 3


def test_dropped_jobs_leave_the_stages_working(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """Jobs that are dropped before each stage take no room: the next request succeeds."""
    image, each, results = bucket.add(), worker(), Queue[Result]()
    stages = Stages[DroppedJob](each, lambda _, result: results.put(result), Health(PATIENCE_S))
    for number in range(4 * each.most_prepared):
        stages.submit(DroppedJob(number, ask(image, f"{bucket.url}/out", request_id=f"r{number}"), number % 5))
    stages.submit(DroppedJob(0, ask(image, f"{bucket.url}/out"), 1_000))
    assert isinstance(results.get(timeout=PATIENCE_S), SuccessResponse)
    assert results.empty()
    stages.close()
    for thread in stages.threads:
        thread.join(PATIENCE_S)


class DroppedJob(ImageJob):
    """A job that is dropped when it was looked at so many times: once before each stage."""

    def __init__(self, number: int, request: EncodeRequest, looks: int) -> None:
        super().__init__(number, request, threading.Event())
        self._looks = looks

    @property
    def dropped(self) -> bool:
        self._looks -= 1
        return self._looks < 0


@pytest.mark.parametrize("most", [0, 1])
@pytest.mark.parametrize("stage", ["fetch", "publish"])
def test_too_few_threads(
    bucket: Bucket, worker: MakeWorker, ask: Ask, monkeypatch: pytest.MonkeyPatch, stage: str, most: int
) -> None:
    """If no thread can be started, the requests fail and later ones succeed. One thread of a stage is enough."""
    begin, room = threading.Thread.start, {stage: most}

    def limited(thread: threading.Thread) -> None:
        kind = thread.name.rpartition("-")[0]
        if kind in room:
            if not room[kind]:
                raise RuntimeError("can't start new thread")
            room[kind] -= 1
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    image = bucket.add()
    with running(worker()) as results_of:
        results = results_of([ask(image, f"{bucket.url}/out", request_id=f"r{number}") for number in range(3)])
        assert all(isinstance(result, SuccessResponse if most else RuntimeError) for result in results), results
        room.clear()
        assert isinstance(results_of([ask(image, f"{bucket.url}/out")])[0], SuccessResponse)


def test_too_few_threads_for_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call without a thread fails and is not made later; those that began have ended before the error is reported."""
    calls, made, started = CallThreads(max_workers=3), list[str](), list[threading.Thread]()
    monkeypatch.setattr(bucket_folders, "CALLS", calls)
    begin, refused = threading.Thread.start, threading.Event()

    def only_one(thread: threading.Thread) -> None:
        if started:
            refused.set()
            raise RuntimeError("can't start new thread")
        started.append(thread)
        begin(thread)

    def slow() -> None:
        refused.wait(PATIENCE_S)
        time.sleep(0.1)
        made.append("slow")

    monkeypatch.setattr(threading.Thread, "start", only_one)
    with pytest.raises(RuntimeError, match="new thread"):
        side_by_side([slow, lambda: made.append("late"), lambda: made.append("later")])
    assert made == ["slow"]
    calls.shutdown()  # makes the calls that are in the queue
    assert made == ["slow"]


def test_a_thread_that_ends_is_noticed(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """The health of a worker has the threads that were started for URLs, too."""
    health, results = Health(PATIENCE_S), Queue[Result]()
    stages = Stages[ImageJob](worker(), lambda _, result: results.put(result), health)
    stages.submit(ImageJob(0, ask(bucket.add(), f"{bucket.url}/out"), threading.Event()))
    assert isinstance(results.get(timeout=PATIENCE_S), SuccessResponse)
    stages._fetching.inbox.put(None)
    wait_until(lambda: "fetch-" in health.alive().parts["threads"], "a thread of the stage has ended")
    stages.close()


def test_a_request_after_the_end_starts_no_threads(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """A request with URLs that comes when the stages are closed is left alone, and every thread ends."""
    stages = Stages[ImageJob](worker(), lambda *_: None, Health(PATIENCE_S))
    stages.close()
    stages.submit(ImageJob(0, ask(bucket.add(), f"{bucket.url}/out"), threading.Event()))
    for thread in stages.threads:
        thread.join(10)
        assert not thread.is_alive(), thread.name


def test_a_second_signal_ends_a_run_whose_storage_hangs(bucket: Bucket) -> None:
    """A second signal ends a run within seconds, although the storage does not respond to a write."""
    held = bucket.proxy.fault("hold", "PUT", r"latent_astronaut.*\.pt$")
    command = [sys.executable, str(PROJECT / "main.py"), "--image_path", bucket.add(), bucket.add(key="in/b.png")]
    command += ["--output_dir", f"{bucket.url}/out", "--megapixels", "0.02", "--vae_model_name", VAE]
    environment = {**clean_environment(), **bucket.environment, "COMFYUI_PATH": str(COMFYUI), "DEVICE": "cpu"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert held.met.wait(PATIENCE_S)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)  # two signals at once would be one
        assert process.wait(2 * PUBLISHING_S) == 128 + signal.SIGINT
    held.release.set()
    assert not [name for name in bucket.names() if "astronaut" in name and name.endswith(".json")]
