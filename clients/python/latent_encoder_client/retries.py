"""The number of attempts for a request, and the pauses between them."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Retries:
    """Attempts and pauses. The pause doubles with each attempt; a random part keeps many clients from retrying together."""

    attempts: int = 3
    """The most times that a request is sent. The service itself has retried a failure before it responds."""
    first_pause_s: float = 1.0
    longest_pause_s: float = 30.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or not 0 <= self.first_pause_s <= self.longest_pause_s:
            raise ValueError("Retries need at least one attempt, and 0 <= first_pause_s <= longest_pause_s")

    def pause_s(self, attempts: int) -> float:
        """Return the pause after that many attempts, in seconds: half of it is fixed, half is random."""
        longest = min(self.first_pause_s * 2.0 ** min(attempts - 1, 32), self.longest_pause_s)
        return longest * random.uniform(0.5, 1)  # noqa: S311  # it spreads load, and hides nothing
