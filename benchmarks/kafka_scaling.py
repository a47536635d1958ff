"""Requests per second of 1, 2 and 4 workers of one group: `python -m benchmarks.kafka_scaling`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.kafka_bench import duplicates, machine, per_second, requests_for, responses_to, running_workers, table
from tests.broker import Broker, choose
from tests.helpers import IMAGES
from tests.kafka_tools import Bench

IMAGE = IMAGES / "astronaut.png"
PARTITIONS = 8
WARM_UP = 3  # requests a partition, so that each worker has its VAE loaded
DUPLICATES_S = 3.0  # wait for responses that should not come
HEADER = ("workers", "req/s", "to one worker", "sent", "answered", "lost", "duplicates", "errors")

Result = dict[str, Any]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--workers", type=click.Choice(["1", "2", "4", "8"]), multiple=True, default=["1", "2", "4"], help="1, 2 and 4.")
@click.option("--count", type=click.IntRange(min=PARTITIONS), default=240, show_default=True, help="Requests, sent at once.")
@click.option("--megapixels", type=float, default=0.05, show_default=True, help="Size that is encoded.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures there.")
def main(workers: Sequence[str], count: int, megapixels: float, json_file: Path | None) -> None:
    """Measure the requests per second with several numbers of workers, each with one torch thread, on 8 partitions.

    Exit status 1 if a request has no response, several, or an error.
    """
    with choose()() as broker:
        result: Result = {"machine": machine(broker), "megapixels": megapixels, "runs": []}
        click.echo("  ".join(f"{key}={value}" for key, value in result["machine"].items()))
        for number in workers:
            with tempfile.TemporaryDirectory(prefix="kafka-scaling-") as folder:
                result["runs"].append(measure(broker, Path(folder), int(number), count, megapixels))
    click.echo("\n" + table(HEADER, rows(result["runs"])))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if any(run["lost"] or run["duplicates"] or run["errors"] for run in result["runs"]):
        raise SystemExit(1)


def measure(broker: Broker, folder: Path, workers: int, count: int, megapixels: float) -> Result:
    """Measure one number of workers: their rate once all are warm, and the outcome of each request."""
    bench = Bench(broker.bootstrap_servers, folder, PARTITIONS)
    bench.create()
    responses = bench.responses
    try:
        with running_workers(bench, workers, OMP_NUM_THREADS="1"):
            responses_to(bench, responses, requests_for(IMAGE, WARM_UP * PARTITIONS, megapixels=megapixels))
            requests = requests_for(IMAGE, count, megapixels=megapixels)
            received = responses_to(bench, responses, requests)
            ids = {str(request["request_id"]) for request in requests}
            further = duplicates(responses, ids, DUPLICATES_S)
    finally:
        bench.close()
    first = {timed.request_id for timed in received}
    return {
        "workers": workers,
        "per_second": per_second(received),
        "sent": count,
        "answered": len(first),
        "lost": len(ids - first),
        "duplicates": len(received) - len(first) + len(further),
        "errors": sum(timed.response["status"] != "success" for timed in received),
    }


def rows(runs: Sequence[Result]) -> list[tuple[str, ...]]:
    one = next((run["per_second"] for run in runs if run["workers"] == 1), None)
    return [
        (
            str(run["workers"]),
            f"{run['per_second']:.2f}",
            f"x {run['per_second'] / one:.2f}" if one else "",
            *(str(run[name]) for name in HEADER[3:]),
        )
        for run in runs
    ]


if __name__ == "__main__":
    main()
