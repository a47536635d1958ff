"""What the Kafka benchmarks share: workers that are ready, requests sent at once, answers with their times, the bare loop."""

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
class Answer:
    """A response and when its worker produced it, in seconds of Unix time, to the millisecond."""

    at: float
    response: dict[str, Any]

    @property
    def request_id(self) -> str:
        request_id: str = self.response["request_id"]
        return request_id


@contextmanager
def running_workers(bench: Bench, count: int, **environment: str) -> Iterator[list[Process]]:
    """Worker processes that are ready and have divided the bench's partitions evenly; they are killed at the end."""
    with ExitStack() as stack:
        workers = [stack.enter_context(bench.process(**environment)) for _ in range(count)]
        for worker in workers:
            worker.wait_for("ready", patience=PATIENCE_S)
        share = bench.partitions // count
        wait_until(lambda: all(len(partitions_of(worker)) == share for worker in workers), "an even share", PATIENCE_S)
        yield workers


def partitions_of(worker: Process) -> set[int]:
    """The partitions that a worker has, by its log."""
    held: set[int] = set()
    for event in worker.log():
        if event["event"] == "partitions assigned":
            held |= set(event["partitions"])
        elif event["event"] in ("partitions revoked", "partitions lost"):
            held -= set(event["partitions"])
    return held


def requests_for(image: Path, count: int, **fields: Any) -> list[Request]:
    """That many requests for one image; each has its own id, so that none is answered with another's files."""
    return [{"request_id": str(uuid4()), "image_path": str(image), **fields} for _ in range(count)]


def answered(bench: Bench, responses: Topic, requests: Sequence[Request], patience: float = PATIENCE_S) -> list[Answer]:
    """Send all requests at once, evenly over the partitions, and wait for their answers."""
    producer = Producer({**QUIET, "bootstrap.servers": bench.servers})
    for n, request in enumerate(requests):
        producer.produce(bench.request_topic, value=json.dumps(request).encode(), partition=n % bench.partitions)
    assert producer.flush(PATIENCE_S) == 0
    return collect(responses, {str(request["request_id"]) for request in requests}, patience)


def collect(responses: Topic, ids: Collection[str], patience: float) -> list[Answer]:
    """The answers to these requests: until each has one, or none came for `patience` seconds."""
    missing, answers = set(ids), []
    deadline = time.monotonic() + patience
    while missing and time.monotonic() < deadline:
        message = responses.consumer.poll(0.2)
        if message is None or message.error() is not None:
            continue
        record = Incoming.of(message)
        answer = Answer((record.timestamp or 0) / 1000, json.loads(record.value or b""))
        if answer.request_id in ids:
            answers.append(answer)
            missing.discard(answer.request_id)
            deadline = time.monotonic() + patience
    return answers


def duplicates(responses: Topic, ids: Collection[str], seconds: float) -> list[Answer]:
    """Further answers to requests that have theirs already, if any come within that time."""
    found: list[Answer] = []
    while more := collect(responses, ids, seconds):
        found += more
    return found


def per_second(answers: Sequence[Answer]) -> float:
    """Requests per second from the first answer to the last."""
    times = [answer.at for answer in answers]
    return (len(times) - 1) / (max(times) - min(times))


class BareLoop:
    """`bare_loop.py` as a process."""

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
        """One round."""
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
        self._process.communicate()  # which ends its input, and so its loop


def machine(broker: Broker) -> dict[str, Any]:
    """What the figures depend on beside the code."""
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
    """Text in columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows))
