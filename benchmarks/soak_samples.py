"""Samples of a working service's process: memory, open files, threads and `/metrics`."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import psutil
from prometheus_client.parser import text_string_to_metric_families

METRICS = ("latent_encoder_", "process_")
TIMEOUT_S = 10.0
SIXTHS = 6  # ten minutes each in an hour: long enough for each VAE to be loaded and dropped many times

Series = tuple[str, Mapping[str, str], float]


@dataclass(frozen=True)
class Sample:
    """The state of the process at a time; `at` is in seconds since the soak began, `metrics` are name, labels and value."""

    at: float
    resident_bytes: int
    open_files: int
    threads: int
    metrics: Sequence[Series]


def take_sample(process: psutil.Process, port: int, at: float) -> Sample:
    """Take a sample of the process, from the system and from its `/metrics`."""
    with process.oneshot():
        resident, files, threads = process.memory_info().rss, process.num_fds(), process.num_threads()
    return Sample(at, resident, files, threads, scrape(port))


def scrape(port: int) -> list[Series]:
    """Return the service's series of `/metrics`, except the buckets of its histograms."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=TIMEOUT_S) as response:
        text = response.read().decode()
    return [
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(METRICS) and not sample.name.endswith(("_bucket", "_created"))
    ]


def total(metrics: Sequence[Series], name: str, **labels: str) -> float:
    """Return the sum of the series with that name and these labels."""
    return sum(value for series, has, value in metrics if series == name and labels.items() <= has.items())


@dataclass(frozen=True)
class Trend:
    """A quantity over the soak, compared between the second and the last sixth of the time.

    The first sixth is left out, because the largest images and every combination of VAEs in memory come by chance.
    """

    sixths: tuple[float, ...]
    """The median over each sixth."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Trend:
        """Return the trend of at least SIXTHS values, sampled at even distances."""
        ends = [len(values) * number // SIXTHS for number in range(SIXTHS + 1)]
        return cls(tuple(median(values[start:end]) for start, end in pairwise(ends)))

    @property
    def start(self) -> float:
        return self.sixths[1]

    @property
    def end(self) -> float:
        return self.sixths[-1]

    @property
    def deviation(self) -> float:
        """The change, as a part of the start."""
        return self.end / self.start - 1

    @property
    def grew(self) -> bool:
        return self.end > self.start
