"""Calls to a server that are repeated a bounded number of times if the fault may pass."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.watching import CallFailed, Reason, count_retry
from latent_encoder.telemetry.logs import get_logger

log = get_logger("latent_encoder")

FIRST_PAUSE_S = 0.2
"""Seconds before the first repetition; doubled each time. Amazon advises clients to wait so after `503 Slow Down`."""
LONGEST_PAUSE_S = 10.0
"""Seconds. A longer pause would hold the threads that prepare and write for one request."""

THROTTLING = (429, 503)
"""Statuses with which servers ask for fewer calls: 503 is `Slow Down` in S3."""

_STATUS = re.compile(r"^(?:HTTP status (\d{3})$|(\d{3}) [A-Z])")
_TIMEOUT = re.compile(r"timed out|timeout|no complete response within", re.IGNORECASE)

R = TypeVar("R")


class Unavailable(CallFailed):
    """A call that failed for a reason that may pass: no connection, a time-out, throttling, or an error of the server."""

    outcome = "unavailable"

    def __init__(self, reason: str, pause_s: float | None = None) -> None:
        super().__init__(reason)
        self.pause_s = pause_s
        """Seconds that the server asks to wait."""

    @property
    def kind(self) -> Reason:
        """The reason as one of a few words, for a metric."""
        if found := _STATUS.match(str(self)):
            return "throttled" if int(found[1] or found[2]) in THROTTLING else "server_error"
        return "timeout" if _TIMEOUT.search(str(self)) else "connection"


def nothing() -> None:
    """Do nothing before a call is made again."""


def repeated(call: Callable[[int], R], limits: AllowedUrls, place: str, before: Callable[[], None] = nothing) -> R:
    """Return the result of a call, which is repeated while it is `Unavailable`.

    `call` gets the number of its repetition, 0 for the first attempt. `place` is its URL without a query, for the log.
    `before`
    is called before each repetition, which it ends if it raises an error.

    Raises:
        Unavailable: the last repetition failed too.
    """
    for number in range(limits.retries + 1):
        try:
            return call(number)
        except Unavailable as exc:
            if number == limits.retries:
                raise
            pause = exc.pause_s if exc.pause_s is not None else FIRST_PAUSE_S * 2**number
            pause = min(pause, LONGEST_PAUSE_S) * random.uniform(0.75, 1.25)  # noqa: S311  # no secret
            log.info("call to storage is repeated", place=place, reason=str(exc), after_s=round(pause, 2), attempt=number + 1)
            count_retry(place, exc.kind)
            time.sleep(pause)
            before()
    raise AssertionError("unreachable")
