"""Images per second from and to object storage against local files: `python -m benchmarks.storage_bench`."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import click
import psutil

from latent_encoder.process_memory import peak_bytes
from tests.helpers import COMFYUI, IMAGES, PROJECT, TINY_VAE, clean_environment
from tests.storage.faulty_proxy import FaultyProxy
from tests.storage.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

PORTRAIT = IMAGES / "astronaut.png"
FULL_SIZE_VAE = "random_wan.safetensors"
BUCKET = "bench"
LOCAL, NEAR, FAR = "local files", "s3", "s3, with latency"
HEADER = ("VAE", "side", "images/s", "ratio median [min-max]", "CPU s an image: run, server, proxy", "peak MB")
MEGAPIXELS = 0.25
WARM_UP = 2  # images

Result = dict[str, Any]


@dataclass
class Side:
    """A run of `main.py` that reads its requests from a pipe, so that it stays warm between the rounds."""

    name: str
    image: str
    out: str
    process: subprocess.Popen[str]
    sent: int = 0
    rates: list[float] = field(default_factory=list)
    cpu_s: list[tuple[float, float, float]] = field(default_factory=list)
    """Seconds of CPU for an image of the run, of the storage server and of the proxy, in each round."""

    def round(self, count: int) -> float:
        """Encode the image `count` times, and return images per second from the first outcome to the last."""
        assert self.process.stdin is not None
        for number in range(self.sent, self.sent + count):
            line = {"image_path": self.image, "output_dir": self.out, "request_id": f"{self.name[:2]}{number}"}
            self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        self.sent += count
        times = [self._outcome() for _ in range(count)]
        return (count - 1) / (times[-1] - times[0])

    def _outcome(self) -> float:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line or json.loads(line)["status"] != "success":
            raise click.ClickException(f"{self.name}: {line or 'the run ended; its log is above'}")
        return time.perf_counter()


@dataclass(frozen=True)
class Case:
    """A VAE, and the rounds that are measured with it."""

    vae: str
    model_dir: Path
    rounds: int
    count: int
    """Images in a round."""
    threads: int
    """Threads of torch."""


@dataclass(frozen=True)
class Storage:
    """The server, and the proxy that adds the latency."""

    server: S3Server
    proxy_port: int
    server_process: psutil.Process
    proxy_process: psutil.Process

    def environment(self, port: int) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ALLOW_HTTP": "true",
        }


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--latency-ms", type=float, default=50, show_default=True, help="Added to each call.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds of each side, in turns.")
@click.option("--count", type=click.IntRange(min=2), default=24, show_default=True, help="Images in a round of the tiny VAE.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Threads of torch; one leaves a CPU to the server, as an encode on a GPU does.",
)
@click.option("--full/--no-full", default=True, show_default=True, help="Measure a VAE of the real size too.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures there.")
def main(*, latency_ms: float, full: bool, json_file: Path | None, **plan: int) -> None:
    """Measure runs whose image and files are local, in S3, and in S3 with a latency, in turns.

    The portrait is encoded at 0.25 megapixels, by the tiny VAE and by one of the real size with random weights.
    """
    from benchmarks.kafka_bench import table  # not in the process of the proxy: it loads torch

    result: Result = {"cpus": os.cpu_count(), "latency_ms": latency_ms, **plan, "cases": []}
    result["load_average_at_start"] = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="storage-bench-") as name, storage(Path(name), latency_ms / 1000) as store:
        cases = [Case(TINY_VAE, PROJECT / "tiny_vae", **plan)]
        if full:
            fewer = {**plan, "rounds": max(1, plan["rounds"] - 2), "count": max(2, plan["count"] // 6)}  # it takes longer
            cases.append(Case(FULL_SIZE_VAE, full_size_vae(Path(name)), **fewer))
        for case in cases:
            result["cases"].append(measure(case, store, Path(name)))
    click.echo(f"cpus={result['cpus']}  load_average_at_start={result['load_average_at_start']:.1f}\n")
    click.echo(table(HEADER, [row for case in result["cases"] for row in rows(case)]))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


@contextmanager
def storage(folder: Path, latency_s: float) -> Iterator[Storage]:
    """Run the server, and the proxy in a process of its own, so that it does not share Python's lock with a side."""
    with S3Server(folder / "s3") as server:
        (server.data / BUCKET / "in").mkdir(parents=True)
        (server.data / BUCKET / "in" / PORTRAIT.name).write_bytes(PORTRAIT.read_bytes())
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        proxy = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, server.port, latency_s), daemon=True)
        proxy.start()
        theirs.close()
        java = next(each for each in psutil.Process().children(recursive=True) if each.name() == "java")
        try:
            yield Storage(server, ours.recv(), java, psutil.Process(proxy.pid))
        finally:
            proxy.terminate()
            proxy.join()


