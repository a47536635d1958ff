"""The CPUs of this process, and the counts of threads and of requests in hand that follow from them."""

from __future__ import annotations

from config import Settings

MOST_PREPARE_THREADS = 8
"""Most threads that prepare images by default: with more, a fast GPU is busy already, and each takes memory."""


WAITING = 16
"""Requests that may wait for storage beside those that keep the CPUs busy. With calls of 50 ms, reading takes 0.1 s and
writing 0.25 s, so they are enough for 45 images a second. Each may hold the bytes of its image, or of its files."""


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
    """Return KAFKA_PREFETCH, by default a request for each thread that prepares, and the one that is encoded.

    If requests may have URLs, it is more by those that wait for storage.
    """
    waiting = WAITING if settings.allowed_input_urls or settings.allowed_output_urls else 0
    return settings.kafka_prefetch or prepare_threads(settings) + 1 + waiting


def most_prepared(settings: Settings) -> int:
    """Return the most images whose pixels may be in memory: one for each thread that prepares, one encoded, one written.

    If KAFKA_PREFETCH is set, it is that number, if it is larger.
    """
    return max(settings.kafka_prefetch or 0, prepare_threads(settings) + 2)
