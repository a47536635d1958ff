"""The CPUs of this process, and the counts of threads and of requests in hand that follow from them."""

from __future__ import annotations

from config import Settings

MOST_PREPARE_THREADS = 8
"""Most threads that prepare images by default: with more, a fast GPU is busy already, and each takes memory."""


def usable_cpus() -> int:
    """Return the count of CPUs that this process may use, by its affinity and by the quota of its control group."""
    from loky import cpu_count  # slow to import

    return int(cpu_count())


def prepare_threads(settings: Settings, processes: int = 1) -> int:
    """Return PREPARE_THREADS for each of some processes that share the CPUs.

    By default it is one less than the CPUs: the encode has one of its own, also beside a GPU.
    """
    return settings.prepare_threads or max(1, min(usable_cpus() // processes - 1, MOST_PREPARE_THREADS))


def prefetch(settings: Settings) -> int:
    """Return KAFKA_PREFETCH, by default a request for each thread that prepares, and the one that is encoded."""
    return settings.kafka_prefetch or prepare_threads(settings) + 1
