"""The service over a long time with good and bad requests: `python -m benchmarks.kafka_soak`."""

from __future__ import annotations

import json
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import psutil

from benchmarks.encode_report import markdown, progress
from benchmarks.kafka_bench import PATIENCE_S, machine
from benchmarks.soak_ledger import SUCCESS, Ledger
from benchmarks.soak_requests import REPEATED, Generator, Planned, environment, prepare
from benchmarks.soak_samples import Sample, Series, Trend, take_sample, total
from latent_encoder.kafka.records import Incoming
from tests.broker import Broker, choose
from tests.broker.ports import free_ports
from tests.kafka_tools import Bench, Process

PARTITIONS = 4
OUTSTANDING = 8  # requests that are sent and not answered: enough that the worker never waits
POLL_S = 0.02
DUPLICATES_S = 5.0  # how long to wait at the end for answers that should not come
FLAT = 0.05
# What has to stay as it is: the field of a sample, how it is called, its unit and how it is written.
TRENDS = {
    "resident_bytes": ("resident memory, MB: start, middle, end", 1e6, "{:.0f}"),
    "open_files": ("open files: start, middle, end", 1, "{:g}"),
    "threads": ("threads: start, middle, end", 1, "{:g}"),
}

Result = dict[str, Any]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), default=20, show_default=True, help="After warming up."
)
@click.option("--warm-up", type=click.FloatRange(min=0), default=2, show_default=True, help="Minutes, at least.")
@click.option("--every", type=click.FloatRange(min=0.1), default=1, show_default=True, help="Seconds between samples.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the requests.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures there.")
def main(minutes: float, warm_up: float, every: float, seed: int, json_file: Path | None) -> None:
    """Run one worker on a real broker with mixed good and bad requests, and watch what becomes of them and of the worker.

    Exit status 1 if a request was lost, or not answered as it has to be, or answered twice; or if the worker's memory was not
    within 5 % of what it was after warming up, or its open files or threads became more.
    """
    with tempfile.TemporaryDirectory(prefix="kafka-soak-") as folder, choose()() as broker:
        result = soak(broker, Path(folder), Plan(warm_up * 60, minutes * 60, every, seed))
    click.echo(report(result))
    if json_file is not None:
        json_file.write_text(json.dumps(result) + "\n", encoding="utf-8")
    if result["failures"]:
        raise SystemExit(1)


@dataclass(frozen=True)
class Plan:
    """How long, in seconds, how often to look at the process, and the seed of the requests."""

    warm_up: float
    measured: float
    every: float
    seed: int


