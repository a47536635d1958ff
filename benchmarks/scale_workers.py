"""Real workers on a real broker whose encode sleeps, so that several of them fit on a small machine.

    python -m benchmarks.scale_workers SECONDS [OPTIONS OF main.py]

runs such a worker: the product's own, except for its encode.
"""

from __future__ import annotations

import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from benchmarks.kafka_bench import TimedResponse, duplicates, per_second, requests_for, responses_to, running_workers
from latent_encoder.geometry import latent_crop, size_of
from latent_encoder.outputs.encoded import Encoded, Prepared
from latent_encoder.vae.encoding import EncodedImage
from service import LatentEncoder
from tests.broker import Broker
from tests.helpers import IMAGES, PROJECT
from tests.kafka_tools import Bench, Process, client_config, read_responses

ENCODE_S = 0.5  # several times the CPU time of the rest of a request, so that four workers fit on two CPUs
IMAGE = IMAGES / "photo.jpg"
PER_WORKER = 40  # requests
CASES = ((1, 8), (2, 8), (4, 8), (4, 2))
"""Workers and partitions; in the last case two workers have none."""
KILLED_AFTER = 20  # responses
SESSION_S = 6.0  # session timeout of the workers that are killed
DUPLICATES_S = 3.0  # wait for responses that should not come
OPTIONS = {"OMP_NUM_THREADS": "1", "KAFKA_PREFETCH": "2", "PREPARE_THREADS": "1"}


class SleepingBench(Bench):
    """A bench whose workers sleep in place of an encode."""

    def process(self, *arguments: str, **environment: str) -> Any:
        return _running(self, arguments, environment)


class _running:  # noqa: N801  # a context manager, like a function
    def __init__(self, bench: Bench, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
        command: list[str | Path] = ["-m", "benchmarks.scale_workers", str(ENCODE_S), "--mode", "kafka", *arguments]
        self._process = Process(bench, command, environment)

    def __enter__(self) -> Process:
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.kill()


def measure_workers(broker: Broker) -> list[dict[str, float]]:
    """Return the rates of each case, and the outcome of a kill."""
    found = []
    for workers, partitions in CASES:
        with tempfile.TemporaryDirectory(prefix="scale-workers-") as folder:
            found.append(rate_of(broker, Path(folder), workers, partitions))
    with tempfile.TemporaryDirectory(prefix="scale-workers-") as folder:
        found.append(kill_of(broker, Path(folder)))
    return found


def rate_of(broker: Broker, folder: Path, workers: int, partitions: int) -> dict[str, float]:
    """Return the requests a second of warm workers, and the medians of the steps."""
    bench = SleepingBench(broker.bootstrap_servers, folder, partitions)
    bench.create()
    responses = bench.responses
    try:
        sharing = min(workers, partitions)
        with running_workers(bench, sharing, **OPTIONS) as running:
            responses_to(bench, responses, requests_for(IMAGE, 2 * partitions))
            received = responses_to(bench, responses, requests_for(IMAGE, PER_WORKER * sharing))
            sockets = psutil.Process(running[0].popen.pid).net_connections("tcp")
            connections = sum(socket.status == psutil.CONN_ESTABLISHED for socket in sockets)
    finally:
        bench.close()
    return {
        "workers": workers,
        "partitions": partitions,
        "per_second": per_second(received),
        "connections": connections,
        **steps_of(received),
    }


def steps_of(received: list[TimedResponse]) -> dict[str, float]:
    """Return the median milliseconds of each step."""
    timings = [each.response["metadata"]["timings_ms"] for each in received]
    return {f"{name}_ms": median(each[name] or 0.0 for each in timings) for name in timings[0]}


def kill_of(broker: Broker, folder: Path) -> dict[str, float]:
    """Kill one of four workers, and return the seconds until all requests have a response, and the repeated work."""
    partitions = 8
    bench = SleepingBench(broker.bootstrap_servers, folder, partitions)
    bench.create()
    responses = bench.responses
    session = client_config(folder, session_timeout_ms=round(SESSION_S * 1000), heartbeat_interval_ms=1000)
    requests = requests_for(IMAGE, 4 * PER_WORKER)
    try:
        with running_workers(bench, 4, **OPTIONS, KAFKA_CLIENT_CONFIG=str(session)) as workers:
            responses_to(bench, responses, requests_for(IMAGE, 2 * partitions))
            before = len(read_responses(bench.responses, 2 * partitions))
            for number, request in enumerate(requests):
                bench.send(request, partition=number % partitions)
            began = time.monotonic()
            watched = bench.responses
            read_responses(watched, before + KILLED_AFTER)
            workers[0].signal(signal.SIGKILL)
            read_responses(watched, before + len(requests))
            seconds = time.monotonic() - began
        ids = {str(request["request_id"]) for request in requests}
        again = len(duplicates(responses, ids, DUPLICATES_S)) - len(requests)
    finally:
        bench.close()
    return {"workers": 4, "partitions": partitions, "killed": 1, "seconds": seconds, "duplicates": again}


def sleep_in_place_of_encodes(seconds: float) -> None:
    """Let every encode of this process sleep. Its latent is zeros."""

    def encode(_: LatentEncoder, prepared: Prepared) -> Encoded:
        factor, channels = prepared.vae.cells.factor, prepared.vae.cells.channels
        crop = latent_crop(size_of(prepared.scaled), factor)
        time.sleep(seconds)
        latent = torch.zeros(1, channels, crop.size.height // factor, crop.size.width // factor)
        return Encoded(prepared, EncodedImage(latent, crop, False, "single-frame"), None)

    setattr(LatentEncoder, "encode_prepared", encode)  # noqa: B010  # not an assignment to a method for the type checker


if __name__ == "__main__":
    _, pause, *given = sys.argv
    sys.argv = [str(PROJECT / "main.py"), *given]
    sleep_in_place_of_encodes(float(pause))
    runpy.run_path(sys.argv[0], run_name="__main__")
