"""Calls that are due at a later time, and calls that other threads leave for the thread that polls."""

from __future__ import annotations

import threading
from functools import partial

from latent_encoder.kafka.events import Events
from latent_encoder.kafka.timers import Timers


def test_calls_are_made_when_they_are_due() -> None:
    """Each call is made once, the earliest first, and those of the same time in their order."""
    now, made = [0.0], list[str]()
    timers = Timers(lambda: now[0])
    for name, seconds in (("late", 5.0), ("first", 1.0), ("second", 1.0), ("at once", 0.0)):
        timers.after(seconds, partial(made.append, name))
    for moment in (0.0, 0.9, 1.0, 4.9, 5.0, 60.0):
        now[0] = moment
        timers.run_due()
        made.append(f"{moment:g}")
    assert made == ["at once", "0", "0.9", "first", "second", "1", "4.9", "late", "5", "60"]


def test_call_that_sets_a_timer_is_not_repeated_in_the_same_run() -> None:
    """A call that has itself made again later ends the run."""
    now, made = [0.0], list[int]()
    timers = Timers(lambda: now[0])

    def again() -> None:
        made.append(len(made))
        timers.after(1.0, again)

    timers.after(0.0, again)
    timers.run_due()
    assert made == [0]
    now[0] = 1.0
    timers.run_due()
    assert made == [0, 1]


def test_posted_calls_are_made_by_the_thread_that_runs_them() -> None:
    """They keep their order and their arguments; without any, waiting ends after the timeout."""
    events, made = Events(), list[tuple[int, int]]()
    post = events.posted(lambda n: made.append((n, threading.get_ident())))
    poster = threading.Thread(target=lambda: [post(n) for n in range(3)])
    poster.start()
    poster.join()
    assert made == []
    events.run(0)
    assert made == [(n, threading.get_ident()) for n in range(3)]
    events.run(0.001)
