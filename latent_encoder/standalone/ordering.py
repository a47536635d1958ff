"""A run over many images: what is fed in, what comes out in the order of the input, and how a run is stopped early."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final, Literal, Protocol

from latent_encoder.standalone.inputs import Item, Refusal
from models import EncodeRequest, Response


@dataclass(frozen=True)
class Outcome:
    """What an image came to. `stored`: it was not encoded, since its files were there, whole and matching."""

    response: Response
    correlation_id: str | None
    stored: bool = False


Report = Callable[[int, Outcome], None]

STOP: Final = "stop"
END: Final = "end"


class Engine(Protocol):
    """What encodes: in this process, or in several of its own. It calls the `Report` that it was made with from any thread."""

    capacity: int
    """How many requests it holds at most."""

    def start(self) -> None:
        """Get ready to encode.

        Raises:
            SetupError: the service cannot start.
        """

    def submit(self, number: int, request: EncodeRequest) -> None:
        """Begin a request. Not more at a time than `capacity`."""

    def drop_unstarted(self) -> None:
        """Forget requests whose encode has not begun: no outcome of them is reported any more."""

    def finish(self) -> None:
        """Wait until all that it has is reported or forgotten."""

    def abort(self) -> None:
        """Make sure that no file is half written, now and until the process ends, and end all others."""


class Batch:
    """One run. Everything slow is in threads, so that whoever iterates over it can be interrupted at any moment."""

    def __init__(self, items: Iterable[Item], make_engine: Callable[[Report], Engine]) -> None:
        self._items = items
        self._engine = make_engine(self._report)
        self._room = threading.Semaphore(self._engine.capacity)
        self._started = threading.Event()
        self._stopping = threading.Event()
        self._events: SimpleQueue[tuple[int, Outcome] | BaseException | Literal["stop", "end"]] = SimpleQueue()

    def outcomes(self) -> Iterator[Outcome]:
        """The outcome of each image, in the order of the input; after `stop`, of those that had been begun.

        Raises:
            SetupError: the service cannot start.
        """
        # Two threads, since what OpenMP keeps for one that ends is gone with it: see stages.py.
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
        """Begin no further image; those whose encode has begun are finished. A signal handler may call it."""
        self._events.put(STOP)

    def _reported(self) -> Iterator[tuple[int, Outcome]]:
        while (event := self._events.get()) != END:
            if event == STOP:
                self._stop()
            elif isinstance(event, BaseException):
                raise event
            else:
                yield event

    def _stop(self) -> None:
        if self._stopping.is_set():
            return
        self._stopping.set()
        if not self._started.is_set():
            self._events.put(END)
            return
        self._engine.drop_unstarted()
        # In a thread of its own, since the one that feeds may wait for a line of standard input.
        threading.Thread(target=self._finish, name="finish", daemon=True).start()

    def abort(self) -> None:
        """Leave no file half written; the process has to end right afterwards."""
        self._engine.abort()

    def _report(self, number: int, outcome: Outcome) -> None:
        self._events.put((number, outcome))
        self._room.release()

    def _start(self) -> None:
        try:
            self._engine.start()
        except BaseException as exc:  # raised anew by `outcomes`
            self._events.put(exc)
        else:
            self._started.set()
            threading.Thread(target=self._feed, name="feed", daemon=True).start()

    def _feed(self) -> None:
        try:
            for number, item in enumerate(self._items):
                self._room.acquire()
                if self._stopping.is_set():
                    return
                if isinstance(item, Refusal):
                    self._report(number, Outcome(item.response, item.correlation_id))
                else:
                    self._engine.submit(number, item)
        except BaseException as exc:  # raised anew by `outcomes`
            self._events.put(exc)
        else:
            self._finish()

    def _finish(self) -> None:
        self._engine.finish()
        self._events.put(END)
