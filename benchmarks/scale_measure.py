"""Measurements behind the simulation: `python -m benchmarks.scale_measure`. They need Java, and a machine of some cores."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from benchmarks.encode_report import progress
from benchmarks.scale_calls import measure_commits, measure_fetches, measure_look, measure_statistics
from benchmarks.scale_group import measure_group
from benchmarks.scale_workers import measure_workers
from tests.broker import ApacheKafka

DEFAULTS = {
    "group.consumer.session.timeout.ms": "45000",
    "group.consumer.heartbeat.interval.ms": "5000",
    "group.initial.rebalance.delay.ms": "3000",
    "group.min.session.timeout.ms": "6000",
}
"""The times of a group by default; the broker of the tests has shorter ones."""

MEMBERS = (10, 50, 200)
PARTITIONS = (10, 100, 1000)
FETCHES: dict[str, dict[str, int]] = {
    "of the service": {},
    "of librdkafka": {"queued.max.messages.kbytes": 65_536, "max.partition.fetch.bytes": 1_048_576},
}
"""Properties of the consumer: those of the service, and the defaults of the library."""

PARTS = ("rebalance", "look", "statistics", "fetch", "commit", "workers")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--only", type=click.Choice(PARTS), multiple=True, default=PARTS, help="Parts; all if absent.")
@click.option("--members", type=click.IntRange(min=2), multiple=True, default=MEMBERS, help="Consumers of a group.")
@click.option(
    "--partitions", type=click.IntRange(min=1), multiple=True, default=PARTITIONS, help="Of a topic that is looked at."
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures there.")
def main(only: Sequence[str], members: Sequence[int], partitions: Sequence[int], json_file: Path | None) -> None:
    """Measure rebalances, the calls of a worker to its broker, and workers whose encode sleeps."""
    found: dict[str, Any] = {}

    def measure(part: str, name: str, call: Callable[[], Any]) -> None:
        if part in only:
            progress(name)
            found[name] = call()
            click.echo(json.dumps({name: found[name]}))
            if json_file is not None:
                json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    with ApacheKafka(properties=DEFAULTS) as broker:
        for count in partitions:
            measure("look", f"look {count}", lambda count=count: measure_look(broker, count))  # type: ignore[misc]
            measure("statistics", f"statistics {count}", lambda count=count: measure_statistics(broker, count))  # type: ignore[misc]
        for name, limits in FETCHES.items():
            measure("fetch", f"fetch {name}", lambda limits=limits: measure_fetches(broker, limits))  # type: ignore[misc]
        measure("commit", "commit", lambda: measure_commits(broker))
        for protocol in ("classic", "consumer"):
            for count in members:
                measure("rebalance", f"{protocol} {count}", lambda of=(protocol, count): times_of(broker, *of))  # type: ignore[misc]
        measure("workers", "workers", lambda: measure_workers(broker))


def times_of(broker: ApacheKafka, protocol: str, members: int) -> dict[str, Any]:
    """Return the times of a group with two partitions for each member, and the size of the record about it."""
    times, size = measure_group(broker, protocol, members, 2 * members)
    return {name: asdict(found) for name, found in times.items()} | {"record_bytes": size}


if __name__ == "__main__":
    main()
