"""A request that awaits its response."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from latent_encoder_client.responses import Failure, Success


@dataclass(eq=False)
class Pending:
    """A request from `Client.send` to the end of its future."""

    request_id: str
    value: bytes
    """The value of its record, the same for each attempt."""
    timeout_s: float
    deadline: float
    """Time of the monotonic clock after which nobody waits for it."""
    due: float | None = None
    """Time of the next attempt; None while a response is awaited."""
    attempts: int = 0
    last_failure: Failure | None = None
    future: Future[Success] = field(default_factory=Future)

    def succeed(self, success: Success) -> None:
        """Give the future its result, unless it was cancelled."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(success)

    def fail(self, error: Exception) -> None:
        """Give the future its error, unless it was cancelled."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)
