"""`--mode inspect`: its findings about real latents, how it shows them, and the files that it writes."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NoReturn

import pexpect
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from config import Settings
from latent_encoder import inspection
from latent_encoder.geometry import Size, latent_crop
from latent_encoder.inspection.copies import Copies, Reading
from latent_encoder.inspection.findings import Inspection, NamedSpace, channel_statistics
from latent_encoder.inspection.images import fitting_crop
from latent_encoder.inspection.page import HISTOGRAM_WIDTH, histogram
from latent_encoder.inspection.text import drawn
from latent_encoder.outputs.latent_files import latent_bytes
from latent_encoder.outputs.names import SUFFIXES, OutputFiles
from latent_encoder.terminal import printable
from models import FileFormat, SuccessResponse
from service import LatentEncoder
from tests.helpers import PATIENCE_S, PROJECT, Encode, RunMain, load_latent, request_for


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


Inspect = Callable[..., Done]


@pytest.fixture
def inspect(encoder: LatentEncoder, settings: Settings, capsys: pytest.CaptureFixture[str]) -> Inspect:
    """Inspect files in this process, which has ComfyUI loaded by `encoder`; named settings replace the usual ones."""
    del encoder

    def inspect(*paths: str | Path, html: bool = False, as_json: bool = False, **changes: Any) -> Done:
        changed = settings.model_copy(update=changes)
        capsys.readouterr()
        status = inspection.run(changed, [str(path) for path in paths], html=html, as_json=as_json, echo=print)
        return Done(status, *capsys.readouterr())

    return inspect


@pytest.fixture(scope="module")
def encoded(encoder: LatentEncoder, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> SuccessResponse:
    """Encode one photo, whose latent is copied by the tests."""
    return encoder.encode(request_for(settings, tmp_path_factory.mktemp("encoded"), "photo.jpg", {}))


@pytest.fixture
def latent(encoded: SuccessResponse, tmp_path: Path) -> Path:
    """Return a latent of the test's own, with its scaled image and its metadata beside it."""
    shutil.copytree(Path(encoded.latent_file_path).parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / Path(encoded.latent_file_path).name


def edit_metadata(latent: Path, **fields: Any) -> None:
    """Change fields of the metadata beside a latent."""
    path = Path(f"{latent}.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def no_constant(name: str) -> NoReturn:
    raise AssertionError(f"{name} is no JSON")


def test_a_sound_latent(latent: Path, encoded: SuccessResponse, run_main: RunMain) -> None:
    """The process prints shape, dtype, each channel, metadata and checksums, and writes the preview beside the latent."""
    done = run_main("--mode", "inspect", latent)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"shape +" + re.escape(str(list(encoded.latent_shape))), done.stdout)
    assert re.search(r"dtype +float32\n", done.stdout)
    assert len(re.findall(r"^ +\d+( +-?\d+\.\d{4}){4}$", done.stdout, re.MULTILINE)) == 16
    assert re.search(r"image_sha256 +" + encoded.metadata.image_sha256, done.stdout)
    assert re.findall(r"checksum of (\S+) +ok", done.stdout) == [
        "latent_photo_test.pt",
        "scaled_image_photo_test.png",
    ]
    assert "\x1b" not in done.stdout
    with Image.open(OutputFiles.of(latent).preview) as preview:
        preview.load()


def test_documented_output_is_that_of_a_run(encode: Encode, inspect: Inspect) -> None:
    """The example in the documentation has the printed lines, except for their values."""
    page = (PROJECT / "docs" / "command-line.md").read_text(encoding="utf-8")
    shown = re.findall(r"```text\n(.*?)```", page.split("\n## Inspecting a latent file\n")[1], re.DOTALL)[0]
    printed = inspect(encode("astronaut_masked.png", request_id="123").latent_file_path).out

    def names(text: str) -> list[str]:
        return [re.split(r" {2,}", line.strip())[0] for line in text.strip().splitlines()[1:]]

    assert names(shown) == names(printed)


def test_long_lists_are_shortened(latent: Path, inspect: Inspect) -> None:
    """A list of more numbers than most latent spaces have channels is shown by its beginning and its length."""
    edit_metadata(latent, latent_statistics={"mean": [0.0] * 128, "std": [1.0] * 16})
    shown = inspect(latent).out
    assert "[0.0, 0.0, 0.0, …] (128 numbers)" in shown
    assert str([1.0] * 16) in shown


def test_wrong_usage_is_status_2(inspect: Inspect, run_main: RunMain, tmp_path: Path) -> None:
    """No file, or two whose previews would have one name, is wrong usage."""
    done = run_main("--mode", "inspect")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Inspect mode needs latent files" in done.stderr
    assert inspect().status == 2
    same = inspect("a/latent_x.pt", "b/latent_x.pt", output_dir=str(tmp_path))
    assert (same.status, same.out) == (2, "")
    assert "2 files are named latent_x.pt" in same.err


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_statistics_are_those_of_the_standard_library(values: list[float]) -> None:
    """Mean and population deviation are those of another implementation."""
    (channel,) = channel_statistics(torch.tensor(values).view(1, 1, 1, -1))
    assert channel.mean == pytest.approx(statistics.fmean(values), rel=1e-9, abs=1e-6)
    assert channel.deviation == pytest.approx(statistics.pstdev(values), rel=1e-6, abs=1e-4)
    assert (channel.minimum, channel.maximum, channel.finite) == (min(values), max(values), True)


@pytest.mark.parametrize("latent_format", SUFFIXES)
@pytest.mark.parametrize("frames", [False, True])
def test_formats_without_metadata(latent_format: FileFormat, frames: bool, tmp_path: Path, inspect: Inspect) -> None:
    """Each format is recognised; missing metadata is noted, and is no error."""
    latent = torch.arange(4 * 5 * 6).view(1, 4, 5, 6) / 10
    path = tmp_path / f"latent_x{SUFFIXES[latent_format]}"
    path.write_bytes(latent_bytes(latent, latent_format, frames=frames, header={}))
    if frames and latent_format == "pt":
        torch.save(latent.unsqueeze(2), path)
    done = inspect(path, as_json=True)
    found = json.loads(done.out)
    assert (done.status, done.err, found["ok"]) == (0, "", True)
    assert (found["file"], found["format"], found["shape"], found["dtype"]) == (
        str(path),
        latent_format,
        [1, 4, 5, 6],
        "float32",
    )
    assert found["channels"][1] == {
        "mean": pytest.approx(4.45),
        "deviation": pytest.approx(statistics.pstdev(range(30)) / 10),
        "minimum": pytest.approx(3.0),
        "maximum": pytest.approx(5.9),
        "finite": True,
    }
    assert (found["latent_space"], found["latent_space_guessed"]) == ("SD15", True)
    assert (found["metadata"], found["hashes"]) == (None, {})
    assert found["metadata_note"] == f"{path.name}.json is not there"
    assert found["preview"] == str(tmp_path / "preview_x.png")


def test_precision_is_that_of_the_file(tmp_path: Path, inspect: Inspect) -> None:
    """The dtype of a latent that another program saved in half precision is shown."""
    torch.save(torch.full((1, 4, 2, 2), 0.1, dtype=torch.bfloat16), tmp_path / "half.pt")
    found = json.loads(inspect(tmp_path / "half.pt", html=True, as_json=True).out)
    assert (found["dtype"], found["channels"][0]["mean"]) == ("bfloat16", pytest.approx(0.1, rel=1e-2))


def test_json_has_the_metadata_and_one_line_a_file(encode: Encode, inspect: Inspect) -> None:
    """Each file is one line of JSON."""
    responses = [encode("photo.jpg", request_id=name) for name in ("a", "b")]
    done = inspect(*(response.latent_file_path for response in responses), as_json=True)
    found = [json.loads(line) for line in done.out.splitlines()]
    assert [line["metadata"] for line in found] == [json.loads(response.metadata.model_dump_json()) for response in responses]
    assert found[0]["hashes"] == {"latent": "ok", "scaled_image": "ok"}
    assert (found[0]["metadata_note"], found[0]["error"], found[0]["page"]) == (None, None, None)


def test_latent_space_of_the_metadata_is_no_guess(latent: Path, inspect: Inspect) -> None:
    """The recorded latent space counts, not the one of the count of channels."""
    edit_metadata(latent, latent_space="Flux")
    found = json.loads(inspect(latent, as_json=True).out)
    assert (found["latent_space"], found["latent_space_guessed"]) == ("Flux", False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "JSON"),
        ("[]", "Input should be an object"),
        ('{"original_image_shape": [1, 2, "x"]}', "original_image_shape.2: "),
    ],
)
def test_unusable_metadata_is_said_and_no_error(text: str, words: str, latent: Path, inspect: Inspect) -> None:
    """The latent is shown nevertheless."""
    Path(f"{latent}.json").write_text(text)
    done = inspect(latent, as_json=True)
    assert (done.status, json.loads(done.out)["ok"]) == (0, True)
    assert words in json.loads(done.out)["metadata_note"]


