"""Shared parts of the Kafka benchmarks: ready workers, requests sent at once, responses with their times, the bare loop."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import confluent_kafka
import torch
from confluent_kafka import Producer

from latent_encoder.kafka.records import Incoming
from tests.broker import Broker
from tests.helpers import PROJECT, TINY_VAE, clean_environment
from tests.kafka_tools import QUIET, Bench, Process, Topic, wait_until

PATIENCE_S = 120.0

Request = Mapping[str, Any]


@dataclass(frozen=True)
class TimedResponse:
    """A response, and the time at which its worker produced it, in seconds of Unix time, to the millisecond."""

    at: float
    response: dict[str, Any]

    @property
    def request_id(self) -> str:
        request_id: str = self.response["request_id"]
        return request_id


@contextmanager
def running_workers(bench: Bench, count: int, **environment: str) -> Iterator[list[Process]]:
    """Run workers that are ready and have divided the bench's partitions evenly, and kill them at the end."""
    with ExitStack() as stack:
        workers = [stack.enter_context(bench.process(**environment)) for _ in range(count)]
        for worker in workers:
            worker.wait_for("ready", patience=PATIENCE_S)
        share = bench.partitions // count
        wait_until(lambda: all(len(partitions_of(worker)) == share for worker in workers), "an even share", PATIENCE_S)
        yield workers


def partitions_of(worker: Process) -> set[int]:
    """Return the partitions that a worker has, according to its log."""
    held: set[int] = set()
    for event in worker.log():
        if event["event"] == "partitions assigned":
            held |= set(event["partitions"])
        elif event["event"] in ("partitions revoked", "partitions lost"):
            held -= set(event["partitions"])
    return held


def requests_for(image: Path, count: int, **fields: Any) -> list[Request]:
    """Return `count` requests for one image, each with its own id, so that none gets the files of another."""
    return [{"request_id": str(uuid4()), "image_path": str(image), **fields} for _ in range(count)]


def responses_to(
    bench: Bench, responses: Topic, requests: Sequence[Request], patience: float = PATIENCE_S
) -> list[TimedResponse]:
    """Send all requests at once, evenly over the partitions, and wait for their responses."""
    producer = Producer({**QUIET, "bootstrap.servers": bench.servers})
    for n, request in enumerate(requests):
        producer.produce(bench.request_topic, value=json.dumps(request).encode(), partition=n % bench.partitions)
    assert producer.flush(PATIENCE_S) == 0
    return collect(responses, {str(request["request_id"]) for request in requests}, patience)


def collect(responses: Topic, ids: Collection[str], patience: float) -> list[TimedResponse]:
    """Return the responses to these requests, when each has one or none came for `patience` seconds."""
    missing, received = set(ids), []
    deadline = time.monotonic() + patience
    while missing and time.monotonic() < deadline:
        message = responses.consumer.poll(0.2)
        if message is None or message.error() is not None:
            continue
        record = Incoming.of(message)
        timed = TimedResponse((record.timestamp or 0) / 1000, json.loads(record.value or b""))
        if timed.request_id in ids:
            received.append(timed)
            missing.discard(timed.request_id)
            deadline = time.monotonic() + patience
    return received


def duplicates(responses: Topic, ids: Collection[str], seconds: float) -> list[TimedResponse]:
    """Return additional responses to requests that have one already, until none comes for `seconds`."""
    found: list[TimedResponse] = []
    while more := collect(responses, ids, seconds):
        found += more
    return found


def per_second(received: Sequence[TimedResponse]) -> float:
    """Return requests per second from the first response to the last."""
    times = [timed.at for timed in received]
    return (len(times) - 1) / (max(times) - min(times))


class BareLoop:
    """The process of `bare_loop.py`."""

    def __init__(self, folder: Path, device: str, threads: int) -> None:
        self._folder = folder
        self._process = subprocess.Popen(  # noqa: S603  # nothing here comes from outside
            [sys.executable, "-m", "benchmarks.bare_loop", device, TINY_VAE],
            env=clean_environment() | {"OMP_NUM_THREADS": str(threads)},
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, image: Path, megapixels: float, count: int) -> dict[str, Any]:
        """Run one round and return its result."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        folder = str(self._folder / f"bare-{uuid4().hex[:6]}")
        stdin.write(json.dumps({"image": str(image), "megapixels": megapixels, "count": count, "folder": folder}) + "\n")
        stdin.flush()
        line = stdout.readline()
        assert line, "the bare loop ended by itself; standard error says why"
        result: dict[str, Any] = json.loads(line)
        return result

    def __enter__(self) -> BareLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes its input, which ends its loop


def machine(broker: Broker) -> dict[str, Any]:
    """Return the facts beside the code that the figures depend on."""
    return {
        "broker": broker.name,
        "cpus": os.cpu_count(),
        "architecture": platform.machine(),
        "accelerator": str(torch.accelerator.current_accelerator(check_available=True)),
        "load_average_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "confluent_kafka": confluent_kafka.__version__,
        "librdkafka": confluent_kafka.libversion()[0],
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text in columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows))
