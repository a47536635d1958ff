"""Completion by the shell: the script that the shell evaluates, and the values that are not plain choices.

click does the rest: the script calls this program with the words typed so far, and gets the possible next ones.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    get_completion_class,
)

from config import PROJECT_DIR, SettingsError, load_settings
from latent_encoder import model_files

PROG_NAME = "latent-encoder"
COMPLETE_VAR = "_LATENT_ENCODER_COMPLETE"
SHELLS = ("bash", "zsh", "fish")


def normalised(token: str) -> str:
    """Return an option's name or a choice with hyphens, as declared. Error codes, in capitals, keep their underscores."""
    return token if token.isupper() else token.replace("_", "-")


def script(command: click.Command, shell: str) -> str:
    """Return the script that defines `latent-encoder` and its completion in `shell`."""
    complete = get_completion_class(shell)
    assert complete is not None
    return complete(command, {}, PROG_NAME, COMPLETE_VAR).source()


class _Ours(ShellComplete):
    """click's script, calling Python by its path: click calls `latent-encoder` by `env`, which cannot call a function."""

    function = '{prog_name}() {{ {command} "$@"; }}\n'

    def source(self) -> str:
        command = shlex.join([sys.executable, str(PROJECT_DIR / "main.py")])
        function = self.function.format(prog_name=self.prog_name, command=command)
        return function + self.source_template % {**self.source_vars(), "command": command}

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        """Return the completions of words whose options may have underscores; click knows the declared names only."""
        names = [normalised(arg) if arg.startswith("--") else arg for arg in args]
        if incomplete.startswith("--"):
            incomplete = normalised(incomplete)
        return super().get_completions(names, incomplete)


class _Bash(_Ours, BashComplete):
    source_template = BashComplete.source_template.replace(" $1)", " %(command)s)")


class _Zsh(_Ours, ZshComplete):
    source_template = ZshComplete.source_template.replace("(( ! $+commands[%(prog_name)s] )) && return 1", "").replace(
        "zsh_complete %(prog_name)s)", "zsh_complete %(command)s)"
    )


class _Fish(_Ours, FishComplete):
    function = "function {prog_name}; {command} $argv; end\n"
    source_template = FishComplete.source_template.replace("(commandline -t) %(prog_name)s)", "(commandline -t) %(command)s)")


for _class in (_Bash, _Zsh, _Fish):
    add_completion_class(_class)


def files(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Let the shell complete files and folders."""
    return [CompletionItem(incomplete, type="file")]


def folders(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Let the shell complete folders."""
    return [CompletionItem(incomplete, type="dir")]


def vae_names(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Complete the VAE files in the model folders. ComfyUI knows more folders, but takes seconds to start."""
    try:
        settings = load_settings({name: ctx.params.get(name) for name in ("model_dir", "comfyui_path")})
    except SettingsError:
        return []  # the fault is reported when the command runs, not while it is typed
    return _items(model_files.vae_names(settings), incomplete)


class OneOf:
    """A completion of the values that a field takes. It accepts wrong ones too: the request gets an error response then."""

    def __init__(self, values: Sequence[str]) -> None:
        self.values = values

    def __call__(self, _ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        return _items(self.values, incomplete)


class Commands:
    """A completion of the first word: a mode, or a file in this folder. Later words are files."""

    def __init__(self, modes: Sequence[str]) -> None:
        self.modes = modes

    def __call__(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[Any]]:
        modes = _items(self.modes, incomplete)
        if not modes or ctx.params.get("mode") is not None or ctx.params.get("paths"):
            return files(ctx, param, incomplete)
        # Listed here, because the shells complete either files or the given words.
        names = sorted(place.name for place in Path().iterdir() if not place.name.startswith("."))
        return modes + _items([name for name in names if name not in self.modes], incomplete)


def _items(values: Sequence[str], incomplete: str) -> list[CompletionItem[Any]]:
    return [CompletionItem(value) for value in values if value.startswith(incomplete)]
