"""Ten to ten thousand workers, simulated: `python -m benchmarks.scale_simulation`. It prints the tables of docs/scale.md."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click

from benchmarks.encode_report import markdown, progress
from benchmarks.scale_events import Faults, Group, Outcome, Scenario, Simulation, Steps
from benchmarks.scale_model import (
    CLASSIC,
    COMMITS_AN_IMAGE,
    CONSUMER,
    CPU_STEPS,
    GPU_STEPS,
    LATENCY_S,
    MEASURED_KILL_S,
    MEASURED_RATES,
    MEASURED_REBALANCES,
    MEASURED_STEPS,
    MOST_CLASSIC,
    READS_A_SECOND,
    READS_AN_IMAGE,
    WRITES_A_SECOND,
    BrokerLoad,
    commits_a_second,
    coordinator_s,
    cost_of_a_million,
    prefixes_for,
)
from latent_encoder.cpus import WAITING

PARTITIONS_A_WORKER = 2
LOAD = 0.7
"""Share of the capacity in the runs with arriving requests: with more, queues grow by chance alone."""
LIFE_S = 6 * 3600.0
"""Mean life of a preemptible machine, in seconds."""
START_S = 15.0
"""From the start of a process until its worker joins: the nodes in 2 s, the VAE, and the container."""
WARM_UP_S = 1.0
"""Shortest warm-up; otherwise it is two encodes."""
THROTTLED_S = 100.0
"""Warm-up, and then the time that counts, of runs in which storage refuses calls: ten times the longest pause of a call."""
QUEUED_S = 8.0
"""Likewise for an overloaded coordinator: the first requests of 10,000 workers keep it busy for 5.4 s."""
MOST_THROTTLED = 1000
"""Most workers whose calls are refused by one prefix in a run."""
PREFIX_LIMITS = {"reads_a_second": READS_A_SECOND, "writes_a_second": WRITES_A_SECOND}


@dataclass(frozen=True)
class Kind:
    """A kind of worker."""

    name: str
    steps: Steps
    threads: int
    """PREPARE_THREADS, by default one less than the CPUs and at most eight."""
    images: float = 20.0
    """Encodes of each worker in a run of the table of rates."""
    waiting: int = WAITING

    @property
    def prefetch(self) -> int:
        """KAFKA_PREFETCH, by default."""
        return self.threads + 1 + self.waiting

    @property
    def ideal(self) -> float:
        """Images a second of one worker whose encoder never waits."""
        return 1 / self.steps.encode_s


CPU = Kind("CPU, 3.6 s", CPU_STEPS, 1)
GPU = Kind("GPU, 50 ms", GPU_STEPS, 8, images=40.0)
"""Workers with the default settings, on 2 and on 16 CPUs."""
KINDS = (CPU, GPU)

Table = tuple[str, Sequence[str], list[Sequence[str]]]


def scenario_of(kind: Kind, workers: int, images: float, **changes: object) -> Scenario:
    """Return a run in which each worker encodes about so many images, without any limit by broker or bucket."""
    seconds = images * kind.steps.encode_s
    base = Scenario(
        workers,
        workers * PARTITIONS_A_WORKER,
        kind.steps,
        seconds,
        warm_up_s=max(WARM_UP_S, 2 * kind.steps.encode_s),
        prefetch=kind.prefetch,
        threads=kind.threads,
        waiting=kind.waiting,
        latency_s=LATENCY_S,
        reads_a_second=0,
        writes_a_second=0,
        group=CONSUMER,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def run(scenario: Scenario) -> Outcome:
    """Run a scenario and report it.

    Its objects hold no cycles, and the garbage collector would look at millions of them again and again: without it, a run
    takes less than a third of the time.
    """
    progress(f"{scenario.workers} workers, {scenario.partitions} partitions, {scenario.group.protocol}")
    gc.disable()
    try:
        return Simulation(scenario).run()
    finally:
        gc.enable()


def throughput(sizes: Sequence[int]) -> Table:
    """Return images a second without limits, with one prefix, with enough prefixes, and with one coordinator."""
    rows: list[Sequence[str]] = []
    for kind in KINDS:
        for workers in sizes:
            free = run(scenario_of(kind, workers, kind.images)).per_second
            prefixes = prefixes_for(free)
            enough = run(scenario_of(kind, workers, kind.images, **PREFIX_LIMITS, prefixes=prefixes)).per_second
            one = enough if prefixes == 1 else rate_with_one_prefix(kind, workers)
            group = run(with_one_coordinator(kind, workers, free)).per_second
            ideal = workers * kind.ideal
            of_one = "not run" if one is None else f"{one:,.1f}"
            rates = (f"{ideal:,.1f}", f"{free:,.1f}", of_one, f"{enough:,.1f} ({prefixes})", f"{group:,.1f}")
            rows.append((kind.name, f"{workers:,}", *rates, cause_of(ideal, free, one, group)))
    header = ("worker", "workers", "ideal", "simulated", "one prefix", "enough prefixes", "one coordinator", "limited by")
    return "Images per second", header, rows


def with_one_coordinator(kind: Kind, workers: int, rate: float) -> Scenario:
    """Return a run with a coordinator, longer if that rate is more than it can do, because its queue must fill first."""
    too_much = rate * (COMMITS_AN_IMAGE + READS_AN_IMAGE) > commits_a_second()
    changes = {"seconds": QUEUED_S, "warm_up_s": QUEUED_S} if too_much else {}
    return scenario_of(kind, workers, kind.images, commits_a_second=commits_a_second(), **changes)


def rate_with_one_prefix(kind: Kind, workers: int) -> float | None:
    """Return the images a second of a run that is long enough for the queues of a prefix that has too much to do.

    Of very many workers it is None: it would be that of fewer, and each of their refused calls is an event.
    """
    if workers > MOST_THROTTLED:
        return None
    changes = {**PREFIX_LIMITS, "seconds": THROTTLED_S, "warm_up_s": THROTTLED_S}
    return run(scenario_of(kind, workers, 0, **changes)).per_second


def cause_of(ideal: float, free: float, one: float | None, group: float) -> str:
    """Return the resources that take more than a tenth of the rate."""
    prefix = one is None or one < 0.9 * free
    causes = {"storage": free < 0.9 * ideal, "prefix": prefix, "coordinator": group < 0.9 * free}
    return ", ".join(name for name, met in causes.items() if met) or "encode"


def partitions(workers: int) -> Table:
    """Return rates and latencies with several counts of partitions, and with uneven keys."""
    rows: list[Sequence[str]] = []
    for a_worker in (0.5, 1, 1.5, 2, 4, 8):
        count = round(workers * a_worker)
        most = run(scenario_of(CPU, workers, 100, partitions=count))
        rate = LOAD * workers * CPU.ideal
        found = [run(scenario_of(CPU, workers, 500, partitions=count, rate=rate, skew=skew)) for skew in (0.0, 0.3)]
        rows.append(
            (
                f"{a_worker:g}",
                f"{most.per_second / (workers * CPU.ideal):.0%}",
                *(f"{one.quantile(share):.1f} s" for one in found for share in (0.5, 0.99)),
                *(f"{one.lag:,}" for one in found),
            )
        )
    header = (
        "partitions a worker",
        "of the ideal rate",
        "median latency at 70 % load",
        "99 %",
        "median, uneven keys",
        "99 %",
        "waiting at the end",
        "uneven keys",
    )
    return f"Partitions, {workers} workers with a CPU", header, rows


def faults(sizes: Sequence[int]) -> Table:
    """Return the outcome of deaths of workers at random."""
    rows: list[Sequence[str]] = []
    deaths = Faults(death_every_s=LIFE_S, start_s=START_S)
    for workers in sizes:
        for name, group in protocols(workers).items():
            images = 300 if workers <= 1000 else 60
            at = scenario_of(CPU, workers, images, rate=LOAD * workers * CPU.ideal, group=group, faults=deaths)
            rows.append((f"{workers:,}", name, *deaths_row(run(at))))
    header = (
        "workers",
        "group",
        "deaths",
        "rebalances",
        "longest",
        "median latency",
        "99 %",
        "encodes repeated",
        "waiting at the end",
    )
    return "Workers that die, one every six hours each", header, rows


def deaths_row(found: Outcome) -> tuple[str, ...]:
    """Return the cells about deaths and rebalances."""
    return (
        f"{found.deaths:,}",
        f"{found.rebalances:,}",
        f"{found.longest_rebalance_s:.1f} s",
        f"{found.quantile(0.5):.1f} s",
        f"{found.quantile(0.99):.1f} s",
        f"{found.repeated:,} of {found.completed:,}",
        f"{found.lag:,}",
    )


def protocols(workers: int) -> dict[str, Group]:
    """Return the groups that are compared: those that can hold so many workers."""
    found = {"consumer": CONSUMER, "static members": replace(CONSUMER, static=True)}
    return found if workers > MOST_CLASSIC else {"classic": CLASSIC, **found}


def rolling(sizes: Sequence[int]) -> Table:
    """Return the outcome of a rolling restart, a tenth of the workers at a time."""
    rows: list[Sequence[str]] = []
    for workers in sizes:
        for name, group in protocols(workers).items():
            restart = Faults(start_s=START_S, rolling_from_s=60, rolling_at_once=max(1, workers // 10))
            at = scenario_of(CPU, workers, 100, rate=LOAD * workers * CPU.ideal, group=group, faults=restart)
            found = run(at)
            rows.append(
                (
                    f"{workers:,}",
                    name,
                    f"{found.rolled_at - 60:.0f} s" if found.rolled_at else "not within the run",
                    f"{found.most_lag:,}",
                    f"{found.lag:,}",
                    f"{found.quantile(0.99):.1f} s",
                    f"{found.repeated}",
                )
            )
    header = ("workers", "group", "restart takes", "most waiting", "waiting at the end", "99 % latency", "encodes repeated")
    return "A rolling restart, a tenth at a time, from 60 s on, of 360 s", header, rows


def brokers(sizes: Sequence[int]) -> Table:
    """Return the load of the brokers."""
    rows: list[Sequence[str]] = []
    for kind in KINDS:
        for workers in sizes:
            rate = rate_of(kind, workers)
            load = BrokerLoad(workers, workers * PARTITIONS_A_WORKER, rate, CONSUMER, paused=kind is CPU)
            rows.append(
                (
                    kind.name,
                    f"{workers:,}",
                    f"{load.partitions:,}",
                    f"{load.brokers}",
                    f"{load.connections_each:,}",
                    *(f"{count:,.0f}" for count in load.requests.values()),
                    f"{load.fetched_bytes / 1e6:,.1f}",
                    f"{load.look_bytes / 1e6:,.1f}",
                    f"{load.look_cpus:,.1f}",
                    f"{coordinator_s(rate):.2f}",
                )
            )
    kinds = tuple(BrokerLoad(1, 1, 1, CONSUMER, paused=True).requests)
    header = (
        *("worker", "workers", "partitions", "brokers", "connections of each"),
        *(f"{kind}/s" for kind in kinds),
        *("fetched MB/s", "looks MB/s", "looks, CPUs", "coordinator, CPUs"),
    )
    return "Brokers", header, rows


def rate_of(kind: Kind, workers: int) -> float:
    """Return the images a second of workers, from a simulation of ten of them."""
    return run(scenario_of(kind, 10, 2000.0)).per_second / 10 * workers


def storage(sizes: Sequence[int]) -> Table:
    """Return the calls to storage, the prefixes that they need, and their cost."""
    rows: list[Sequence[str]] = []
    cost = cost_of_a_million()
    for kind in KINDS:
        for workers in sizes:
            rate = rate_of(kind, workers)
            steps = kind.steps
            reads, writes = rate * (steps.fetch_reads + steps.publish_reads), rate * steps.publish_writes
            day = rate * 86_400 / 1e6
            rows.append(
                (
                    kind.name,
                    f"{workers:,}",
                    f"{rate:,.1f}",
                    f"{reads:,.0f}",
                    f"{writes:,.0f}",
                    f"{prefixes_for(rate)}",
                    f"{day:,.2f} million",
                    f"${day * cost['calls']:,.0f}",
                    f"${day * cost['month']:,.0f}",
                )
            )
    header = (
        "worker",
        "workers",
        "images/s",
        "reads/s",
        "writes/s",
        "prefixes",
        "images a day",
        "calls a day",
        "a month of their files",
    )
    return (
        f"Storage; a million images cost ${cost['calls']:.2f} in calls and ${cost['month']:.0f} for each month",
        header,
        rows,
    )


def validation(_: Sequence[int]) -> Table:
    """Return the measured figures of `scale_measure` beside those of the simulation."""
    rows: list[Sequence[str]] = []
    quick = Scenario(1, 8, MEASURED_STEPS, seconds=10_000)
    for workers, partitions_of, measured in MEASURED_RATES:
        given = replace(quick, workers=workers, partitions=partitions_of, backlog=40 * min(workers, partitions_of))
        found = run(given)
        between = (found.completed - 1) / (found.last_at - min(found.latencies))
        rows.append(compared(f"{workers} workers, {partitions_of} partitions, requests/s", measured, between))
    killed = Faults(kill_at_s=20 / 8, start_s=10_000)
    group = Group("classic", heartbeat_s=1.0, session_s=6.0)
    found = run(replace(quick, workers=4, backlog=160, faults=killed, group=group))
    rows.append(compared("4 workers, one killed: seconds until 160 responses", MEASURED_KILL_S, found.last_at))
    for name, group, joins, measured in MEASURED_REBALANCES:
        rounds = 1 + joins
        mean = rounds * (group.heartbeat_s if group.protocol == "classic" else group.heartbeat_s / 2)
        rows.append(compared(f"{name}, seconds", measured, mean + rounds * 200 * group.member_s))
    return "Measured and simulated", ("case", "measured", "simulated", "deviation"), rows


def compared(case: str, measured: float, simulated: float) -> tuple[str, ...]:
    """Return a row."""
    return (case, f"{measured:.2f}", f"{simulated:.2f}", f"{simulated / measured - 1:+.0%}")


PARTS: dict[str, Callable[[Sequence[int]], Table]] = {
    "validation": validation,
    "throughput": throughput,
    "partitions": lambda sizes: partitions(min(100, max(sizes))),
    "faults": faults,
    "rolling": rolling,
    "brokers": brokers,
    "storage": storage,
}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--only", type=click.Choice(list(PARTS)), multiple=True, default=list(PARTS), help="Tables; all if absent.")
@click.option(
    "--workers", type=click.IntRange(min=1), multiple=True, default=[10, 100, 1000, 10_000], help="Counts of workers."
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all tables there.")
def main(only: Sequence[str], workers: Sequence[int], json_file: Path | None) -> None:
    """Simulate consumer groups, and compute the load of their brokers and buckets. All seeds are fixed."""
    tables = [PARTS[name](workers) for name in only]
    for title, header, rows in tables:
        click.echo(f"\n{title}\n\n{markdown(header, rows)}")
    if json_file is not None:
        json_file.write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
