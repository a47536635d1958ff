"""Logins that a broker refuses after it accepted others: a password that is being changed, a token endpoint that is away."""

from __future__ import annotations

from collections.abc import Callable

from confluent_kafka import KafkaError

LOGIN_REFUSED = {
    KafkaError._AUTHENTICATION,  # librdkafka's own: also a handshake that broke off, and a token that it could not get
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError.UNSUPPORTED_SASL_MECHANISM,
    KafkaError.ILLEGAL_SASL_STATE,
}
"""Errors of a login. They may pass: credentials are changed on the broker and in the service one after the other."""

QUIET_S = 60.0
"""Time without such an error after which a refusal counts as over. librdkafka tries again at least every 10 s, and reports the
same error of a broker every 30 s at most."""


class Login:
    """The refusals of one client since it had a connection last."""

    def __init__(self, now: Callable[[], float]) -> None:
        """`now` returns seconds of a clock that never goes back."""
        self._now = now
        self._error: KafkaError | None = None
        self._first: float | None = None
        self._last: float | None = None

    @property
    def refusal(self) -> KafkaError | None:
        """The last error of the refusals that go on; None if the client has a connection, or other troubles."""
        return self._error if self._first is not None and self.recent else None

    @property
    def refused_for(self) -> float:
        """Seconds since the first of the refusals that go on."""
        return 0.0 if self._first is None else self._now() - self._first

    @property
    def recent(self) -> bool:
        """A login was refused a moment ago."""
        return self._last is not None and self._now() - self._last <= QUIET_S

    def refused(self, error: KafkaError) -> None:
        """Note a refusal."""
        if self._first is None or not self.recent:
            self._first = self._now()
        self._error, self._last = error, self._now()

    def accepted(self) -> None:
        """Note that the client has a connection."""
        self._first = None