def test_what_differs_or_is_missing_is_status_1(encode: Encode, inspect: Inspect) -> None:
    """Each changed or missing file is a line on standard error, and the intact latent is shown too."""
    changed, gone, sound = (Path(encode("photo.jpg", request_id=name).latent_file_path) for name in ("a", "b", "c"))
    Image.new("RGB", (9, 9)).save(OutputFiles.of(changed).scaled_image)
    OutputFiles.of(gone).scaled_image.unlink()
    done = inspect(changed, gone, sound, as_json=True)
    found = [json.loads(line) for line in done.out.splitlines()]
    assert done.status == 1
    assert [line["hashes"]["scaled_image"] for line in found] == ["differs", "missing", "ok"]
    assert [line["ok"] for line in found] == [False, False, True]
    assert done.err.splitlines() == [
        f"Error: {changed}: scaled_image_photo_a.png is not the file that the metadata names: its checksum differs.",
        f"Error: {gone}: scaled_image_photo_b.png is missing.",
    ]


def test_altered_latent_is_found(latent: Path, inspect: Inspect) -> None:
    """Another tensor under the same name has another checksum."""
    torch.save(load_latent(latent) + 1, latent)
    done = inspect(latent, as_json=True)
    assert (done.status, json.loads(done.out)["hashes"]["latent"]) == (1, "differs")


