"""A run as a person sees it on a terminal, in windows of any width, with names of any kind."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import termios
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import ErrorCode, ImageInvalid
from latent_encoder.standalone.inputs import Inputs, RefusedInput
from latent_encoder.standalone.ordering import Outcome
from latent_encoder.standalone.screen import Screen as OurScreen
from latent_encoder.standalone.terminal_display import MOST_FAILURES, TerminalDisplay
from models import ErrorResponse, Metadata, SuccessResponse, Timings
from tests.helpers import IMAGES, PATIENCE_S, TINY_VAE
from tests.terminals import Screen, interrupt, on_terminal, resize, shown

TINY = ("--vae_model_name", TINY_VAE, "--megapixels", "0.02")
NOW = datetime(2026, 11, 27, tzinfo=UTC)
ODD_NAMES = (
    "a.png",
    "目" * 40 + ".png",
    "e\u0301" * 60 + ".jpg",
    "👩\u200d🔬❤\ufe0f.png",
    "red\x1b[31m\x1b]0;title\x07\x1b[2J.png",
    "two\nlines\r\t.png",
    "\x9b31m\u202egnp.png",
    "not-utf8-\udcff.png",
    "x" * 300,
)

SHAPES = dict.fromkeys(("original_image_shape", "scaled_image_shape"), (264, 184, 3))
HASHES = dict.fromkeys(("image_sha256", "vae_sha256", "scaled_image_sha256", "latent_sha256", "fingerprint"), "0" * 64)


def success(path: str, preview: str | None = None, *, stored: bool = False, folder: str = "/out") -> Outcome:
    """Return the outcome of an image; only the fields that a terminal shows matter."""
    facts = {"vae_model_name": "v", "upscale_method": "area", "megapixels": 1.0, "crop": (0, 0, 1, 1), "image_notes": ()}
    facts |= {"latent_dtype": "float32", "vae_dtype": "float32", "encoder": "stock", "tiled": False, "device": "cpu"}
    facts |= {"comfyui_version": "0", "torch_version": "0", "latent_shape": (1, 16, 33, 24), "timestamp": ""}
    timings = Timings(load_vae=0, load_image=0, scale=0, encode=0, save=0)
    metadata = Metadata(**facts, **SHAPES, **HASHES, processing_time_ms=432, timings_ms=timings)
    latent = f"{folder}/latent_{Path(path).stem}_6f2a-1b.pt"
    response = SuccessResponse(
        request_id="6f2a-1b",
        latent_file_path=latent,
        latent_shape=(1, 16, 33, 24),
        scaled_image_path=f"{folder}/scaled.png",
        metadata=metadata,
        preview_path=preview,
    )
    return Outcome(response, path, None, stored)


def failure(path: str | None, text: str = "Image file is empty") -> Outcome:
    return Outcome(ErrorResponse.of(ImageInvalid(f"{text}: {path}"), "id", NOW), path, None)


class Window:
    """A pseudo-terminal of some width, and the display for it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def display(self, columns: int, *outcomes: Outcome, encoding: str = "utf-8", single: bool = False) -> TerminalDisplay:
        """Return the display of a run over the images of these outcomes."""
        termios.tcsetwinsize(self._descriptor, (24, columns))
        items = [RefusedInput.of(ImageInvalid(""), {"image_path": outcome.image_path}) for outcome in outcomes]
        return TerminalDisplay(OurScreen(self._descriptor, encoding), Inputs(items, len(items), single=single))


@pytest.fixture(scope="module")
def window() -> Iterator[Window]:
    ours, theirs = os.openpty()
    yield Window(theirs)
    os.close(ours)
    os.close(theirs)


def seen(display: TerminalDisplay, columns: int, *outcomes: Outcome, end: str = "") -> Screen:
    """Return the screen after these outcomes, and after the end of the run if there is a summary."""
    text = "".join(display.encoded(display.outcome(outcome)).decode() for outcome in outcomes)
    return Screen(columns).feed((text + (display.end(end) if end else "")).replace("\n", "\r\n"))


# The lines


