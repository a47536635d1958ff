"""The parsing of the command line and its failures, for any set of options.

Two things differ from click: an option may take several values in a row, and an option may belong to some modes only.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from glob import has_magic
from typing import Any, NoReturn, get_args

import click
import cloup
from click.core import ParameterSource

from config import Settings
from errors import one_line
from latent_encoder.cli.completion import COMPLETE_VAR, normalised
from latent_encoder.exits import EXIT_INTERRUPTED, EXIT_SERVICE_FAILED, EXIT_WRONG_USAGE
from latent_encoder.masking import masked
from latent_encoder.suggestions import closest
from latent_encoder.terminal import complain, drop_unwritten, forced_colours, open_closed_streams
from latent_encoder.user_paths import expanded_file

NO_FILE = ""
"""The value of an `OptionalPage` without one."""

PAGE_ENDING = ".html"

MODES: tuple[str, ...] = get_args(Settings.model_fields["mode"].annotation)


class Group(cloup.OptionGroup):
    """Options under one heading of the help. They are for the named modes, or for all modes if none is named."""

    def __init__(self, title: str, *modes: str) -> None:
        super().__init__(f"{title} ({', '.join(modes)})" if modes else title)
        self.modes = modes


class ManyValues(cloup.Option):
    """An option that takes every word up to the next option, and may be given several times: `--image-path a b`."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, multiple=True, **attributes)

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        """Refuse an option as a value: click would take `--force` of `--image-path --force` for a file."""
        values = super().process_value(ctx, value)
        if any(value.startswith("-") for value in values):
            raise click.BadOptionUsage(self.opts[0], f"Option {self.opts[0]!r} requires an argument.", ctx)
        return values


class OptionalPage(cloup.Option):
    """An option whose value may be left out: the next word is its value only if it ends in `.html`."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, type=FilePath(), is_flag=False, flag_value=NO_FILE, **attributes)


class ModeArgument(cloup.Argument):
    """A positional argument for some of the modes."""

    def __init__(self, *args: Any, modes: Sequence[str], **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.modes = modes


class FilePath(click.ParamType[str]):
    """A path whose `~` is expanded: shells leave it in `--output-dir=~/x` and in quotes. It need not exist."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return expanded_file(value)
        except ValueError as exc:
            self.fail(f"{value!r}: {exc}", param, ctx)


class Choice(click.Choice[Any]):
    """A choice that suggests the value that was probably meant."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        message = super().get_invalid_choice_message(value, ctx)
        meant = closest(str(value), [self.normalize_choice(choice, ctx) for choice in self.choices])
        return message if meant is None else f"{message} Did you mean {meant!r}?"


class Command(cloup.Command):
    """A command that knows options with many values, decides on colours once, and shows a traceback only with `--debug`."""

    def main(self, args: Sequence[str] | None = None, **extra: Any) -> Any:  # type: ignore[override]
        args = sys.argv[1:] if args is None else args
        open_closed_streams()
        try:
            return super().main(args, complete_var=COMPLETE_VAR, **extra)
        except Exception as exc:
            if "--debug" in args:
                complain("".join(traceback.format_exception(exc)).rstrip())
                fail("Unexpected error, please report it with the traceback above.", EXIT_SERVICE_FAILED)
            reason = one_line(exc) if isinstance(exc, OSError) else f"{type(exc).__name__}: {one_line(exc)}"
            fail(f"Unexpected error: {reason}. Run again with --debug for details.", EXIT_SERVICE_FAILED)
        finally:
            drop_unwritten()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.color = forced_colours()
        repeated = [name for param in self.params if isinstance(param, ManyValues) for name in param.opts]
        with _wrong_usage_shown():
            pages = [name for param in self.params if isinstance(param, OptionalPage) for name in param.opts]
            rest = super().parse_args(ctx, joined(spread(args, repeated), pages))
        take_command(ctx)
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _wrong_usage_shown():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            fail("Interrupted.", EXIT_INTERRUPTED)


@contextmanager
def _wrong_usage_shown() -> Iterator[None]:
    """Show wrong usage as click does, but keep its exit status if standard error takes nothing."""
    try:
        yield
    except click.UsageError as exc:
        exc.message = masked(exc.message)  # type: ignore[misc]  # it is final for subclasses
        if isinstance(exc, click.BadParameter):  # a wrong value: the usage, which lists no values, would not help
            fail(exc.format_message(), exc.exit_code)
        with suppress(OSError):
            exc.show()
        sys.exit(exc.exit_code)


def spread(args: Sequence[str], repeated: Sequence[str]) -> list[str]:
    """Put an option's name before each of its values: `--image-path a b` becomes `--image-path a --image-path b`."""
    words: list[str] = []
    option: str | None = None
    for arg in args:
        if arg.startswith("-"):
            option = arg if normalised(arg) in repeated else None
        elif option is not None and words[-1] is not option:
            words.append(option)
        words.append(arg)
    return words


def joined(args: Sequence[str], optional: Sequence[str]) -> list[str]:
    """Join each option in `optional` with its value: `--html a.html` becomes `--html=a.html`, `--html a.pt` `--html= a.pt`."""
    words: list[str] = []
    rest = deque(args)
    while rest:
        word = rest.popleft()
        if word == "--":
            return [*words, word, *rest]
        if normalised(word) in optional:
            taken = bool(rest) and rest[0].endswith(PAGE_ENDING) and not rest[0].startswith("-")
            word = f"{word}={rest.popleft() if taken else NO_FILE}"
        words.append(word)
    return words


def take_command(ctx: click.Context) -> None:
    """Take the first word for the mode if it is one and `--mode` is not given: `main.py doctor`.

    A word that is almost a mode, and no file, ends the process.
    """
    paths = ctx.params.get("paths") or ()
    if not paths or ctx.params.get("mode") is not None:
        return
    mode = normalised(paths[0])
    if mode in MODES:
        ctx.params |= {"mode": mode, "paths": paths[1:]}
        ctx.set_parameter_source("mode", ParameterSource.COMMANDLINE)
        if not paths[1:]:
            ctx.set_parameter_source("paths", ParameterSource.DEFAULT)
    elif not ctx.resilient_parsing:
        _refuse_misspelt_command(paths[0])


def _refuse_misspelt_command(word: str) -> None:
    """End the process if the word is almost a command and nothing that could be an image."""
    meant = closest(word, (*MODES, "--help", "--version"))
    if meant and not has_magic(word) and not {".", "/"} & set(word) and not os.path.lexists(word):
        fail(f"No such file or command: {word}. Did you mean {meant}?", EXIT_WRONG_USAGE)


def refuse_options_of_other_modes(ctx: click.Context, settings: Settings) -> None:
    """Refuse options on the command line that the mode in force does not use.

    Raises:
        click.UsageError: there is one. The text names its modes.
    """
    for param in ctx.command.params:
        modes = _modes_of(param)
        given = param.name and ctx.get_parameter_source(param.name) is ParameterSource.COMMANDLINE
        if given and modes and settings.mode not in modes:
            name = param.opts[0] if isinstance(param, click.Option) else param.make_metavar(ctx)
            raise click.UsageError(f"{name} is for --mode {_listed(modes)}, not for --mode {settings.mode}.")


def _modes_of(param: click.Parameter) -> Sequence[str]:
    if isinstance(param, ModeArgument):
        return param.modes
    group = getattr(param, "group", None)
    return group.modes if isinstance(group, Group) else ()


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def fail(message: str, status: int) -> NoReturn:
    """End the process with one line on standard error."""
    complain(f"Error: {message}")
    sys.exit(status)
