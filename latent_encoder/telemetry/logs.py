"""Logging: one stream, standard error, as JSON lines or as text, for our events and for what ComfyUI and others log.

Events go through the standard library's logging: whoever uses this code as a library configures that as ever.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TextIO

import structlog
from structlog.typing import FilteringBoundLogger, Processor

from config import Settings
from errors import one_line
from latent_encoder.terminal import takes_colours

ERASE_LINE = "\r\x1b[K"

AT_THE_DESK = ("standalone", "inspect", "doctor")  # the modes that a person waits for


class LogStyle(NamedTuple):
    """What is logged, and how."""

    level: str
    log_format: str
    tracebacks: bool


def log_style(settings: Settings, *, quiet: bool = False, verbose: bool = False, debug: bool = False) -> LogStyle:
    """How to log in that mode. On a terminal, a person who set nothing sees warnings as text, not every event as JSON."""
    bare = not settings.model_fields_set & {"log_level", "log_format"}
    watched = bare and settings.mode in AT_THE_DESK and sys.stderr.isatty()
    as_text = watched or ((verbose or debug) and "log_format" not in settings.model_fields_set)
    level: str = "WARNING" if watched else settings.log_level
    for wish, asked in (("ERROR", quiet), ("INFO", verbose), ("DEBUG", debug)):
        level = wish if asked else level
    return LogStyle(level, "text" if as_text else settings.log_format, debug or settings.mode == "kafka")


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger for events with fields: `log.info("request encoded", request_id=…)`."""
    logger: FilteringBoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[structlog.contextvars.merge_contextvars, structlog.stdlib.render_to_log_kwargs],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    return logger


def configure_logging(level: str, log_format: str, tracebacks: bool = True, *, beside_bar: bool = False) -> None:
    """Send everything that is logged, and Python's warnings, to standard error.

    `log_format` is `json` or `text`; without `tracebacks`, of an exception no more is shown than what it says. `beside_bar`
    says that another process draws a progress bar on the same terminal.
    """
    as_json = log_format == "json"
    renderer: Processor = (
        structlog.processors.JSONRenderer(ensure_ascii=False)
        if as_json
        else structlog.dev.ConsoleRenderer(colors=takes_colours(sys.stderr), exception_formatter=structlog.dev.plain_traceback)
    )
    handler = StderrHandler(beside_bar)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.stdlib.ExtraAdder(),
                structlog.processors.TimeStamper(fmt="iso", utc=True),
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *([] if tracebacks else [_without_traceback]),
                *([structlog.processors.dict_tracebacks] if as_json else []),
                renderer,
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)
    logging.captureWarnings(capture=True)


def _without_traceback(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Keep an exception's class and text of it, on one line."""
    exc_info = event.pop("exc_info", None)
    event.pop("stack_info", None)
    exc = exc_info[1] if isinstance(exc_info, tuple) else exc_info
    if isinstance(exc, BaseException):
        event["error"] = f"{type(exc).__name__}: {one_line(exc)}"
    return event


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at the time, above the progress bars that are drawn there."""

    def __init__(self, beside_bar: bool) -> None:
        super().__init__()
        self._beside_bar = beside_bar

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        with _bars_cleared():
            if self._beside_bar and self.stream.isatty():
                self.stream.write(ERASE_LINE)  # the other process draws the bar anew soon
            super().emit(record)


def _bars_cleared() -> AbstractContextManager[None]:
    """Take tqdm's bars off the terminal, and draw them again afterwards; nothing where there can be none."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if tqdm is None or not sys.stderr.isatty():
        return nullcontext()
    bars: AbstractContextManager[None] = tqdm.external_write_mode(file=sys.stderr)
    return bars
