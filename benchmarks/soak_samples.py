"""What a service's process needs and says while it works: samples of its memory, files, threads and `/metrics`."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import psutil
from prometheus_client.parser import text_string_to_metric_families

METRICS = ("latent_encoder_", "process_")
TIMEOUT_S = 10.0

Series = tuple[str, Mapping[str, str], float]


@dataclass(frozen=True)
class Sample:
    """One look at the process; `at` is in seconds since the soak began, `metrics` are name, labels and value."""

    at: float
    resident_bytes: int
    open_files: int
    threads: int
    metrics: Sequence[Series]


def take_sample(process: psutil.Process, port: int, at: float) -> Sample:
    """Look at the process, from outside and by what it says of itself."""
    with process.oneshot():
        resident, files, threads = process.memory_info().rss, process.num_fds(), process.num_threads()
    return Sample(at, resident, files, threads, scrape(port))


def scrape(port: int) -> list[Series]:
    """The series of `/metrics` that are the service's, but for the buckets of its histograms."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=TIMEOUT_S) as answer:
        text = answer.read().decode()
    return [
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(METRICS) and not sample.name.endswith(("_bucket", "_created"))
    ]


def total(metrics: Sequence[Series], name: str, **labels: str) -> float:
    """The sum of the series of that name that have these labels."""
    return sum(value for series, has, value in metrics if series == name and labels.items() <= has.items())


@dataclass(frozen=True)
class Trend:
    """A quantity over the soak: its medians in a fifth of the time each at the start, in the middle and at the end."""

    start: float
    middle: float
    end: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Trend:
        """The values are those of samples at even distances, at least one."""
        length = max(len(values) // 5, 1)
        middle = (len(values) - length) // 2
        return cls(median(values[:length]), median(values[middle : middle + length]), median(values[-length:]))

    @property
    def deviation(self) -> float:
        """How far the middle or the end is from the start, whichever is farther, as a part of it; below 0 where it fell."""
        return max((self.middle, self.end), key=lambda value: abs(value - self.start)) / self.start - 1

    @property
    def grew(self) -> bool:
        return self.end > self.start