def test_values_that_are_not_finite_are_status_1(tmp_path: Path, inspect: Inspect) -> None:
    """They are reported and left out of the statistics, which are null without values; page and preview are made."""
    latent = torch.ones(1, 3, 4, 4)
    latent[0, 1, 0, 0], latent[0, 2] = float("inf"), float("nan")
    torch.save(latent, tmp_path / "latent_x.pt")
    done = inspect(tmp_path / "latent_x.pt", as_json=True, html=True)
    found = json.loads(done.out, parse_constant=no_constant)
    assert done.status == 1
    assert done.err.splitlines()[-1].endswith("It has values that are not finite, in channel 1, 2.")
    assert [channel["finite"] for channel in found["channels"]] == [True, False, False]
    assert [channel["mean"] for channel in found["channels"]] == [1.0, 1.0, None]
    assert (found["latent_space"], found["latent_space_guessed"]) == (None, False)
    assert "No finite values." in Path(found["page"]).read_text(encoding="utf-8")


def test_files_that_are_no_latents(tmp_path: Path, latent: Path, inspect: Inspect) -> None:
    """Each is one line that names the file, and the other files are shown."""
    (tmp_path / "text.pt").write_text("no tensor")
    torch.save({"weight": torch.ones(1, 4, 2, 2)}, tmp_path / "dictionary.pt")
    torch.save(torch.ones(4, 2, 2), tmp_path / "three_dimensions.pt")
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    names = ("text.pt", "dictionary.pt", "three_dimensions.pt", "folder.pt", "pipe.pt", "none.pt", "photo.jpg")
    bad = [tmp_path / name for name in names]
    sound = str(latent)
    done = inspect(*bad, sound, as_json=True)
    *refused, shown = [json.loads(line) for line in done.out.splitlines()]
    assert (done.status, shown["file"], shown["ok"]) == (1, sound, True)
    for path, found, line in zip(bad, refused, done.err.splitlines(), strict=True):
        assert (found["file"], found["ok"], line) == (str(path), False, f"Error: {found['error']}")
        assert str(path) in line


