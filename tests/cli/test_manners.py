"""Help, completion, colours, logs and suggestions of the command line."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import termios
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import cloup
import pytest
from click.testing import CliRunner
from hypothesis import given as given_any
from hypothesis import strategies as st
from pexpect.fdpexpect import fdspawn

from config import Settings
from latent_encoder.cli.options import CONTEXT, all_options
from latent_encoder.cli.parsing import Command, Group, ModeArgument, spread
from latent_encoder.suggestions import closest
from latent_encoder.telemetry import logs
from main import main
from tests.helpers import IMAGES, PATIENCE_S, PROJECT, TINY_VAE, Encode, RunMain, clean_environment

MAIN = PROJECT / "main.py"
PLAIN = {name: value for name, value in clean_environment().items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
PLAIN["TERM"] = "xterm"
ESCAPE = "\x1b["


@contextmanager
def terminal(command: Sequence[str | Path], folder: Path, env: Mapping[str, str]) -> Iterator[Any]:
    """Run a program on a pseudo-terminal. `pexpect.spawn` forks in Python, which can hang if torch has started threads."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (40, 200))
    words = ["setsid", "--ctty", "--wait", *map(str, command)]
    with subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env={**PLAIN, **env}):
        os.close(theirs)
        child = fdspawn(ours, timeout=PATIENCE_S, encoding="utf-8")
        try:
            yield child
        finally:
            child.close()  # hangs up


def at_terminal(*arguments: str | Path, folder: Path, env: Mapping[str, str] | None = None) -> str:
    """Return the output of Python on a pseudo-terminal until it ends."""
    with terminal([sys.executable, *arguments], folder, env or {}) as child:
        shown: str = child.read()
    return shown


def parsed(*arguments: str) -> dict[str, Any]:
    """Return the values that the options have after parsing a command line."""

    @cloup.command(cls=Command, context_settings=CONTEXT)
    @all_options
    def keep(**given: Any) -> None:
        kept.update(given)

    kept: dict[str, Any] = {}
    done = CliRunner().invoke(keep, arguments)
    assert done.exit_code == 0, done.output
    return kept


# Options


def test_image_path_takes_several_values_and_several_times() -> None:
    """The values keep their order, the next option ends them, and underscores may stand for hyphens."""
    given = parsed("--image_path", "a.png", "b c.png", "--megapixels", "0.5", "--image-path", "d/*.png", "e/")
    assert given["image_path"] == ("a.png", "b c.png", "d/*.png", "e/")
    assert given["paths"] == ()
    given = parsed("first.png", "--image_path", "a.png", "--force", "last.png")
    assert (given["image_path"], given["paths"]) == (("a.png",), ("first.png", "last.png"))


@given_any(
    st.lists(st.sampled_from(["--image-path", "--image_path", "--force", "--limit", "a", "b", "-", "--", ""]), max_size=8)
)
def test_spread_loses_no_word(words: list[str]) -> None:
    """Spreading only adds option names: the other words stay as they are, and spreading twice changes nothing more."""
    result = spread(words, ["--image-path"])
    names = ("--image-path", "--image_path")
    assert [word for word in result if word not in names] == [word for word in words if word not in names]
    assert spread(result, ["--image-path"]) == result


def test_flags_left_out_leave_the_settings_alone() -> None:
    """Without their options, PREVIEW and ROUNDTRIP of the environment hold."""
    given = parsed("a.png")
    assert (given["preview"], given["roundtrip"], given["workers"]) == (None, None, 1)
    assert parsed("--preview")["preview"] is True


def owned() -> list[Any]:
    """Return every parameter that is for some modes only, with a mode that it is not for."""
    modes = Settings.model_fields["mode"].annotation.__args__  # type: ignore[union-attr]
    found = []
    for param in main.params:
        holder = param if isinstance(param, ModeArgument) else getattr(param, "group", None)
        if isinstance(holder, (Group, ModeArgument)) and holder.modes:
            other = next(mode for mode in modes if mode not in holder.modes)
            found.append(pytest.param(param, other, holder.modes, id=str(param.name)))
    return found


