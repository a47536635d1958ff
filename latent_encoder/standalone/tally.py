"""The counts of a run, and its summary in words."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta

from latent_encoder.standalone.ordering import Outcome
from models import ErrorResponse

HIDING = "transparency, whose hidden colours are encoded"


@dataclass
class RunTally:
    """The counts of images of a run so far."""

    started: float = field(default_factory=time.monotonic)
    encoded: int = 0
    stored: int = 0
    hiding: int = 0
    """Images with transparency, of which the colours under it were encoded, now or before."""
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        if isinstance(outcome.response, ErrorResponse):
            self.failed[outcome.response.error_code] += 1
            return
        self.hiding += "alpha_dropped" in outcome.response.metadata.image_notes
        if outcome.stored:
            self.stored += 1
        else:
            self.encoded += 1

    @property
    def failures(self) -> int:
        return self.failed.total()

    @property
    def done(self) -> int:
        return self.encoded + self.stored + self.failures

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def failures_by_code(self) -> str:
        """The count of each error code, the most frequent first."""
        return ", ".join(f"{code}: {count}" for code, count in self.failed.most_common())

    def __str__(self) -> str:
        codes = f" ({self.failures_by_code})" if self.failed else ""
        counts = f"{self.encoded} encoded, {self.stored} done before, {self.failures} failed{codes}"
        speed = f", {60 * self.encoded / self.seconds:.3g} a minute" if self.encoded else ""
        hiding = f"; {self.hiding} with {HIDING} (see --alpha)" if self.hiding else ""
        return f"{counts}, in {timedelta(seconds=round(self.seconds))}{speed}{hiding}"
