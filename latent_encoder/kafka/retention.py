"""Retention of output files in Kafka mode: a thread that removes expired sets from OUTPUT_DIR, if OUTPUT_TTL_DAYS is set."""

from __future__ import annotations

import random
import threading

from config import Settings
from errors import AccessDenied
from latent_encoder.access import AllowedFolders, absolute
from latent_encoder.outputs.expiry import Sweep
from latent_encoder.storage.locations import is_url
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.telemetry.metrics import EXPIRED_BYTES, EXPIRED_SETS

log = get_logger("latent_encoder")

DAY_S = 86_400.0

SWEEPS_IN_A_TTL = 24
"""A set stays at most a 24th longer than asked for: an hour for a day."""

LONGEST_PAUSE_S = 3600.0
"""Longest time between two sweeps, so that the disk gets its space back within an hour."""

SHORTEST_PAUSE_S = 1.0
"""Shortest time between two sweeps, for the smallest fractions of a day."""

MOST_SETS = 1000
"""Sets that one sweep removes. Each is read for its checksums, about 3 MB for a megapixel."""

BREATH_S = 10.0
"""Time until the next sweep after one that left expired sets over, so that encodes have the disk meanwhile."""


class Retention:
    """The thread, or none if output files are kept for ever."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._allowed = AllowedFolders("ALLOWED_OUTPUT_DIRS", settings.allowed_output_dirs)
        self._closed = threading.Event()
        self._reported: str | None = None

    def start(self) -> None:
        """Sweep now and from time to time. Workers on one folder may sweep at once: a set is removed by one of them.

        Objects in a bucket are removed by its own rules.
        """
        if self._settings.output_ttl_days is not None and not is_url(self._settings.output_dir):
            threading.Thread(
                target=self._run, args=[self._settings.output_ttl_days * DAY_S], name="retention", daemon=True
            ).start()

    def close(self) -> None:
        """End the thread after the set that it removes, without waiting for that."""
        self._closed.set()

    def _run(self, ttl_s: float) -> None:
        usual = min(max(ttl_s / SWEEPS_IN_A_TTL, SHORTEST_PAUSE_S), LONGEST_PAUSE_S)
        while not self._closed.is_set():
            full = self._sweep(ttl_s)
            # Varied, so that workers that were started together do not read the folder together.
            self._closed.wait(min(usual, BREATH_S) if full else usual * random.uniform(0.5, 1))  # noqa: S311

    def _sweep(self, ttl_s: float) -> bool:
        """Remove expired sets, and return whether more may be left."""
        sweep, folder = Sweep(ttl_s, MOST_SETS, self._closed.is_set), absolute(self._settings.output_dir)
        try:
            sweep.run(folder, self._allowed)
        except AccessDenied as exc:
            self._report(str(exc), 1)
        except OSError as exc:
            sweep.removed.failed(folder, exc)
        except Exception:  # the worker goes on without
            log.exception("the sweep for expired output files failed")
        removed = sweep.removed
        EXPIRED_SETS.inc(removed.sets)
        EXPIRED_BYTES.inc(removed.bytes)
        if removed.files:
            counts = {"sets": removed.sets, "files": removed.files, "bytes": removed.bytes}
            log.info("expired output files removed", folder=str(folder), **counts)
        if removed.reason is not None:
            self._report(removed.reason, removed.failures)
        return sweep.full

    def _report(self, reason: str, count: int) -> None:
        """Log that files cannot be removed, unless the sweep before had the same reason."""
        if reason != self._reported:
            log.warning("expired output files cannot be removed", reason=reason, count=count)
        self._reported = reason