def test_line_of_each_kind(window: Window) -> None:
    """Encoded, stored and failed images have different marks; names, latents, shapes and times stand below each other."""
    outcomes = (
        success("photos/photo.jpg"),
        success("photos/sub/grey.png", stored=True),
        failure("photos/empty.png"),
        failure(None, "Line 3 of list: no JSON"),
    )
    display = window.display(100, *outcomes[:3])
    assert seen(display, 100, *outcomes).text == [
        "✓ photo.jpg    → latent_photo_6f2a-1b.pt                                          16×33×24    0.4 s",
        "= sub/grey.png → latent_grey_6f2a-1b.pt                                           16×33×24   stored",
        "✗ empty.png     IMAGE_INVALID  the file is empty",
        "✗ (no image)    IMAGE_INVALID  Line 3 of list: no JSON",
        "",
    ]


def test_narrow_windows_leave_out_the_least(window: Window) -> None:
    """First the latent's name goes, then the shape, then the time; the image's name is cut in the middle."""
    outcomes = success("holiday-at-the-sea.jpg"), failure("empty.png")
    lines = {columns: seen(window.display(columns, *outcomes), columns, *outcomes).text[:2] for columns in (60, 42, 30, 20)}
    assert lines == {
        60: [
            "✓ holiday-…sea.jpg → latent_holida….pt    16×33×24    0.4 s",
            "✗ empty.png         IMAGE_INVALID  the file is empty",
        ],
        42: ["✓ holiday-a…-sea.jpg    16×33×24    0.4 s", "✗ empty.png               IMAGE_INVALID"],
        30: ["✓ holiday-a…-sea.jpg    0.4 s", "✗ empty.png     IMAGE_INVALID"],
        20: ["✓ holiday-…-sea.jpg", "✗ e…  IMAGE_INVALID"],
    }


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("columns", [100, 60, 42, 20, 8])
@pytest.mark.parametrize("known", [True, False])
def test_no_name_tears_a_line_or_controls_the_terminal(columns: int, encoding: str, known: bool, window: Window) -> None:
    """Each image is one line that fits, whatever its name holds, and no sequence of a name reaches the terminal."""
    outcomes = [outcome for name in ODD_NAMES for outcome in (success(f"/p/{name}"), failure(f"/p/{name}"))]
    display = window.display(columns, *outcomes if known else (), encoding=encoding)
    raw = b"".join(display.encoded(display.outcome(outcome)) for outcome in outcomes)
    screen = Screen(columns).feed(raw.decode(encoding).replace("\n", "\r\n"))
    assert (screen.wraps, screen.unknown, len(screen.text)) == (0, [], len(outcomes) + 1)
    assert not any(code in re.sub(rb"\x1b\[[\d;]*m", b"", raw) for code in (b"\x1b", b"\r", b"\t", b"\x07"))
    assert b"\xc2\x9b" not in raw
    assert "\u202e".encode() not in raw


@given(st.text(max_size=80), st.integers(8, 130), st.booleans())
def test_any_name_fits_any_window(window: Window, name: str, columns: int, stored: bool) -> None:
    outcomes = success(f"p/{name}", stored=stored), failure(name)
    screen = seen(window.display(columns, *outcomes), columns, *outcomes)
    assert (screen.wraps, screen.unknown, len(screen.text)) == (0, [], 3)


def test_ascii_gets_other_marks(window: Window) -> None:
    outcomes = success("ä.jpg"), failure("empty.png")
    text = seen(window.display(80, *outcomes, encoding="ascii"), 80, *outcomes).text
    assert re.fullmatch(r"\+ \\xe4\.jpg  -> latent_\\xe4_6f2a-1b\.pt +16x33x24 +0\.4 s", text[0])
    assert text[1].startswith("x empty.png")


def test_single_image_has_the_paths_of_its_files(window: Window) -> None:
    """Paths are whole in any window, so that they can be copied; a failure has its whole message."""
    display = window.display(42, success("p/photo.jpg"), single=True)
    text = display.outcome(success("p/photo.jpg", preview="/nowhere/preview.png")).splitlines()
    assert text[0].endswith("photo.jpg  16×33×24  0.4 s")
    assert text[1:] == [
        "  latent        /out/latent_photo_6f2a-1b.pt",
        "  metadata      /out/latent_photo_6f2a-1b.pt.json",
        "  scaled image  /out/scaled.png",
        "  preview       /nowhere/preview.png",
    ]
    assert display.end("ignored") == ""
    long = "Image file is damaged: it ends before its end marker, so a part is missing; fetch it again"
    assert seen(window.display(42, failure("p/a.jpg"), single=True), 42, failure("p/a.jpg", long)).text == [
        "✗ a.jpg  IMAGE_INVALID",
        "  Image file is damaged: it ends before",
        "  its end marker, so a part is missing;",
        "  fetch it again: p/a.jpg",
        "",
    ]


