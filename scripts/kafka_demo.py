"""From nothing to Kafka: a broker, a worker and requests on this machine; the worker is killed, and no request is lost.

.venv/bin/python scripts/kafka_demo.py
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

try:
    from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition

    from config import VARIABLES, Settings
    from errors import KafkaFailed
    from latent_encoder.kafka.connection import BrokerState
    from latent_encoder.kafka.properties import consumer_properties, make_client, producer_properties
    from latent_encoder.outputs.names import OutputFiles
    from latent_encoder.terminal import encodable
    from models import Metadata
    from scripts.send_request import assign_ends, receive, request_for, send
    from tests.broker import ApacheKafka, BrokerError, choose_local
    from tests.broker.__main__ import create_topics
    from tests.broker.process import Process
except ModuleNotFoundError as exc:
    sys.exit(
        f"Error: The package {exc.name} is missing. Run ./setup_comfyui.sh --dev, then .venv/bin/python scripts/kafka_demo.py"
    )

IMAGES = [PROJECT / "tests/fixtures/test_images" / name for name in ("photo.jpg", "astronaut.png", "rgba.png", "grey.jpg")]
VAE = PROJECT / "tiny_vae" / "tiny_qwen_vae.safetensors"
PARTITIONS = 2
MEGAPIXELS = 0.25
"""Small, so that a request takes about 0.2 seconds, and large enough that the kill meets one in the middle of its encode."""

SESSION_S = 6
"""Seconds after which the broker gives the partitions of a killed worker to another one: about as long as that one loads."""

POLL_S = 0.1
CONNECT_S = 30.0
TAIL_LINES = 5
"""Lines of a worker's log that are shown if it ends by itself: the last ones have the reason."""

NO_JAVA = (
    "Apache Kafka needs Java 17 or newer and Maven, and they are not here. Install them (on Debian and Ubuntu: apt install "
    "default-jre-headless maven), and run this again."
)
"""The small broker of the tests is no substitute: its group took minutes to give a worker its partitions."""

KEPT = ("comfyui_path", "device", "torch_num_threads")
"""The settings that the workers take from the environment. Any other one could lead them to another broker or folder."""

EXIT_NOT_ALL, EXIT_CANNOT_RUN, SIGNAL_BASE = 1, 3, 128


class DemoFailed(Exception):
    """The demo cannot go on. The text has the reason."""

    def __init__(self, reason: str, status: int = EXIT_CANNOT_RUN) -> None:
        super().__init__(reason)
        self.status = status


class Interrupted(Exception):  # it is no error
    """A signal asked the demo to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--requests", "count", type=click.IntRange(min=1), default=20, show_default=True, help="Requests to send.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Workers at a time.")
@click.option("--kills", type=click.IntRange(min=0), default=1, show_default=True, help="Workers to kill on the way.")
@click.option("--keep", is_flag=True, help="Keep the output files, the logs and the broker's data.")
@click.option("--timeout", type=click.FloatRange(min=1), default=300.0, show_default=True, help="Most seconds without news.")
def main(count: int, workers: int, kills: int, *, keep: bool, timeout: float) -> None:
    """Start a Kafka broker and a worker, send requests, kill the worker halfway, and show that none is lost.

    Needs ./setup_comfyui.sh --dev, and Java 17 with Maven for Apache Kafka. Everything runs on this machine, in a temporary
    folder, and is gone at the end.

    Exit status: 0 each request has a response and each file its checksum, 1 not so, 2 wrong usage, 3 the broker or a worker
    cannot run, 130 or 143 interrupted.
    """
    if kills >= count:
        raise click.UsageError("--kills must be less than --requests: a worker is killed between two responses.")
    for name in VARIABLES.keys() - KEPT:
        os.environ.pop(name.upper(), None)
    story = Story()
    try:
        with signals_raised(), folder_of_demo(story, keep=keep) as folder:
            complete = Demo(story, folder, count, timeout).run(workers, kills)
    except Interrupted as exc:
        fail("Interrupted.", SIGNAL_BASE + exc.number)
    except DemoFailed as exc:
        fail(str(exc), exc.status)
    except (BrokerError, KafkaFailed, KafkaException, OSError) as exc:
        fail(str(exc), EXIT_CANNOT_RUN)
    sys.exit(0 if complete else EXIT_NOT_ALL)


class Story:
    """The lines that are printed, each with the seconds since the beginning."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def tell(self, who: str, text: str) -> None:
        line = f"{time.monotonic() - self._began:5.1f} s  {who:<9} {text}"
        click.echo(encodable(line, sys.stdout.encoding or "utf-8"))