def test_preview_has_the_covered_part_of_the_image_at_its_left(encode: Encode, inspect: Inspect) -> None:
    """Without metadata too, the part that the latent covers follows from the sizes."""
    response = encode("astronaut_masked.png", megapixels=0.021)
    files = OutputFiles.of(Path(response.latent_file_path))
    files.metadata.unlink()
    assert inspect(files.latent).status == 0
    with Image.open(files.preview) as preview, Image.open(files.scaled_image) as scaled:
        covered = scaled.crop(response.metadata.crop)
        assert covered.size != scaled.size
        assert preview.size == (2 * covered.width, covered.height)
        assert preview.crop((0, 0, *covered.size)).tobytes() == covered.tobytes()


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([1, 4, 8, 16, 32]))
def test_crop_follows_from_the_sizes(width: int, height: int, factor: int) -> None:
    """The part is right for every factor of a VAE; an image of another latent does not fit."""
    size = Size(max(width, factor), max(height, factor))
    found = inspection_of(torch.zeros(1, 1, size.height // factor, size.width // factor))
    assert fitting_crop(found, size) == latent_crop(size, factor)
    assert fitting_crop(found, Size(size.width * 2, size.height)) is None


def inspection_of(latent: torch.Tensor) -> Inspection:
    copies, space = Copies(Path("latent_x.pt"), Reading.of(Settings(_env_file=None))), NamedSpace(None, guessed=False)
    return Inspection(copies, "pt", latent, (), metadata=None, metadata_note=None, checks=(), space=space)


def test_image_of_another_latent_is_left_out(latent: Path, inspect: Inspect) -> None:
    """The preview then shows the latent alone."""
    files = OutputFiles.of(latent)
    files.metadata.unlink()
    Image.new("RGB", (40, 300)).save(files.scaled_image)
    assert inspect(files.latent).status == 0
    height, width = load_latent(files.latent).shape[-2:]
    with Image.open(files.preview) as preview:
        assert preview.size == (8 * width, 8 * height)


def test_whole_preview_is_left_and_a_damaged_one_written_anew(latent: Path, inspect: Inspect) -> None:
    """A damaged preview that the metadata does not name is replaced."""
    files = OutputFiles.of(latent)
    Image.new("RGB", (5, 5)).save(files.preview)
    whole = files.preview.read_bytes()
    inspect(files.latent)
    assert files.preview.read_bytes() == whole
    files.preview.write_bytes(whole[:-20])
    inspect(files.latent)
    with Image.open(files.preview) as preview:
        preview.load()
        assert preview.size != (5, 5)


def test_output_dir_takes_what_is_written(tmp_path: Path, latent: Path, inspect: Inspect) -> None:
    """The folder is made, and nothing appears beside the latent."""
    before = sorted(tmp_path.iterdir())
    found = json.loads(inspect(latent, html=True, as_json=True, output_dir=str(tmp_path / "looked" / "at")).out)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "looked"])
    written = sorted(str(path) for path in (tmp_path / "looked" / "at").iterdir())
    assert written == sorted([found["preview"], found["page"]])


def test_folder_that_cannot_be_written(tmp_path: Path, latent: Path, inspect: Inspect) -> None:
    """An unwritten preview is a warning, an unwritten page an error; the findings are shown."""
    (tmp_path / "file").touch()
    done = inspect(latent, output_dir=str(tmp_path / "file"))
    assert (done.status, "mean" in done.out) == (0, True)
    assert re.fullmatch(r"Warning: .*: no preview was written\. Cannot write to output folder: .*\n", done.err)
    done = inspect(latent, html=True, as_json=True, output_dir=str(tmp_path / "file"))
    assert (done.status, json.loads(done.out)["page"]) == (1, None)
    assert "no page was written. Cannot write to output folder" in done.err.splitlines()[-1]


def test_without_comfyui_only_the_images_are_missing(tmp_path: Path, encode: Encode, inspect: Inspect) -> None:
    """There is one warning with the reason for all files; the page has the other images."""
    latents = [Path(encode("photo.jpg", request_id=name).latent_file_path) for name in ("a", "b")]
    done = inspect(*latents, html=True, as_json=True, comfyui_path=tmp_path / "nowhere")
    found = [json.loads(line) for line in done.out.splitlines()]
    assert (done.status, [line["preview"] for line in found]) == (0, [None, None])
    assert len(found[0]["channels"]) == 16
    (warning,) = done.err.splitlines()
    assert warning.startswith("Warning: No images of latents")
    assert "No ComfyUI in" in warning
    assert len(parsed(found[0]["page"]).sources) == 1
    assert not OutputFiles.of(latents[0]).preview.exists()


class Page(HTMLParser):
    """The contents of a page; every element has to be closed in order."""

    VOID = ("meta", "img", "path")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.images: list[dict[str, str | None]] = []
        self.text: dict[str, str] = {}

    @property
    def sources(self) -> list[str]:
        """The URLs that a browser would fetch or go to."""
        names = ("src", "href", "srcset", "action", "data", "poster", "background", "xlink:href")
        return [value for name, value in self.attributes if name in names]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data


