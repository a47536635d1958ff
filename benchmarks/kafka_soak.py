"""The soak, a long run of the service with good and bad requests: `python -m benchmarks.kafka_soak`."""

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
OUTSTANDING = 8  # requests without a response so far: more than KAFKA_PREFETCH, so that the worker never waits
POLL_S = 0.02
DUPLICATES_S = 5.0  # wait at the end for responses that should not come
FLAT = 0.03  # largest change of memory, as a part of it: 30 MB of a worker of 1 GB, over 40 of 60 minutes
# Quantities that must stay as they are: the field of a sample, its label, its unit and its format.
TRENDS = {
    "resident_bytes": ("resident memory, MB, median of each sixth", 1e6, "{:.0f}"),
    "open_files": ("open files, median of each sixth", 1, "{:g}"),
    "threads": ("threads, median of each sixth", 1, "{:g}"),
}

Result = dict[str, Any]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), default=60, show_default=True, help="After warming up."
)
@click.option("--warm-up", type=click.FloatRange(min=0), default=2, show_default=True, help="Minutes, at least.")
@click.option("--every", type=click.FloatRange(min=0.1), default=1, show_default=True, help="Seconds between samples.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the requests.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures there.")
def main(minutes: float, warm_up: float, every: float, seed: int, json_file: Path | None) -> None:
    """Run one worker on a real broker with mixed good and bad requests, and watch them and the worker.

    Exit status 1 if a request has no response, a wrong one, or two; or if the worker's memory changed by more than 3 %
    between the second and the last sixth of the time after the warm-up, or its open files or threads grew in number.
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
    """The durations and the sampling interval, in seconds, and the seed of the requests."""

    warm_up: float
    measured: float
    every: float
    seed: int


class Traffic:
    """The requests that are sent, their responses and dead letters, and the samples of the worker."""

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
        """Return the seconds since the beginning."""
        return time.monotonic() - self._began

    def send_each(self) -> None:
        """Send every kind of request once, and wait for the responses."""
        for request in self._generator.one_of_each():
            while self.ledger.outstanding >= OUTSTANDING:
                self.receive()
            self._send(request)
        self.drain()

    def keep_busy(self, seconds: float) -> None:
        """Keep OUTSTANDING requests without a response, for that time."""
        end = self.now() + seconds
        while self.now() < end:
            while self.ledger.outstanding < OUTSTANDING:
                self._send(self._generator.any_one())
            self.receive()

    def drain(self) -> None:
        """Wait until every request has its response, or none came for PATIENCE_S seconds."""
        outstanding, since = self.ledger.outstanding, self.now()
        while outstanding and self.now() - since < PATIENCE_S:
            self.receive()
            if self.ledger.outstanding != outstanding:
                outstanding, since = self.ledger.outstanding, self.now()

    def listen(self, seconds: float) -> None:
        """Receive records for that time."""
        end = self.now() + seconds
        while self.now() < end:
            self.receive()

    def receive(self) -> None:
        """Receive the records that have come, and take a sample of the process if it is due."""
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
    """Run the soak: every kind of request once, the warm-up, the measured time, and the end of the worker."""
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
        "trends": {name: {"sixths": trend.sixths, "deviation": trend.deviation} for name, trend in trends.items()},
        "failures": [
            *unanswered(ledger),
            *not_flat(trends),
            *disagreements(ledger, last.metrics),
            *bad_end(status, len(ledger.entries), committed),
        ],
        "samples": [asdict(sample) for sample in traffic.samples],
    }


def counts(ledger: Ledger, began: float, ended: float) -> Result:
    """Return the counts of requests by their outcome; rate and waiting time are those of the measured time."""
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
    """Yield the resources that the worker needs more and more of."""
    if abs(trends["resident_bytes"].deviation) > FLAT:
        yield f"resident memory changed by {trends['resident_bytes'].deviation:+.1%}"
    for name in ("open_files", "threads"):
        if trends[name].grew:
            yield f"{name.replace('_', ' ')} became more: {trends[name].start:g}, then {trends[name].end:g}"


def disagreements(ledger: Ledger, metrics: Sequence[Series]) -> Iterator[str]:
    """Yield the differences between the worker's own counts and the records in its topics."""
    for code, count in ledger.codes().items():
        labels = {"outcome": "success"} if code == SUCCESS else {"outcome": "error", "error_code": code}
        said = total(metrics, "latent_encoder_requests_total", **labels)
        if said != count:
            yield f"/metrics counts {said:g} times {code}, but {count} came"
    for name, count in (
        ("latent_encoder_dead_letters_total", sum(entry.dead_letters for entry in ledger.entries)),
        ("latent_encoder_redeliveries_total", len(ledger.kinds().get(REPEATED, ()))),
    ):
        if (said := total(metrics, name)) != count:
            yield f"{name} is {said:g}, but {count} came"


def bad_end(status: int, sent: int, committed: Mapping[int, int]) -> Iterator[str]:
    """Yield the faults of the worker's end."""
    if status:
        yield f"the worker ended with status {status}"
    if (done := sum(committed.values())) != sent:
        yield f"{done} of {sent} records are committed"


def report(result: Result) -> str:
    """Return the run as Markdown."""
    facts = "  ".join(f"{key}={value}" for key, value in result["machine"].items())
    waited = result["answered_after_s"]
    rows = [
        ("requests", f"{result['requests']}"),
        ("minutes measured, after warming up", f"{result['measured_s'] / 60:.1f}, {result['warm_after_s'] / 60:.1f}"),
        ("requests per second", f"{result['per_second']:.2f}"),
        (f"time to the response, {OUTSTANDING} in flight", f"median {waited['median']:.2f} s, 95 % {waited['p95']:.2f} s"),
        *((name, str(result[name])) for name in ("lost", "wrong", "duplicates")),
        *((label, trend_text(result["trends"][name], unit, text)) for name, (label, unit, text) in TRENDS.items()),
    ]
    codes = [(code, str(count)) for code, count in result["codes"].items()]
    kinds = [(kind, str(count)) for kind, count in result["kinds"].items()]
    verdict = "".join(f"\nFAILED: {failure}" for failure in result["failures"]) or "\nNothing failed."
    tables = (markdown(("", ""), rows), markdown(("response", "requests"), codes), markdown(("kind", "requests"), kinds))
    return "\n\n".join((facts, *tables)) + "\n" + verdict


def trend_text(trend: Mapping[str, Any], unit: float, text: str) -> str:
    values = ", ".join(text.format(value / unit) for value in trend["sixths"])
    return f"{values} ({trend['deviation']:+.1%})"


if __name__ == "__main__":
    main()