@contextmanager
def signals_raised() -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into `Interrupted`; further ones do not disturb the clean-up."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(number: int, _: FrameType | None) -> NoReturn:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    former = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def folder_of_demo(story: Story, *, keep: bool) -> Iterator[Path]:
    """Provide a temporary folder. It is removed at the end unless it is to be kept."""
    folder = Path(tempfile.mkdtemp(prefix="latent-encoder-demo-"))
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # a pipe that nobody reads any more
            story.tell(
                "clean-up", f"no process is left; the files are in {folder}" if keep else "no process and no file is left"
            )


@dataclass
class Worker:
    """A worker and its process."""

    number: int
    process: Process
    announced: bool = False
    """The story has told that it is ready."""

    @property
    def name(self) -> str:
        return f"worker {self.number}"

    @property
    def ready(self) -> bool:
        """True from the moment when it takes requests."""
        return '"event": "ready"' in self._log

    @property
    def _log(self) -> str:
        return self.process.log.read_text(encoding="utf-8", errors="replace")

    def check(self) -> None:
        """Raise `DemoFailed` if it has ended by itself."""
        if self.process.status is not None:
            tail = "\n".join(self._log.splitlines()[-TAIL_LINES:])
            raise DemoFailed(f"{self.name} has ended with status {self.process.status}. The end of its log:\n{tail}")


