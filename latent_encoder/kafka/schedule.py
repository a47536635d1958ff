"""The choice of the jobs that begin next. The functions are pure."""

from __future__ import annotations

from collections.abc import Sequence

from latent_encoder.kafka.jobs import RecordJob, State


def to_begin(jobs: Sequence[RecordJob], prefetch: int, now: float) -> list[RecordJob]:
    """Return the jobs to begin now, out of all jobs in the order in which they were taken.

    `prefetch` is the most jobs to have begun at a time, `now` seconds of the monotonic clock. A suspect runs alone.
    """
    begun = [job for job in jobs if job.begun]
    due = [job for job in jobs if job.state is State.WAITING and job.due_at <= now]
    suspects = [job for job in due if job.suspect]
    if suspects or any(job.suspect for job in begun):
        return [] if begun else suspects[:1]
    return due[: max(0, prefetch - len(begun))]