def parsed(path: str | Path) -> Page:
    page = Page()
    page.feed(Path(path).read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


def test_page_needs_nothing_from_outside(latent: Path, inspect: Inspect) -> None:
    """Images are embedded; nothing is fetched, linked or run; each image, table and histogram has a text alternative."""
    done = inspect(latent, html=True)
    assert (done.status, done.err) == (0, "")
    page = parsed(f"{latent}.html")
    assert len(page.sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"url\(|@import|https?:", page.text["style"])
    assert "prefers-color-scheme: dark" in page.text["style"]
    assert not {"script", "link", "iframe", "object", "a", "base"} & set(page.seen)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(image["alt"] for image in page.images)
    assert (page.seen.count("h1"), page.seen.count("svg"), page.seen.count("tbody")) == (1, 16, 3)
    assert page.seen.index("img") < page.seen.index("table"), "the images come first"
    assert ("lang", "en") in page.attributes


def test_pictures_of_the_encoder_are_checked_shown_and_made_again(
    encoder: LatentEncoder, settings: Settings, tmp_path: Path, inspect: Inspect
) -> None:
    """A missing preview that the metadata names is an error once, because it is written anew with the same bytes."""
    with_pictures = LatentEncoder(settings.model_copy(update={"preview": True, "roundtrip": True}), encoder.runtime)
    response = with_pictures.encode(request_for(settings, tmp_path, "astronaut_masked.png", {"megapixels": 0.021}))
    latent = Path(response.latent_file_path)
    OutputFiles.of(latent).preview.unlink()
    first, second = (inspect(latent, html=True, as_json=True) for _ in range(2))
    others = {"latent": "ok", "scaled_image": "ok", "roundtrip": "ok"}
    assert (first.status, json.loads(first.out)["hashes"]) == (1, {**others, "preview": "missing"})
    assert (second.status, json.loads(second.out)["hashes"]) == (0, {**others, "preview": "ok"})
    assert len(parsed(f"{latent}.html").sources) == 3


def test_what_metadata_holds_is_text(latent: Path, inspect: Inspect) -> None:
    """Names and metadata are neither markup in the page nor control characters on the terminal."""
    hostile = "<script>alert(1)</script><img src=http://example.com/x> \" onload='x' \x1b[2J\x9b \r"
    edit_metadata(latent, vae_model_name=hostile, latent_space=hostile)
    done = inspect(latent, html=True)
    page = parsed(f"{latent}.html")
    assert "script" not in page.seen
    assert all(source.startswith("data:") for source in page.sources)
    assert "<script>alert(1)</script>" in page.text["td"]
    assert r"\x1b[2J\x9b \r" in done.out
    assert not {"\x1b", "\x9b", "\r"} & set(done.out + done.err)


@given(st.text())
def test_printable_text_has_no_controls(text: str) -> None:
    """Printable text stays unchanged."""
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)


def test_histogram_is_highest_where_most_values_are() -> None:
    """It has 48 steps over the range; a single value fills one of them."""
    shown = histogram(torch.tensor([0.5] * 9 + [47.5]), 0.0, 48.0)
    tops = [float(height) for height in re.findall(r"V([\d.]+)H", shown.outline)]
    assert len(tops) == 48
    assert [number for number, top in enumerate(tops) if top < 60] == [0, 47]
    assert tops[0] == 0
    assert shown.outline.endswith(f"H{HISTOGRAM_WIDTH}V60Z")
    assert shown.alt == "Most values lie between 0.0000 and 1.0000."


@pytest.mark.parametrize(("columns", "lines"), [(20, 50), (200, 10), (1, 1)])
def test_drawing_fits_the_terminal(columns: int, lines: int) -> None:
    """It is shrunk in proportion, and is wider than the window only if that has no room for one cell."""
    rows = drawn(torch.rand(1, 60, 90, 3, generator=torch.Generator().manual_seed(0)), columns, lines).split("\n")
    widths = {row.count("▀") for row in rows}
    assert len(widths) == 1
    assert len(rows) <= max(lines, 1)
    assert widths.pop() <= max(columns - 2, 1)


def test_terminal_gets_the_picture_in_colours(latent: Path, encoded: SuccessResponse) -> None:
    """In a terminal, the upper half of a character is one cell, the lower half the next."""
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    command = [str(PROJECT / "main.py"), "--mode", "inspect", str(latent)]
    process = pexpect.spawn(
        sys.executable, command, env=environment, dimensions=(40, 80), encoding="utf-8", timeout=PATIENCE_S
    )
    shown = process.read()
    process.close()
    assert process.exitstatus == 0
    *_, height, width = encoded.latent_shape
    rows = [line for line in shown.splitlines() if "▀" in line]
    assert [row.count("▀") for row in rows] == [width] * ((height + 1) // 2)
    assert shown.index(latent.name) < shown.index("▀") < shown.rindex("▀") < shown.index("shape")
    assert re.search(r"\x1b\[38;2;\d+;\d+;\d+m\x1b\[48;2;\d+;\d+;\d+m▀\x1b\[0m", rows[0])


@pytest.mark.parametrize(
    ("variables", "drawn"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
)
def test_colours_only_where_they_are_wanted(
    variables: dict[str, str], drawn: bool, latent: Path, inspect: Inspect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is drawn on a terminal with colours, and neither with NO_COLOR nor with --json."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert ("▀" in inspect(latent).out) == drawn
    assert "▀" not in inspect(latent, as_json=True).out