class Traffic:
    """The requests that go out, what comes back, and the samples of the worker meanwhile."""

    def __init__(self, bench: Bench, worker: Process, port: int, generator: Generator, every: float) -> None:
        self._began = time.monotonic()
        self._bench = bench
        self._worker = worker
        self._process = psutil.Process(worker.popen.pid)
        self._port = port
        self._generator = generator
        self._every = every
        self.ledger = Ledger(generator.answered, self.now)
        self._arriving = ((bench.responses, self.ledger.response), (bench.dead_letters, self.ledger.dead_letter))
        self.samples: list[Sample] = []

    def now(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    def send_each(self) -> None:
        """Send every kind of request once, and wait for the answers."""
        for request in self._generator.one_of_each():
            while self.ledger.outstanding >= OUTSTANDING:
                self.receive()
            self._send(request)
        self.drain()

    def keep_busy(self, seconds: float) -> None:
        """Keep as many requests on their way as there may be."""
        end = self.now() + seconds
        while self.now() < end:
            while self.ledger.outstanding < OUTSTANDING:
                self._send(self._generator.any_one())
            self.receive()

    def drain(self) -> None:
        """Wait until all is answered, or nothing came for long."""
        outstanding, since = self.ledger.outstanding, self.now()
        while outstanding and self.now() - since < PATIENCE_S:
            self.receive()
            if self.ledger.outstanding != outstanding:
                outstanding, since = self.ledger.outstanding, self.now()

    def listen(self, seconds: float) -> None:
        """Take what comes within that time."""
        end = self.now() + seconds
        while self.now() < end:
            self.receive()

    def receive(self) -> None:
        """Take what has come, and look at the process where it is time to."""
        for topic, note in self._arriving:
            for message in topic.consumer.consume(100, POLL_S):
                if message.error() is None:
                    note(Incoming.of(message))
        if not self.samples or self.now() - self.samples[-1].at >= self._every:
            self.look()

    def look(self) -> None:
        """Take a sample now."""
        assert self._worker.popen.poll() is None, self._worker.log_file.read_text()[-3000:]
        self.samples.append(take_sample(self._process, self._port, self.now()))

    def _send(self, request: Planned) -> None:
        partition = len(self.ledger.entries) % PARTITIONS
        headers = self.ledger.next_headers()
        self.ledger.sent(request, self._bench.send(request.value, headers=headers, partition=partition))


def soak(broker: Broker, folder: Path, plan: Plan) -> Result:
    """One run: every kind of request once and the warm-up, the time that is measured, and the end of the worker."""
    progress("making VAEs and images")
    images = prepare(folder)
    bench = Bench(broker.bootstrap_servers, folder, PARTITIONS)
    bench.create()
    (port,) = free_ports(1)
    try:
        with bench.process(HTTP_PORT=str(port), **environment(folder)) as worker:
            worker.wait_for("ready", patience=PATIENCE_S)
            traffic = Traffic(bench, worker, port, Generator(folder, images, plan.seed), plan.every)
            progress("warming up")
            traffic.send_each()
            traffic.keep_busy(plan.warm_up - traffic.now())
            began = traffic.now()
            progress(f"warm after {began:.0f} s; measuring for {plan.measured:.0f} s")
            traffic.keep_busy(plan.measured)
            ended = traffic.now()
            traffic.drain()
            traffic.listen(DUPLICATES_S)
            traffic.look()
            worker.signal(signal.SIGTERM)
            status = worker.end()
            committed = bench.committed()
    finally:
        bench.close()
    ledger, last = traffic.ledger, traffic.samples[-1]
    measured = [sample for sample in traffic.samples if began <= sample.at <= ended]
    trends = {name: Trend.of([getattr(sample, name) for sample in measured]) for name in TRENDS}
    return {
        "machine": machine(broker),
        "plan": asdict(plan),
        "warm_after_s": began,
        "measured_s": ended - began,
        **counts(ledger, began, ended),
        "trends": {name: asdict(trend) | {"deviation": trend.deviation} for name, trend in trends.items()},
        "failures": [
            *unanswered(ledger),
            *not_flat(trends),
            *disagreements(ledger, last.metrics),
            *bad_end(status, len(ledger.entries), committed),
        ],
        "samples": [asdict(sample) for sample in traffic.samples],
    }


def counts(ledger: Ledger, began: float, ended: float) -> Result:
    """What was sent and what became of it; rate and waiting are of the time that is measured."""
    entries = ledger.entries
    settled = [(entry.sent_at + entry.answered_after, entry.answered_after) for entry in entries if entry.answered_after]
    waited = sorted(after for at, after in settled if began <= at <= ended)
    return {
        "requests": len(entries),
        "per_second": len(waited) / (ended - began),
        "answered_after_s": {"median": median(waited), "p95": waited[int(0.95 * len(waited))]},
        "codes": dict(ledger.codes().most_common()),
        "lost": sum(entry.lost for entry in entries),
        "wrong": sum(entry.wrong for entry in entries),
        "duplicates": sum(entry.duplicates for entry in entries),
        "kinds": {kind: len(of_kind) for kind, of_kind in ledger.kinds().items()},
        "faults": ledger.faults(),
    }


def unanswered(ledger: Ledger) -> Iterator[str]:
    for name in ("lost", "wrong", "duplicates"):
        if count := sum(getattr(entry, name) for entry in ledger.entries):
            yield f"{count} {name}"


def not_flat(trends: Mapping[str, Trend]) -> Iterator[str]:
    """What the worker needs more and more of."""
    if abs(trends["resident_bytes"].deviation) > FLAT:
        yield f"resident memory changed by {trends['resident_bytes'].deviation:+.1%}"
    for name in ("open_files", "threads"):
        if trends[name].grew:
            yield f"{name.replace('_', ' ')} became more: {trends[name].start:g}, then {trends[name].end:g}"


def disagreements(ledger: Ledger, metrics: Sequence[Series]) -> Iterator[str]:
    """Where the worker's own counts are others than what came out of its topics."""
    for code, count in ledger.codes().items():
        labels = {"outcome": "success"} if code == SUCCESS else {"outcome": "error", "error_code": code}
        said = total(metrics, "latent_encoder_requests_total", **labels)
        if said != count:
            yield f"/metrics counts {said:g} times {code}, where {count} came"
    for name, count in (
        ("latent_encoder_dead_letters_total", sum(entry.dead_letters for entry in ledger.entries)),
        ("latent_encoder_redeliveries_total", len(ledger.kinds().get(REPEATED, ()))),
    ):
        if (said := total(metrics, name)) != count:
            yield f"{name} is {said:g}, where {count} came"


def bad_end(status: int, sent: int, committed: Mapping[int, int]) -> Iterator[str]:
    """What is wrong with how the worker stopped."""
    if status:
        yield f"the worker ended with status {status}"
    if (done := sum(committed.values())) != sent:
        yield f"{done} of {sent} records are committed"


def report(result: Result) -> str:
    """The run as Markdown."""
    facts = "  ".join(f"{key}={value}" for key, value in result["machine"].items())
    waited = result["answered_after_s"]
    rows = [
        ("requests", f"{result['requests']}"),
        ("minutes measured, after warming up", f"{result['measured_s'] / 60:.1f}, {result['warm_after_s'] / 60:.1f}"),
        ("requests per second", f"{result['per_second']:.2f}"),
        (f"answered after, {OUTSTANDING} on their way", f"median {waited['median']:.2f} s, 95 % {waited['p95']:.2f} s"),
        *((name, str(result[name])) for name in ("lost", "wrong", "duplicates")),
        *((label, trend_text(result["trends"][name], unit, text)) for name, (label, unit, text) in TRENDS.items()),
    ]
    codes = [(code, str(count)) for code, count in result["codes"].items()]
    kinds = [(kind, str(count)) for kind, count in result["kinds"].items()]
    verdict = "".join(f"\nFAILED: {failure}" for failure in result["failures"]) or "\nNothing failed."
    tables = (markdown(("", ""), rows), markdown(("answer", "requests"), codes), markdown(("kind", "requests"), kinds))
    return "\n\n".join((facts, *tables)) + "\n" + verdict


def trend_text(trend: Mapping[str, float], unit: float, text: str) -> str:
    values = ", ".join(text.format(trend[name] / unit) for name in ("start", "middle", "end"))
    return f"{values} ({trend['deviation']:+.1%})"


if __name__ == "__main__":
    main()
