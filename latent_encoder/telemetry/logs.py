"""Logging to standard error, as JSON lines or as text, for our events and for those of ComfyUI and other libraries.

Events go through the standard library's logging, so a program that uses this code as a library configures them as usual.
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
from errors import RequestError, UnexpectedError, one_line
from latent_encoder.terminal import takes_colours

ERASE_LINE = "\r\x1b[K"

AT_THE_DESK = ("standalone", "inspect", "doctor")
"""The modes whose result a person waits for."""


class LogStyle(NamedTuple):
    """The lowest level that is logged, and the form of the log."""

    level: str
    log_format: str
    tracebacks: bool


def log_style(settings: Settings, *, quiet: bool = False, verbose: bool = False, debug: bool = False) -> LogStyle:
    """Return the style of a mode. On a terminal, a person who set nothing sees warnings as text, not every event as JSON."""
    bare = not settings.model_fields_set & {"log_level", "log_format"}
    watched = bare and settings.mode in AT_THE_DESK and sys.stderr.isatty()
    as_text = watched or ((verbose or debug) and "log_format" not in settings.model_fields_set)
    level: str = "WARNING" if watched else settings.log_level
    for wish, asked in (("ERROR", quiet), ("INFO", verbose), ("DEBUG", debug)):
        level = wish if asked else level
    return LogStyle(level, "text" if as_text else settings.log_format, debug or settings.mode == "kafka")


def get_logger(name: str) -> FilteringBoundLogger:
    """Return a logger for events with fields: `log.info("request encoded", request_id=…)`."""
    logger: FilteringBoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[structlog.contextvars.merge_contextvars, structlog.stdlib.render_to_log_kwargs],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    return logger


def log_failure(error: RequestError, **fields: Any) -> None:
    """Log the failure of a request, with the traceback if the fault is ours."""
    log = get_logger("latent_encoder")
    if isinstance(error, UnexpectedError):
        log.error("request failed unexpectedly", error_code=error.code, exc_info=error.__cause__, **fields)
    else:
        log.warning("request failed", error_code=error.code, reason=str(error), **fields)


def configure_logging(level: str, log_format: str, tracebacks: bool = True, *, beside_bar: bool = False) -> None:
    """Send all log events, and Python's warnings, to standard error.

    `log_format` is `json` or `text`. Without `tracebacks`, an exception is logged as one line. With `beside_bar`, another
    process draws a progress bar on the same terminal.
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
    """Replace an exception by its class and text on one line."""
    exc_info = event.pop("exc_info", None)
    event.pop("stack_info", None)
    exc = exc_info[1] if isinstance(exc_info, tuple) else exc_info
    if isinstance(exc, BaseException):
        event["error"] = f"{type(exc).__name__}: {one_line(exc)}"
    return event


class StderrHandler(logging.StreamHandler[TextIO]):
    """A handler that writes to the current `sys.stderr`, above the progress bars that are drawn there."""

    def __init__(self, beside_bar: bool) -> None:
        super().__init__()
        self._beside_bar = beside_bar

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        with _bars_cleared():
            if self._beside_bar and self.stream.isatty():
                self.stream.write(ERASE_LINE)  # the other process soon draws the bar again
            super().emit(record)


def _bars_cleared() -> AbstractContextManager[None]:
    """Return a context that clears tqdm's bars off the terminal and draws them again at its end."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if tqdm is None or not sys.stderr.isatty():
        return nullcontext()
    bars: AbstractContextManager[None] = tqdm.external_write_mode(file=sys.stderr)
    return bars
