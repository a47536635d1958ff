"""Logging to standard error, as JSON lines or as text, for our events and for those of ComfyUI and other libraries.

Events go through the standard library's logging, so a program that uses this code as a library configures them as usual.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TextIO

import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import FilteringBoundLogger, Processor

from config import Settings
from errors import RequestError, UnexpectedError, one_line
from latent_encoder.masking import masked
from latent_encoder.terminal import ERASE_LINE, complain, is_dumb, takes_colours

OUR_FIELDS = ("level", "logger", "timestamp")
"""The fields of every event whose values are ours: a secret such as `info` must not change them."""

AT_THE_DESK = ("standalone", "inspect", "doctor", "compare")
"""The modes whose result a person waits for."""


class LogStyle(NamedTuple):
    """The lowest level that is logged, and the form of the log."""

    level: str
    log_format: str
    tracebacks: bool

    @property
    def watched(self) -> bool:
        """A person reads the log as text, and wants no events of success."""
        return self.log_format == "text" and self.level in ("WARNING", "ERROR")


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

    Tracebacks have no values of variables, and known secrets are masked. `log_format` is `json` or `text`. Without
    `tracebacks`, an exception is logged as one line. With `beside_bar`, another process draws a progress bar on the same
    terminal.
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
                TRACEBACK_AS_FIELDS if as_json else structlog.processors.format_exc_info,
                _without_secrets,
                renderer,
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)
    logging.captureWarnings(capture=True)


TRACEBACK_AS_FIELDS = structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False))
"""The traceback of a JSON event. structlog's default adds the local variables of each frame: settings, properties, headers."""


def log_stray_exceptions() -> None:
    """Log exceptions that end a thread or that nobody can catch, instead of printing them as Python does."""
    log = get_logger("latent_encoder")

    def of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            name = args.thread.name if args.thread else ""
            log.error("a thread ended by an unexpected error", thread_name=name, exc_info=args.exc_value)

    def of_nobody(args: sys.UnraisableHookArgs) -> None:
        log.error("an unexpected error was ignored", exc_info=args.exc_value)

    threading.excepthook, sys.unraisablehook = of_thread, of_nobody


def _without_secrets(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Mask secrets in the values of an event."""
    for name, value in event.items():
        if name not in OUR_FIELDS:
            event[name] = _masked_value(value)
    return event


def _masked_value(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Mapping):
        return {masked(key) if isinstance(key, str) else key: _masked_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_masked_value(inner) for inner in value]
    text = repr(value)  # as the renderers show it
    return value if masked(text) == text else masked(text)


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
            if self._beside_bar and self.stream.isatty() and not is_dumb():
                self.stream.write(ERASE_LINE)  # the other process soon draws the bar again
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the name is Python's
        """Report an event that cannot be written in one line; Python's own report shows its arguments."""
        exc = sys.exception()
        if not isinstance(exc, OSError):  # nobody reads this stream any more
            complain(f"Error: A log event of {record.name} cannot be written ({type(exc).__name__}).")


def _bars_cleared() -> AbstractContextManager[None]:
    """Return a context that clears tqdm's bars off the terminal and draws them again at its end."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if tqdm is None or not sys.stderr.isatty():
        return nullcontext()
    bars: AbstractContextManager[None] = tqdm.external_write_mode(file=sys.stderr)
    return bars