def serve(connection: Connection, target: int, latency_s: float) -> None:
    """Run the proxy until the process that started this one ends."""
    with FaultyProxy(target) as proxy:
        proxy.latency_s = latency_s
        connection.send(proxy.port)
        while not connection.poll(1):  # until the other end is closed
            proxy.calls.clear()


def full_size_vae(folder: Path) -> Path:
    """Make a VAE of Wan's real size with random weights, and return the model folder."""
    (folder / "models" / "vae").mkdir(parents=True)
    script = PROJECT / "tests" / "stock_comfyui.py"
    command = [sys.executable, str(script), str(COMFYUI), "make-vaes", str(folder / "models"), "wan"]
    subprocess.run(command, env=clean_environment(), capture_output=True, check=True)  # noqa: S603
    return folder / "models" / "vae"


def measure(case: Case, store: Storage, folder: Path) -> Result:
    """Run rounds of the three sides in turns; the runs exist all the time, and are idle in the others' rounds."""
    with ExitStack() as stack:
        url = f"s3://{BUCKET}"
        places = {
            LOCAL: (str(PORTRAIT), str(folder / "local" / case.vae), {}),
            NEAR: (f"{url}/in/{PORTRAIT.name}", f"{url}/near/{case.vae}", store.environment(store.server.port)),
            FAR: (f"{url}/in/{PORTRAIT.name}", f"{url}/far/{case.vae}", store.environment(store.proxy_port)),
        }
        sides = []
        for name, place in places.items():  # each is warm before the next is started, which takes all CPUs
            sides.append(stack.enter_context(running(case, name, *place)))
            sides[-1].round(WARM_UP)
        for number in range(case.rounds):
            for side in sides if number % 2 == 0 else sides[::-1]:
                before = cpu_of(side, store)
                side.rates.append(side.round(case.count))
                used = (after - start for after, start in zip(cpu_of(side, store), before, strict=True))
                side.cpu_s.append(tuple(seconds / case.count for seconds in used))  # type: ignore[arg-type]
        return {"vae": case.vae, "sides": [result_of(side, sides[0]) for side in sides]}


@contextmanager
def running(case: Case, name: str, image: str, out: str, environment: Mapping[str, str]) -> Iterator[Side]:
    command = [sys.executable, str(PROJECT / "main.py"), "--input-list", "-", "--vae_model_name", case.vae]
    settings = {"COMFYUI_PATH": str(COMFYUI), "MODEL_DIR": str(case.model_dir), "DEVICE": "cpu", "LOG_LEVEL": "ERROR"}
    settings["OMP_NUM_THREADS"] = str(case.threads)
    process = subprocess.Popen(  # noqa: S603  # nothing here comes from outside
        [*command, "--megapixels", str(MEGAPIXELS)],
        env={**clean_environment(), **settings, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Side(name, image, out, process)
    finally:
        process.kill()
        process.communicate()


def cpu_of(side: Side, store: Storage) -> tuple[float, float, float]:
    """Return the seconds of CPU so far of a side with its child processes, of the server and of the proxy."""
    run = psutil.Process(side.process.pid)
    run_s = sum(sum(each.cpu_times()[:2]) for each in [run, *run.children(recursive=True)])
    return run_s, sum(store.server_process.cpu_times()[:2]), sum(store.proxy_process.cpu_times()[:2])


def result_of(side: Side, local: Side) -> Result:
    return {
        "side": side.name,
        "per_second": side.rates,
        "ratios": [rate / of_local for rate, of_local in zip(side.rates, local.rates, strict=True)],
        "cpu_s": [median(column) for column in zip(*side.cpu_s, strict=True)],
        "peak_bytes": peak_bytes(side.process.pid),
    }


def rows(case: Result) -> Sequence[Sequence[str]]:
    return [
        (
            case["vae"].partition(".")[0],
            side["side"],
            f"{median(side['per_second']):.2f}",
            f"{median(side['ratios']):.2f} [{min(side['ratios']):.2f}-{max(side['ratios']):.2f}]",
            ", ".join(f"{seconds:.3f}" for seconds in side["cpu_s"]),
            f"{side['peak_bytes'] / 1e6:.0f}",
        )
        for side in case["sides"]
    ]


if __name__ == "__main__":
    main()