@pytest.mark.parametrize(("param", "mode", "modes"), owned())
def test_option_of_another_mode_is_wrong_usage(
    param: click.Parameter, mode: str, modes: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option of another mode is status 2, and the message names its modes."""
    monkeypatch.chdir(tmp_path)
    values = {"megapixels": "1", "workers": "2", "limit": "1", "http_port": "80", "device": "cpu", "vae_precision": "fp32"}
    values |= {
        "error_codes": "IMAGE_INVALID",
        "since": "2026-11-23T12:00:00Z",
        "until": "2026-11-23T12:00:00Z",
        "places": "0/1",
        "rate": "5",
        "latent_format": "pt",
        "upscale_method": "area",
        "fit": "crop",
        "alpha": "drop",
    }
    values |= {"kafka_request_topic": "one", "kafka_response_topic": "two", "kafka_dlq_topic": "three"}
    words = [param.opts[0]] if isinstance(param, click.Option) else []
    if not getattr(param, "is_flag", False):
        words.append(values.get(str(param.name), "value"))
    done = CliRunner(env=dict.fromkeys(("MODE",))).invoke(main, ["--mode", mode, *words])
    assert done.exit_code == 2
    assert f"not for --mode {mode}." in done.stderr
    assert all(name in done.stderr for name in modes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--quiet", "--verbose", "x.png"), "--quiet does not go with --verbose or --debug."),
        (("--quiet", "--debug", "x.png"), "--quiet does not go with --verbose or --debug."),
        (("--request-id", "1", "a.png", "b.png"), "--request-id is for one image"),
        (("--request-id", "1", "--input-list", "-"), "--request-id is for one image"),
        (("--workers", "0", "a.png"), "0 is not in the range x>=1"),
        (("--image-path",), "Option '--image-path' requires an argument."),
        (("--image-path", "--force"), "Option '--image-path' requires an argument."),
        (("--mode", "inspect"), "Inspect mode needs latent files"),
        (("--mode", "doktor"), "Did you mean 'doctor'?"),
        (("--mode", "dlq-replay", "--error-code", "IMAGE_INVALD"), "Did you mean 'IMAGE_INVALID'?"),
        (("--device", "CUDA", "x.png"), "Did you mean 'cuda'?"),
        (("--log-level", "warn", "x.png"), "(got 'WARN'; did you mean 'WARNING'?)"),
        (("--megapixel", "1", "x.png"), "Did you mean '--megapixels'?"),
    ],
)
def test_wrong_usage_says_the_way_out(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong usage is status 2 and one line after the usage, at any width of the terminal."""
    monkeypatch.chdir(tmp_path)
    done = CliRunner(env={"COLUMNS": "40", "MODE": None}).invoke(main, arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert words in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("Error: ")


# Suggestions


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("qwen_image_vea.safetensors", "qwen_image_vae.safetensors"),
        ("QWEN_IMAGE_VAE.SAFETENSORS", "qwen_image_vae.safetensors"),
        ("taesdx", "taesdxl"),
        ("flux", None),
        ("", None),
    ],
)
def test_closest_name(name: str, meant: str | None) -> None:
    assert closest(name, ["qwen_image_vae.safetensors", "taesdxl", "pixel_space"]) == meant


@pytest.mark.parametrize(
    ("name", "meant"), [("tiny_qwen_vea.safetensors", TINY_VAE), ("TAESD", "taesd"), ("pixelspace", "pixel_space")]
)
def test_mistyped_vae(name: str, meant: str, respond: Encode) -> None:
    """Names that only ComfyUI knows are suggested too."""
    message = respond("photo.jpg", vae_model_name=name).error_message
    assert message.startswith(f"VAE model not found: {name}. Did you mean {meant}? Looked in: ")


def test_unlike_any_vae_gets_no_suggestion(respond: Encode) -> None:
    assert respond("photo.jpg", vae_model_name="zzz").error_message.startswith("VAE model not found: zzz. Looked in: ")


def test_mistyped_method_and_format(run_main: RunMain) -> None:
    """The error response of the request has the suggestion, as for other values out of range."""
    done = run_main("x.png", "--upscale_method", "lancos", "--latent_format", "Safetensors")
    assert done.returncode == 2
    assert "(got 'lancos'; did you mean 'lanczos'?)" in done.stdout
    assert "(got 'Safetensors'; did you mean 'safetensors'?)" in done.stdout


# Help


def test_examples_of_the_help_are_accepted() -> None:
    """Each mode has an example in the help, and the options accept each example."""
    assert main.help is not None
    examples = [line.split()[2:] for line in main.help.splitlines() if line.strip().startswith("python main.py")]
    given = [parsed(*shlex.split(" ".join(words))) for words in examples]
    assert {options["mode"] or "standalone" for options in given} == set(Settings.model_fields["mode"].annotation.__args__)  # type: ignore[union-attr]


def test_help_fits_a_narrow_window(run_main: RunMain) -> None:
    """The help is wrapped to 40 columns, and no option is lost."""
    shown = run_main("--help", env={"COLUMNS": "40"}).stdout
    described = [line for line in shown.splitlines() if line.startswith("     ")]
    assert described
    assert max(map(len, described)) <= 40
    names = {name for param in main.params if isinstance(param, click.Option) for name in param.opts}
    assert [name for name in names if name not in shown] == []


# Completion


