"""A run over many images: feeding them to an engine, handing on outcomes in the order of the input, and stopping early."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Final, Literal, Protocol

from latent_encoder.exits import LOOK_FOR_SIGNALS_S
from latent_encoder.standalone.inputs import Input, RefusedInput
from models import EncodeRequest, Response


@dataclass(frozen=True)
class Outcome:
    """The response to one input."""

    response: Response
    image_path: str | None
    """The image, as it was given; None if the input is no request that names one."""
    correlation_id: str | None
    stored: bool = False
    """The image was not encoded, because its output files were complete and matched."""


Report = Callable[[int, Outcome], None]
"""Called with the number of an input and its outcome."""

STOP: Final = "stop"
END: Final = "end"

Event = tuple[int, Outcome] | BaseException | Literal["stop", "end"]


class Engine(Protocol):
    """The encoder of a run, in this process or in several of its own. It calls its `Report` from any thread."""

    capacity: int
    """The most requests without URLs that it holds at a time."""
    capacity_for_urls: int
    """The most requests with URLs that it holds at a time: more, because they wait for storage."""

    def start(self) -> None:
        """Get ready to encode.

        Raises:
            SetupError: the service cannot start.
        """

    def submit(self, number: int, request: EncodeRequest) -> None:
        """Begin a request. The caller never submits more than the two capacities at a time."""

    def drop_unstarted(self) -> None:
        """Forget requests whose encode has not begun. Their outcomes are not reported."""

    def finish(self) -> None:
        """Wait until every request was reported or forgotten."""

    def abort(self) -> None:
        """Make sure that no file is half written, now and until the process ends. End worker processes."""


class Batch:
    """One run. Everything slow is in threads, so that its consumer can be interrupted at any moment."""

    def __init__(self, inputs: Iterable[Input], make_engine: Callable[[Report], Engine], ready: Callable[[], None]) -> None:
        """`ready` is called when the engine is ready, from another thread and before the first outcome."""
        self._inputs = inputs
        self._engine = make_engine(self._report)
        self._ready = ready
        self._room = threading.Semaphore(self._engine.capacity)
        self._room_for_urls = threading.Semaphore(self._engine.capacity_for_urls)
        self._with_urls: set[int] = set()
        """Numbers of the requests with URLs that the engine holds."""
        self._started = threading.Event()
        self._stopping = threading.Event()
        self._events: SimpleQueue[Event] = SimpleQueue()

    def outcomes(self) -> Iterator[Outcome]:
        """Yield the outcome of each input, in the order of the input. After `stop`, those of the encodes that had begun.

        Raises:
            SetupError: the service cannot start.
        """
        # The start has a thread of its own: when it ends, so does its OpenMP pool (see stages.py).
        threading.Thread(target=self._start, name="start", daemon=True).start()
        waiting: dict[int, Outcome] = {}
        turn = 0
        for number, outcome in self._reported():
            waiting[number] = outcome
            while turn in waiting:
                yield waiting.pop(turn)
                turn += 1
        yield from (waiting[number] for number in sorted(waiting))

    def stop(self) -> None:
        """Begin no further image; encodes that have begun are finished. A signal handler may call this."""
        self._events.put(STOP)

    def _reported(self) -> Iterator[tuple[int, Outcome]]:
        while (event := self._next_event()) != END:
            if event == STOP:
                self._stop()
            elif isinstance(event, BaseException):
                raise event
            else:
                yield event

    def _next_event(self) -> Event:
        while True:
            with suppress(Empty):
                return self._events.get(timeout=LOOK_FOR_SIGNALS_S)

    def _stop(self) -> None:
        if self._stopping.is_set():
            return
        self._stopping.set()
        if not self._started.is_set():
            self._events.put(END)
            return
        self._engine.drop_unstarted()
        # In a thread of its own, because the feeding one may wait for a line of standard input.
        threading.Thread(target=self._finish, name="finish", daemon=True).start()

    def abort(self) -> None:
        """Leave no file half written. The process has to end right afterwards."""
        self._engine.abort()

    def _report(self, number: int, outcome: Outcome) -> None:
        self._events.put((number, outcome))
        if number in self._with_urls:
            self._with_urls.remove(number)
            self._room_for_urls.release()
        else:
            self._room.release()

    def _start(self) -> None:
        try:
            self._engine.start()
            self._ready()
        except BaseException as exc:  # raised again by `outcomes`
            self._events.put(exc)
        else:
            self._started.set()
            threading.Thread(target=self._feed, name="feed", daemon=True).start()

    def _feed(self) -> None:
        try:
            for number, entry in enumerate(self._inputs):
                self._make_room(number, entry)
                if self._stopping.is_set():
                    return
                if isinstance(entry, RefusedInput):
                    self._report(number, Outcome(entry.response, entry.image_path, entry.correlation_id))
                else:
                    self._engine.submit(number, entry)
        except BaseException as exc:  # raised again by `outcomes`
            self._events.put(exc)
        else:
            self._finish()

    def _make_room(self, number: int, entry: Input) -> None:
        """Wait until the engine may hold one request more."""
        if isinstance(entry, EncodeRequest) and entry.has_urls:
            self._room_for_urls.acquire()
            self._with_urls.add(number)
        else:
            self._room.acquire()

    def _finish(self) -> None:
        self._engine.finish()
        self._events.put(END)