class Demo:
    """One run: the broker, the workers, the requests and their responses."""

    def __init__(self, story: Story, folder: Path, count: int, timeout: float) -> None:
        self._story = story
        self._folder = folder
        self._timeout = timeout
        self._images = list(islice(cycle(IMAGES), count))
        self._workers: list[Worker] = []
        self._started = 0
        self._requests: list[dict[str, Any]] = []
        self._responses: list[dict[str, Any]] = []
        self._consumer: Consumer | None = None

    def run(self, workers: int, kills: int) -> bool:
        """Return whether each request got a response, all files are whole, and all workers ended well."""
        with ExitStack() as ending:
            self._start_broker(ending)
            ending.callback(self._kill_all)
            for _ in range(workers):
                self._start_worker(kills)
            self._wait_for(lambda: all(worker.ready for worker in self._workers), "a worker that takes requests")
            self._connect(ending)
            self._send()
            for kill in range(kills):
                self._receive_until(max(1, round(len(self._images) * (kill + 1) / (kills + 1))))
                self._kill_oldest()
                self._start_worker(kills)
            self._receive_until(len(self._images))
            self._wait_for(self._all_committed, "the commits of the requests")
            self._receive_rest()
            stopped = self._stop_all()
            return self._conclude() and stopped

    # The parts.

    def _start_broker(self, ending: ExitStack) -> None:
        if choose_local() is not ApacheKafka:
            raise DemoFailed(NO_JAVA)
        self._story.tell("broker", "starts; the first time, its files are downloaded")
        broker = ApacheKafka(folder=self._folder / "kafka")
        self._broker = ending.enter_context(broker)
        create_topics(broker.bootstrap_servers, PARTITIONS)
        self._story.tell("broker", f"{broker.name} at {broker.bootstrap_servers}, {PARTITIONS} partitions")

    def _start_worker(self, kills: int) -> None:
        self._started += 1
        properties = self._folder / "client.properties"
        properties.write_text(f"session.timeout.ms={SESSION_S}000\nheartbeat.interval.ms=1000\n", encoding="utf-8")
        variables = {
            "KAFKA_BOOTSTRAP_SERVERS": self._broker.bootstrap_servers,
            "KAFKA_CLIENT_CONFIG": str(properties),
            "KAFKA_MAX_CRASHES": str(max(2, kills)),  # the request that each kill meets is not to blame
            "MODEL_DIR": str(VAE.parent),
            "VAE_MODEL_NAME": VAE.name,
            "MEGAPIXELS": str(MEGAPIXELS),
            "OUTPUT_DIR": str(self._folder / "output"),
            "HTTP_PORT": "0",
        }
        command = [sys.executable, str(PROJECT / "main.py"), "--mode", "kafka"]
        log = self._folder / f"worker-{self._started}.log"
        worker = Worker(self._started, Process(command, log, {**os.environ, **variables}, self._folder))
        self._workers.append(worker)
        self._story.tell(worker.name, f"starts: main.py --mode kafka, VAE {VAE.name}")

    def _connect(self, ending: ExitStack) -> None:
        self._settings = Settings(
            _env_file=None,
            kafka_bootstrap_servers=self._broker.bootstrap_servers,
            output_dir=str(self._folder / "output"),
        )
        self._connection = BrokerState(self._broker.bootstrap_servers)
        callbacks = {"error_cb": self._connection.on_error}
        consumer = make_client(Consumer, consumer_properties(self._settings) | callbacks, self._settings)
        ending.callback(consumer.close)
        assign_ends(consumer, self._connection, self._settings, CONNECT_S)
        self._consumer = consumer

    def _send(self) -> None:
        ids = [f"demo-{number}" for number in range(1, len(self._images) + 1)]
        self._requests = [request_for(str(image), one, {}) for image, one in zip(self._images, ids, strict=True)]
        properties = producer_properties(self._settings, transactional=False) | {"error_cb": self._connection.on_error}
        producer = make_client(Producer, properties, self._settings)
        topic = self._settings.kafka_request_topic
        send(producer, self._connection, topic, self._requests, time.monotonic() + CONNECT_S)
        self._sent_at = time.monotonic()
        self._story.tell("requests", f"{len(ids)} are in the topic {topic}")

    # The responses.

    @property
    def _done(self) -> set[str]:
        return {response["request_id"] for response in self._responses}

    def _receive_until(self, enough: int) -> None:
        """Receive responses until as many requests have one."""
        self._wait_for(lambda: len(self._done) >= enough, "a response")

    @property
    def _connected(self) -> Consumer:
        assert self._consumer is not None
        return self._consumer

    def _receive(self) -> bool:
        """Receive a response if one is there, and return whether there was one."""
        if self._consumer is None:
            time.sleep(POLL_S)
            return False
        message = receive(self._consumer, self._connection, POLL_S)
        if message is None:
            return False
        self._announce()
        response: dict[str, Any] = json.loads(message.value() or b"")
        again = response["request_id"] in self._done
        self._responses.append(response)
        self._tell_response(response, again=again)
        return True

    def _tell_response(self, response: dict[str, Any], *, again: bool) -> None:
        image = Path(next(each["image_path"] for each in self._requests if each["request_id"] == response["request_id"])).name
        if response["status"] != "success":
            result = f"{response['error_code']}: {response['error_message']}"
        else:
            shape = "x".join(map(str, response["latent_shape"]))
            result = f"{shape}  {Path(response['latent_file_path']).name}"
        mark = "again" if again else f"{len(self._done)}/{len(self._images)}"
        self._story.tell("response", f"{mark:>5}  {response['request_id']:<8} {image:<14} {result}")

    def _wait_for(self, condition: Callable[[], bool], awaited: str) -> None:
        """Wait for a condition, and take responses meanwhile.

        Raises:
            DemoFailed: a worker ended, or nothing happened for as long as the timeout.
        """
        deadline = time.monotonic() + self._timeout
        while not condition():
            for worker in self._workers:
                worker.check()
            self._announce()
            if self._receive():
                deadline = time.monotonic() + self._timeout
            if time.monotonic() > deadline:
                missing = sorted({request["request_id"] for request in self._requests} - self._done)
                waiting = f" Without a response: {', '.join(missing)}." if missing else ""
                raise DemoFailed(
                    f"For {self._timeout:g} seconds nothing came: {awaited}.{waiting} With --keep, the logs stay.",
                    EXIT_NOT_ALL,
                )
        self._announce()

    def _announce(self) -> None:
        """Tell of each worker once that it takes requests."""
        for worker in self._workers:
            if not worker.announced and worker.ready:
                worker.announced = True
                self._story.tell(worker.name, "is ready")

    def _all_committed(self) -> bool:
        """Return whether the group has committed each request, so no response comes again."""
        topic = self._settings.kafka_request_topic
        committed = self._connected.committed([TopicPartition(topic, n) for n in range(PARTITIONS)], timeout=CONNECT_S)
        return all(max(0, place.offset) == self._end(topic, place.partition) for place in committed)

    def _end(self, topic: str, partition: int) -> int:
        _, end = self._connected.get_watermark_offsets(TopicPartition(topic, partition), timeout=CONNECT_S)
        return end

    def _count(self, topic: str) -> int:
        return sum(self._end(topic, partition) for partition in range(PARTITIONS))

    def _receive_rest(self) -> None:
        """Receive the responses that came again."""
        self._wait_for(lambda: len(self._responses) >= self._count(self._settings.kafka_response_topic), "the last responses")

    # The ends.

    def _kill_oldest(self) -> None:
        self._wait_for(lambda: any(worker.ready for worker in self._workers), "a worker that takes requests")
        worker = next(worker for worker in self._workers if worker.ready)
        self._workers.remove(worker)
        worker.process.kill()
        left = len(self._images) - len(self._done)
        self._story.tell(worker.name, f"killed with SIGKILL; {left} of {len(self._images)} requests have no response yet")

    def _kill_all(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        self._workers.clear()

    def _stop_all(self) -> bool:
        """End the workers with SIGTERM, and return whether all ended with status 0."""
        statuses = []
        while self._workers:
            worker = self._workers[0]
            worker.process.stop()
            self._workers.remove(worker)
            statuses.append(worker.process.status)
            self._story.tell(worker.name, f"stopped with SIGTERM, status {worker.process.status}")
        return not any(statuses)

    def _conclude(self) -> bool:
        """Print the result, and return whether it is as promised."""
        total = len(self._images)
        succeeded = {response["request_id"] for response in self._responses if response["status"] == "success"}
        whole, files = self._check_files()
        counts = Counter(response["request_id"] for response in self._responses)
        again = sum(counts.values()) - len(counts)
        letters = self._count(self._settings.kafka_dlq_topic)
        missing = sorted({request["request_id"] for request in self._requests} - counts.keys())
        self._story.tell(
            "result",
            f"{len(counts)} of {total} requests have a response by their request_id, {len(succeeded)} of them a latent",
        )
        for name in missing:
            self._story.tell("result", f"{name} has no response")
        came_again = f" ({', '.join(name for name, count in counts.items() if count > 1)})" if again else ""
        self._story.tell("result", f"duplicates: {again}{came_again}; dead letters: {letters}")
        self._story.tell("result", f"{whole} of {files} files match their checksums")
        return len(succeeded) == total and whole == files

    def _check_files(self) -> tuple[int, int]:
        """Return the count of files that are whole, and of all files that the responses name."""
        stated: set[tuple[Path, str]] = set()
        for response in self._responses:
            if response["status"] == "success":
                files = OutputFiles.of(Path(response["latent_file_path"]))
                checksums = Metadata.model_validate(response["metadata"]).sha256_by_file
                stated |= {(getattr(files, kind), sha256) for kind, sha256 in checksums.items()}
        return sum(_has(path, sha256) for path, sha256 in stated), len(stated)


def _has(path: Path, sha256: str) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    except OSError:
        return False


def fail(message: str, status: int) -> NoReturn:
    """End the process with a message on standard error."""
    with suppress(OSError):
        click.echo(f"Error: {message}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