def complete(run_main: RunMain, line: str, **env: str) -> list[str]:
    """Return the completions that bash gets for the last word."""
    words = shlex.split(line) + ([""] if line.endswith(" ") else [])
    variables = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_LATENT_ENCODER_COMPLETE": "bash_complete"}
    done = run_main(env={**variables, **env})
    assert (done.returncode, done.stderr if "PYTHONPROFILEIMPORTTIME" not in env else "") == (0, "")
    assert "| torch" not in done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("d", ["plain,dlq-replay", "plain,doctor"]),
        ("inspect ", ["file,"]),
        ("a.png d", ["file,d"]),
        ("./d", ["file,./d"]),
        ("-i a.png b", ["file,b"]),
        ("--mode d", ["plain,dlq-replay", "plain,doctor"]),
        ("--upscale_method near", ["plain,nearest", "plain,nearest-exact"]),
        ("--latent-format s", ["plain,safetensors"]),
        ("--error-code IMAGE_", ["plain,IMAGE_NOT_FOUND", "plain,IMAGE_UNREACHABLE", "plain,IMAGE_INVALID"]),
        ("--image_path a.png b", ["file,b"]),
        ("--mode inspect ", ["file,"]),
        ("--output-dir o", ["dir,o"]),
        ("--vae_m", ["plain,--vae-model-name"]),
    ],
)
def test_values_are_completed(line: str, offered: list[str], run_main: RunMain) -> None:
    assert complete(run_main, f"latent-encoder {line}") == offered


def test_vae_files_are_completed_without_torch(tmp_path: Path, run_main: RunMain) -> None:
    """Files of MODEL_DIR, its vae/ and the option's folder are completed; with a setting that cannot be used, none are."""
    for name in ("models/mine.safetensors", "models/vae/sub/mini.pt", "models/notes.txt", "other/miss.sft"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    line = "latent-encoder --vae_model_name mi"
    offered = complete(run_main, line, MODEL_DIR="models", PYTHONPROFILEIMPORTTIME="1")
    assert offered == ["plain,mine.safetensors"]
    assert complete(run_main, "latent-encoder --model_dir other --vae_model_name m", MODEL_DIR="models") == ["plain,miss.sft"]
    assert complete(run_main, "latent-encoder --vae_model_name sub", MODEL_DIR="models") == ["plain,sub/mini.pt"]
    assert complete(run_main, line, MODEL_DIR="models", MEGAPIXELS="17") == []


SHELLS = {
    "bash": (["--norc", "--noprofile"], ""),
    "zsh": (["-f"], "autoload -Uz compinit && compinit -u -D"),
    "fish": (["--no-config"], ""),
}


@pytest.mark.parametrize("shell", SHELLS)
def test_tab_completes_in_a_real_shell(shell: str, tmp_path: Path) -> None:
    """The tab key completes a choice, a VAE and a file, and the command that the script defines runs."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    shutil.copy(IMAGES / "photo.jpg", tmp_path / "a photo.jpg")
    arguments, start = SHELLS[shell]
    program = shlex.join([sys.executable, str(MAIN), "--completion", shell])
    load = f"{program} | source" if shell == "fish" else f'eval "$({program})"'
    with terminal([shell, *arguments], tmp_path, {"TERM": "dumb", "HOME": str(tmp_path)}) as child:
        child.sendline(f"{start}\n{load}\nlatent-encoder --version")
        child.expect(r"latent-encoder, version \d")
        for typed, seen in (
            ("--mode ins", "pect"),
            ("standa", "lone"),
            ("--vae_model_name tin", "_qwen_vae.safetensors"),
            ("--image_path a", "photo.jpg"),
        ):
            child.send(f"latent-encoder {typed}")
            child.expect_exact(typed)
            child.send("\t")
            child.expect_exact(seen)
            child.send("\x15")  # empties the line


# Colours


@pytest.mark.parametrize(("env", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colours_on_a_terminal(env: dict[str, str], coloured: bool, tmp_path: Path) -> None:
    shown = at_terminal(MAIN, "--help", folder=tmp_path, env=env)
    assert "--image-path" in shown
    assert (ESCAPE in shown) == coloured


@pytest.mark.parametrize(
    ("env", "coloured"),
    [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False), ({"FORCE_COLOR": ""}, False)],
)
def test_colours_in_a_pipe(env: dict[str, str], coloured: bool, run_main: RunMain) -> None:
    """A pipe gets colours only if FORCE_COLOR demands them."""
    assert (ESCAPE in run_main("--help", env=env).stdout) == coloured


# Logs

ERROR_LOGGED = """
import sys
from latent_encoder.telemetry.logs import configure_logging, get_logger
configure_logging({level!r}, {log_format!r}, tracebacks={tracebacks})
try:
    1 / 0
except ZeroDivisionError:
    get_logger("latent_encoder").exception("it failed", field="value")
"""


@pytest.mark.parametrize("log_format", ["json", "text"])
@pytest.mark.parametrize("tracebacks", [True, False])
def test_tracebacks_only_where_wanted(log_format: str, tracebacks: bool) -> None:
    """The exception's text is logged with or without a traceback; text has no colours in a pipe."""
    code = ERROR_LOGGED.format(level="INFO", log_format=log_format, tracebacks=tracebacks)
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=PLAIN, capture_output=True, text=True, check=True)
    assert "division by zero" in done.stderr
    assert ("line 6" in done.stderr or '"lineno": 6' in done.stderr) == tracebacks
    assert ESCAPE not in done.stderr
    if not tracebacks:
        assert done.stderr.count("\n") == 1
        assert "ZeroDivisionError: division by zero" in done.stderr