# The end


def test_failures_are_listed_at_the_end(window: Window) -> None:
    """Each has its path as given, above the reason that it shares with others; the folder of the files comes last."""
    outcomes = (
        success("p/photo.jpg"),
        failure("p/empty.png"),
        failure("p/\x1b[2J.png"),
        failure("p/cut.png", "Image file is damaged"),
    )
    screen = seen(window.display(60, *outcomes), 60, *outcomes, end="1 encoded, 0 done before, 3 failed.")
    assert screen.text[4:] == [
        "",
        "3 images failed:",
        "✗ p/empty.png",
        r"✗ p/\x1b[2J.png",
        "  IMAGE_INVALID: the file is empty",
        "✗ p/cut.png",
        "  IMAGE_INVALID: the file is damaged",
        "",
        "1 encoded, 0 done before, 3 failed.",
        "Files: /out",
        "",
    ]
    several = success("a.jpg", folder="/one"), success("b.jpg", folder="/two"), success("c.jpg", folder="/three")
    assert seen(window.display(60, *several), 60, *several, end="3 encoded.").text[-2] == "Files: in several folders"


def test_ten_thousand_failures_take_no_memory(window: Window) -> None:
    """The list at the end is bounded, and counts those that it leaves out."""
    display = window.display(80)
    tracemalloc.start()
    for number in range(10_000):
        display.outcome(failure(f"p/{number}.png"))
        if number == 1000:
            before = tracemalloc.get_traced_memory()[0]
    growth = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert growth < 20_000
    lines = display.end("0 encoded").splitlines()
    assert sum(line.endswith(".png") for line in lines) == MOST_FAILURES
    assert f"… and {10_000 - MOST_FAILURES} more" in lines


# Pictures


