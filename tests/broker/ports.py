"""Free ports for brokers."""

from __future__ import annotations

import itertools
import os
import random
import socket
from collections.abc import Iterable

from tests.broker.interface import BrokerError

# Systems number the client's end of a connection from 32768 on. Such a port could be taken while its broker restarts, even by
# a client that tries to reach that broker.
CANDIDATES = range(20_000, 32_000)

_chosen: set[int] = set()
"""The ports that this process chose so far. A server that is starting listens on some of its ports only."""


def is_free(port: int) -> bool:
    """Return whether a broker could listen on the port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections do not hinder a broker either
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def require_free(ports: Iterable[int]) -> None:
    """Raise BrokerError if something listens on one of the ports: the tests would take it for their broker."""
    if taken := [port for port in ports if not is_free(port)]:
        raise BrokerError(f"something else listens on port {taken[0]}")


def free_ports(count: int) -> list[int]:
    """Return `count` ports on which nothing listens, at random so that two test runs do not choose the same ones.

    Test processes that run side by side choose from different ports: a chosen port is free until a broker has started.
    """
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    own = CANDIDATES[number :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))]
    candidates = random.SystemRandom().sample(own, len(own))
    chosen = list(itertools.islice((port for port in candidates if port not in _chosen and is_free(port)), count))
    _chosen.update(chosen)
    return chosen