@pytest.mark.parametrize(("env", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_text_logs_are_coloured_on_a_terminal(env: dict[str, str], coloured: bool) -> None:
    code = ERROR_LOGGED.format(level="INFO", log_format="text", tracebacks=False)
    shown = at_terminal("-c", code, folder=PROJECT, env=env)
    assert "it failed" in shown
    assert (ESCAPE in shown) == coloured


def test_log_lines_go_above_a_progress_bar() -> None:
    """The bar is cleared before the log line, and drawn again after it."""
    code = "from tqdm import tqdm\nbar = tqdm(total=10, desc='images', mininterval=0)\nbar.update(3)" + ERROR_LOGGED.format(
        level="INFO", log_format="text", tracebacks=False
    )
    shown = at_terminal("-c", code, folder=PROJECT, env={"NO_COLOR": "1"})
    line = next(line for line in shown.splitlines(keepends=True) if "it failed" in line)
    assert "images" not in line, "the bar was on the line"
    assert "3/10" in shown[: shown.index(line)]
    assert "3/10" in shown[shown.index(line) + len(line) :]


@pytest.mark.parametrize(
    ("terminal", "fields", "options", "style"),
    [
        (True, {}, {}, ("WARNING", "text", False)),
        (False, {}, {}, ("INFO", "json", False)),
        (True, {"mode": "kafka"}, {}, ("INFO", "json", True)),
        (True, {"mode": "health"}, {}, ("INFO", "json", False)),
        (True, {"log_level": "INFO"}, {}, ("INFO", "json", False)),
        (True, {"log_format": "text"}, {}, ("INFO", "text", False)),
        (False, {}, {"quiet": True}, ("ERROR", "json", False)),
        (True, {"log_level": "DEBUG"}, {"quiet": True}, ("ERROR", "json", False)),
        (False, {}, {"verbose": True}, ("INFO", "text", False)),
        (True, {"log_level": "ERROR"}, {"verbose": True}, ("INFO", "text", False)),
        (False, {"log_format": "json"}, {"verbose": True}, ("INFO", "json", False)),
        (True, {"mode": "doctor"}, {"debug": True}, ("DEBUG", "text", True)),
        (False, {"mode": "kafka"}, {"verbose": True, "debug": True}, ("DEBUG", "text", True)),
    ],
)
def test_log_style(
    terminal: bool,
    fields: dict[str, str],
    options: dict[str, bool],
    style: tuple[str, str, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The options win over LOG_LEVEL, which wins over the default of a terminal."""
    for name in ("MODE", "LOG_LEVEL", "LOG_FORMAT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert tuple(logs.log_style(Settings(_env_file=None, **fields), **options)) == style  # type: ignore[arg-type]


def test_person_at_a_terminal_sees_warnings_as_text(tmp_path: Path) -> None:
    """A terminal shows the image's line and the warning about the tiny VAE, but no event of success."""
    words = (MAIN, IMAGES / "photo.jpg", "--vae_model_name", TINY_VAE, "--megapixels", "0.02")
    shown = at_terminal(*words, folder=tmp_path, env={"NO_COLOR": "1"})
    assert "✓ photo.jpg" in shown
    assert "[warning  ] this vae is for trying the service" in shown
    assert "request encoded" not in shown


# Failures


def test_failure_that_nobody_foresaw_is_one_line(run_main: RunMain) -> None:
    """An unexpected error, here a full disk, is one line; with --debug there is a traceback."""
    prefix = ["sh", "-c", 'exec "$@" >/dev/full', "sh"]
    done = run_main("--completion", "bash", prefix=prefix, env={"COLUMNS": "40"})
    assert done.returncode == 3
    assert done.stderr == (
        "Error: Unexpected error: [Errno 28] No space left on device. Run again with --debug for details.\n"
    )
    done = run_main("--debug", "--completion", "bash", prefix=prefix)
    assert done.returncode == 3
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1] == "Error: Unexpected error, please report it with the traceback above."