@pytest.mark.parametrize(
    ("columns", "env", "encoding", "drawn"),
    [
        (100, {}, "utf-8", True),
        (42, {}, "utf-8", True),
        (20, {}, "utf-8", False),
        (100, {"NO_COLOR": "1"}, "utf-8", False),
        (100, {"TERM": "dumb"}, "utf-8", False),
        (100, {}, "ascii", False),
    ],
)
@pytest.mark.parametrize("single", [True, False])
def test_preview_is_drawn_if_the_terminal_can(
    columns: int,
    env: dict[str, str],
    encoding: str,
    drawn: bool,
    single: bool,
    window: Window,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The preview is below its image's line, if the window takes colours and half blocks and is wide enough."""
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    outcome = success("photo.jpg", preview=str(IMAGES / "photo.jpg"))
    display = window.display(columns, outcome, encoding=encoding, single=single)
    rows = [line for line in display.outcome(outcome).splitlines() if "▀" in line]
    assert bool(rows) == drawn
    assert ("\x1b[" in display.outcome(outcome)) == (not env)
    if rows:
        assert len(rows) <= 22
        assert {row.count("▀") <= columns - 3 for row in rows} == {True}
        assert "\x1b[38;2;" in rows[0]


def test_preview_that_cannot_be_read_is_left_out(window: Window) -> None:
    for preview in (
        str(IMAGES / "truncated.png"),
        "/nowhere",
        str(IMAGES / "empty.png"),
        str(IMAGES / "decompression_bomb.png"),
    ):
        outcome = success("photo.jpg", preview=preview)
        assert window.display(80, outcome).outcome(outcome).count("\n") == 1


# Whole programs


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Make a folder with three images and, among them by name, an empty one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("astronaut.png", "grey.png", "photo.jpg"):
        shutil.copy(IMAGES / name, folder)
    (folder / "empty.png").touch()
    return folder


def results(screen: Screen) -> list[str]:
    """Return the mark and the name of each image's line above the bar."""
    lines = screen.text[: screen.text.index("")]
    return [" ".join(line.split()[:2]) for line in lines if line[:2] in ("✓ ", "= ", "✗ ", "+ ", "x ")]


def test_run_on_a_terminal(photos: Path, tmp_path: Path) -> None:
    """Lines come with the bar below, then the failure, the counts and the folder; the next run marks stored images.

    A failure is no log line too, and the line that was shown while ComfyUI was loaded is erased.
    """
    arguments = ("--image-path", photos, *TINY)
    output = shown(*arguments, folder=tmp_path, status=1, env={"PYTHONPROFILEIMPORTTIME": "1"})
    imports = [line for line in output.replace("\r", "\n").split("\n") if "import time:" in line or "loading ComfyUI" in line]
    first = next(number for number, line in enumerate(imports) if "loading ComfyUI 0." in line)
    assert not any(re.search(r"\| +torch$", line) for line in imports[:first]), "torch is imported before a line is shown"
    screen = Screen(100).feed(shown(*arguments, "--force", folder=tmp_path, status=1))
    assert results(screen) == ["✓ astronaut.png", "✗ empty.png", "✓ grey.png", "✓ photo.jpg"]
    text = "\n".join(screen.text)
    assert "4/4, 1 failed |█" in text
    assert "1 image failed:\n✗ " + str(photos / "empty.png") in text.replace("\n  ", " ")
    assert text.rstrip().endswith(f"Files: {tmp_path / 'output'}")
    assert "3 encoded, 0 done before, 1 failed (IMAGE_INVALID: 1)" in text
    assert "request failed" not in text
    assert "loading" not in text
    assert screen.unknown == []
    again = Screen(100).feed(shown(*arguments, folder=tmp_path, status=1))
    assert results(again) == ["= astronaut.png", "✗ empty.png", "= grey.png", "= photo.jpg"]


def test_window_is_resized_meanwhile(photos: Path, tmp_path: Path) -> None:
    """Each line fits the window as it is when the image is done, and log lines between do not tear it."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    arguments = ("--input-list", "-", *TINY)
    with on_terminal(*arguments, folder=tmp_path, columns=100, redirection=f"< {fifo}") as child, fifo.open("w") as requests:
        output = ""
        for name, columns in (("astronaut.png", 60), ("grey.png", 42), ("photo.jpg", 42)):
            print(json.dumps({"image_path": str(photos / name)}), file=requests, flush=True)
            child.expect(r"✓[^\n]*\n")
            output += child.before + child.after
            resize(child, columns)
        requests.close()
        output += child.read()
        assert child.process.wait(PATIENCE_S) == 0
    lines = [line for line in Screen(1000).feed(output).text if line.startswith("✓ ")]
    assert [len(line) for line in lines] == [99, 59, 41]
    assert "this vae is for trying the service: its latents mean nothing to a diffusion model" in output
    assert "\x1b[0m ✓" not in output


def test_single_image_on_a_terminal(photos: Path, tmp_path: Path) -> None:
    """The files that it names exist, the preview is drawn, and no JSON is shown; a failure is a line and its message."""
    output = shown("--image-path", photos / "photo.jpg", "--preview", "--request-id", "1", *TINY, folder=tmp_path)
    text = "\n".join(Screen(1000).feed(output).text)
    start = text.index("✓ photo.jpg  16×")
    paths = re.findall(r"^  [a-z ]+?  +(/.+)$", text[start:], re.MULTILINE)
    assert [Path(path).name for path in paths] == [
        "latent_photo_1.pt",
        "latent_photo_1.pt.json",
        "scaled_image_photo_1.png",
        "preview_photo_1.png",
    ]
    assert all(Path(path).is_file() for path in paths)
    assert "▀" in text
    assert "encoding photo.jpg" in output
    assert not {"{", "encoding"} & set(text.split())
    empty = (photos / "empty.png").rename(photos / "{0}.png")
    text = "\n".join(Screen(1000).feed(shown("--image-path", empty.name, *TINY, folder=photos, status=1)).text)
    assert text.rstrip().endswith(f"✗ {{0}}.png  IMAGE_INVALID\n  Image file is empty: {empty.name}")


def test_redirected_streams(photos: Path, tmp_path: Path) -> None:
    """A pipe or a file gets JSON, a log no progress, and a terminal its part, whichever stream it has."""
    arguments = ("--image-path", photos, *TINY)
    screen = Screen(100).feed(shown(*arguments, folder=tmp_path, status=1, redirection="2> log"))
    assert results(screen) == ["✓ astronaut.png", "✗ empty.png", "✓ grey.png", "✓ photo.jpg"]
    assert not [line for line in screen.text if "|" in line or "loading" in line]
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [events[-1][name] for name in ("event", "failed", "left")] == ["run ended", 1, 0]
    assert "request failed" in [event["event"] for event in events]
    output = shown(*arguments, folder=tmp_path, status=1, redirection="> responses")
    assert "loading ComfyUI" in output
    assert "4/4, 1 failed |" in output
    lines = (tmp_path / "responses").read_text().splitlines()
    assert [json.loads(line)["status"] for line in lines] == ["success", "error", "success", "success"]


def test_tee_gets_json(photos: Path, tmp_path: Path) -> None:
    """Behind a pipe, standard output is JSON although the terminal shows it."""
    command = f"{shlex.quote(str(photos / 'photo.jpg'))} {shlex.join(TINY)}"
    output = shown(folder=tmp_path, redirection=f"{command} | tee copy")
    assert json.loads((tmp_path / "copy").read_text())["status"] == "success"
    assert '"status": "success"' in output


def test_json_on_a_terminal_is_that_of_a_pipe(photos: Path, tmp_path: Path) -> None:
    """`--json` writes the document of a pipe to a terminal too."""
    words = ("--image-path", photos / "photo.jpg", "--request-id", "1", "--json", *TINY)
    output = shown(*words, "--quiet", folder=tmp_path)
    assert json.loads(output)["request_id"] == "1"
    assert "\x1b" not in output
    assert "loading" not in output


def test_dumb_terminal_gets_plain_lines(photos: Path, tmp_path: Path) -> None:
    """Without sequences that a dumb terminal does not know, there is no line that changes, and no colour."""
    output = shown("--image-path", photos, *TINY, "--preview", folder=tmp_path, status=1, env={"TERM": "dumb"})
    assert "\x1b" not in output
    assert "\r" not in output.replace("\r\n", "")
    assert output.startswith("loading ComfyUI 0.")
    assert results(Screen(100).feed(output)) == ["✓ astronaut.png", "✗ empty.png", "✓ grey.png", "✓ photo.jpg"]
    quiet = shown("--image-path", photos, *TINY, "--preview", "--quiet", folder=tmp_path, status=1)
    assert "loading" not in quiet
    assert [line.split()[1] for line in quiet.splitlines() if "✗" in line] == ["empty.png"]


def test_printed_command_goes_on(tmp_path: Path) -> None:
    """After Ctrl-C, the last lines have the number of images left and a command that a shell runs as it is, from there."""
    folder = tmp_path / "it's $HOME; \x1b[31m"
    folder.mkdir()
    for number in range(150):
        shutil.copy(IMAGES / "photo.jpg", folder / f"{number:03}.jpg")
    arguments = (f"--image-path={folder.name}", "--upscale-method", "area", *TINY)
    with on_terminal(*arguments, folder=tmp_path, env={"LATENT_FORMAT": "safetensors", "HTTP_PORT": "9"}) as child:
        child.expect(" 000.jpg")
        interrupt(child)
        rest = child.read()
        assert child.process.wait(PATIENCE_S) == 130
    assert "\x1b[31m;" not in rest
    left = int(re.search(r"Error: Interrupted; (\d+) of 150 images are left\. This command goes on from here:", rest)[1])  # type: ignore[index]
    command = rest.rstrip().splitlines()[-1]
    assert command.startswith("LATENT_FORMAT=safetensors ")
    assert "HTTP_PORT" not in command
    done = subprocess.run(["bash", "-c", f"{command} --fail-fast"], cwd=tmp_path, capture_output=True, text=True, check=True)
    summary = json.loads(done.stderr.splitlines()[-1])
    assert (summary["stored"], summary["encoded"], summary["left"]) == (150 - left, left, 0)
    assert {Path(json.loads(line)["latent_file_path"]).suffix for line in done.stdout.splitlines()} == {".safetensors"}


def test_interrupted_while_loading(photos: Path, tmp_path: Path) -> None:
    """Ctrl-C before the first image erases the line that is shown, and ends with status 130 and one line of reason."""
    with on_terminal("--image-path", photos, *TINY, folder=tmp_path) as child:
        child.expect("loading ComfyUI")
        interrupt(child)
        screen = Screen(200).feed(child.before + child.after + child.read())
        assert child.process.wait(PATIENCE_S) == 130
    assert any(line.startswith("Error: Interrupted") for line in screen.text)
    assert not any("loading" in line for line in screen.text)


def test_codes_fit_narrow_windows(window: Window) -> None:
    """The longest error code leaves room for a name in 42 columns."""
    longest = max(ErrorCode, key=len)
    outcome = failure("p/photo.jpg")
    assert isinstance(outcome.response, ErrorResponse)
    outcome = replace(outcome, response=outcome.response.model_copy(update={"error_code": longest}))
    assert seen(window.display(42, outcome), 42, outcome).text[0].split() == ["✗", "photo.jpg", longest]
