"""The last line of a terminal on standard error: the step that a person waits for, then the bar of a run over many images.

Both are tqdm's, because log lines are written above those.
"""

from __future__ import annotations

import sys
import threading
from contextlib import AbstractContextManager
from types import TracebackType
from typing import NoReturn, Self

from tqdm import tqdm

from latent_encoder.columns import shortened
from latent_encoder.standalone.screen import Screen
from latent_encoder.terminal import ERASE_LINE, STDERR, complain, complain_at_once, is_dumb

WIDE_BAR = "{n_fmt}/{total_fmt}{postfix} |{bar}| {rate_fmt}, {remaining} left"
NARROW_BAR = "{n_fmt}/{total_fmt}{postfix} |{bar}| {remaining} left"
FOR_RATE = 60
"""The fewest columns of a bar that shows the rate: below, the bar itself has no room."""

TICK_S = 0.1
"""Seconds between two updates of the time that is shown with one decimal."""


class Progress:
    """The last line. Nothing is shown if standard error is no terminal, or if `quiet`."""

    def __init__(self, *, quiet: bool) -> None:
        self._shown = sys.stderr.isatty() and not quiet
        self._changeable = self._shown and not is_dumb()
        self._lock = threading.Lock()
        self._waiting: _Waiting | None = None
        self._bar: tqdm[NoReturn] | None = None
        self._closed = False

    def wait_for(self, step: str) -> None:
        """Show a step and the seconds that it takes. The line is erased at its end."""
        with self._lock:
            if self._closed:
                return
            self._stop_waiting()
            if self._changeable:
                self._waiting = _Waiting(step)
                self._waiting.start()
            elif self._shown:
                complain(f"{step} ...")

    def count(self, total: int | None) -> None:
        """Show a bar in place of the step that was waited for."""
        with self._lock:
            self._stop_waiting()
            if self._changeable and not self._closed:
                self._bar = tqdm(total=total, unit="image", bar_format=_bar_format(), dynamic_ncols=True)

    def advance(self, failures: int) -> None:
        """Count one image; `failures` is the number of all that failed so far."""
        if self._bar is not None:
            self._bar.bar_format = _bar_format()
            self._bar.set_postfix_str(f"{failures} failed", refresh=False)
            self._bar.update()

    def erased(self) -> AbstractContextManager[None]:
        """Return a context inside which the terminal has no last line, and no other thread writes log lines.

        A step that was waited for has ended then.
        """
        with self._lock:
            self._stop_waiting()
        context: AbstractContextManager[None] = tqdm.external_write_mode(file=sys.stderr)
        return context

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _exc: BaseException | None, _place: TracebackType | None) -> None:
        with self._lock:
            self._closed = True
            self._stop_waiting()
            if self._bar is not None:
                self._bar.close()

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.stop()
            self._waiting = None


class _Waiting:
    """A step with the seconds that it takes, updated by a thread of its own."""

    def __init__(self, step: str) -> None:
        self._screen = Screen(STDERR, sys.stderr.encoding)
        self._step = self._screen.shown(step)
        self._line: tqdm[NoReturn] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="waiting", daemon=True)

    def start(self) -> None:
        self._line = tqdm(bar_format=self._format(), leave=False, dynamic_ncols=True)
        self._thread.start()

    def stop(self) -> None:
        """Erase the line, even if `start` was interrupted."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._line is not None:
            self._line.close()
        complain_at_once(ERASE_LINE)  # tqdm erases its own text, not the `^C` that a terminal adds to it

    def _tick(self) -> None:
        while self._line is not None and not self._ended.wait(TICK_S):
            self._line.bar_format = self._format()
            self._line.refresh()

    def _format(self) -> str:
        """Return tqdm's format of the line, cut to the window."""
        rest = f" {self._screen.dots} 000.0 s"
        step = shortened(self._step, self._screen.columns - len(rest), self._screen.dots)
        return f"{step.replace('{', '{{').replace('}', '}}')} {self._screen.dots} {{elapsed_s:.1f}} s"


def _bar_format() -> str:
    return WIDE_BAR if Screen(STDERR, sys.stderr.encoding).columns >= FOR_RATE else NARROW_BAR
