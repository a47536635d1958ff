"""`--html FILE`: the contact sheet of a run and of a folder of latents, and the files that it never replaces or becomes."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from config import Settings
from latent_encoder.cli.parsing import joined
from latent_encoder.contact_sheet import of_latents
from latent_encoder.contact_sheet.of_run import RunSheet
from latent_encoder.contact_sheet.place import SheetRefused
from latent_encoder.standalone import run as standalone
from latent_encoder.standalone.inputs import ImageSelection
from latent_encoder.standalone.run import RunOptions
from latent_encoder.telemetry.logs import LogStyle
from tests.contact_sheet.pages import sheet_of
from tests.helpers import IMAGES, TINY_VAE, Encode, RunMain
from tests.standalone.test_many_images import TINY, ask, copies, ended, started

Run = Callable[..., int]

FAILED = 1


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Make a folder with two images and a damaged one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("grey.png", "photo.jpg", "truncated.jpg"):
        shutil.copy(IMAGES / name, folder)
    return folder


@pytest.fixture
def run(settings: Settings, tmp_path: Path, encoder: object) -> Run:
    """Encode images in this process with a contact sheet, and return the exit status."""
    assert encoder is not None

    def run(
        *paths: Path,
        roundtrip: bool = False,
        place: Path = tmp_path / "sheet.html",
        kind: type[RunSheet] = RunSheet,
        **options: Any,
    ) -> int:
        changed = settings.model_copy(update={"roundtrip": roundtrip})
        sheet = kind(changed, place, workers=1)
        fields = {"output_dir": str(tmp_path / "output"), "vae_model_name": TINY_VAE, "megapixels": 0.02}
        style = LogStyle("INFO", "text", tracebacks=False)
        return standalone.run(
            changed, ImageSelection(tuple(map(str, paths))), fields, RunOptions(**options, sheet=sheet), style
        )

    return run


def test_run_with_round_trips(run: Run, photos: Path, tmp_path: Path) -> None:
    """Image, latent and round trip of each success, with the figures of the metadata, and each failure with its reason."""
    assert run(photos, roundtrip=True) == FAILED
    page = sheet_of(tmp_path / "sheet.html")
    stored = {path.name.split("_")[1]: json.loads(path.read_text()) for path in (tmp_path / "output").glob("*.json")}
    worst_first = sorted(stored, key=lambda stem: stored[stem]["roundtrip"]["psnr_db"])
    assert [Path(row[0].split("96 x")[0]).stem for row in page.rows["latents"]] == worst_first
    for row, stem in zip(page.rows["latents"], worst_first, strict=True):
        found = stored[stem]["roundtrip"]
        assert row[-2:] == [f"{found['psnr_db']:.2f} dB", f"{found['ssim']:.4f}"]
    assert [alt.split(":")[0] for alt, _ in page.images] == ["Image", "Latent", "Round trip"] * 2
    ((name, code, reason),) = page.rows["failures"]
    assert (name, code) == (str(photos / "truncated.jpg"), "IMAGE_INVALID")
    assert "damaged" in reason
    assert page.fetched == []


def test_stored_images_are_in_the_sheet_too(run: Run, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A second run, which encodes nothing, writes the same sheet; without round trips it has no columns of figures."""
    place = tmp_path / "sheet.html"
    run(photos)
    first = place.read_bytes()
    place.unlink()
    capfd.readouterr()
    run(photos)
    assert "0 encoded, 2 done before" in capfd.readouterr().err
    assert place.read_bytes() == first
    assert "PSNR" not in sheet_of(place).text
    assert "No round trips" in sheet_of(place).text


def test_a_run_that_ends_early_has_a_sheet(run: Run, tmp_path: Path) -> None:
    """The sheet has the images so far, and the number of the others."""
    folder = copies(tmp_path, 30)
    shutil.copy(IMAGES / "truncated.jpg", folder / "00.jpg")
    assert run(folder, fail_fast=True) == FAILED
    page = sheet_of(tmp_path / "sheet.html")
    done = len(page.rows["latents"]) + len(page.rows["failures"])
    assert f"The run ended early: {30 - done} of 30 images are not in this sheet." in page.text
    assert done < 30


def test_an_interrupted_run_has_a_sheet(tmp_path: Path) -> None:
    """After Ctrl-C the sheet has each image with a response, while standard input is still open."""
    images = sorted(copies(tmp_path, 30).iterdir())
    with started(tmp_path, "--input-list", "-", *TINY, "--html", "sheet.html") as process:
        assert process.stdout is not None
        ask(process, images[:1])
        lines = [process.stdout.readline()]
        process.send_signal(signal.SIGINT)
        ask(process, images[1:])
        rest, _ = ended(process)
    assert process.returncode == 130
    page = sheet_of(tmp_path / "sheet.html")
    assert len(page.rows["latents"]) == len([*lines, *rest.splitlines()])
    assert "The run was interrupted" in page.text


def test_workers(photos: Path, tmp_path: Path, run_main: RunMain) -> None:
    """With several processes the sheet is the same: colours, images, failures."""
    done = run_main("--image_path", photos, *TINY, "--workers", "2", "--html", "sheet.html")
    assert done.returncode == FAILED, done.stderr
    page = sheet_of(tmp_path / "sheet.html")
    assert (len(page.rows["latents"]), len(page.rows["failures"]), len(page.images)) == (2, 1, 4)


def test_the_sheet_is_no_input(run: Run, photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A sheet among the images is neither encoded nor an error, even if a pattern matches it; it is written anew."""
    place = photos / "sheet.html"
    run(photos, place=place)
    capfd.readouterr()
    run(photos / "*", place=place)
    responses = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [Path(response["image_path"]).name for response in responses] == ["grey.png", "photo.jpg", "truncated.jpg"]
    assert [path.name for path in photos.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("photo.jpg", b"a photo", "ends in .html"),
        ("index.html", b"<p>mine</p>", "is no contact sheet"),
        ("folder.html", None, "ends in .html"),
    ],
)
def test_no_other_file_is_replaced(settings: Settings, tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    """A file that is no sheet, a name with another ending and a folder are refused before anything is encoded."""
    place = tmp_path / name
    place.mkdir() if content is None else place.write_bytes(content)
    with pytest.raises(SheetRefused, match=reason):
        RunSheet(settings, place, workers=1)
    assert content is None or place.read_bytes() == content


def test_refused_sheets_end_the_process_before_it_begins(photos: Path, run_main: RunMain, tmp_path: Path) -> None:
    """Each is one line and status 2: a folder that cannot be made, one that is not allowed, and no name at all."""
    (tmp_path / "file").write_text("")
    for arguments, env in (
        (("--html", "file/sheet.html"), {}),
        (("--html", "sheet.html"), {"ALLOWED_OUTPUT_DIRS": str(tmp_path / "output")}),
        (("--html",), {}),
    ):
        done = run_main("--image_path", photos, *TINY, *arguments, env=env)
        assert (done.returncode, done.stdout) == (2, "")
        assert "--html" in done.stderr
        assert "Traceback" not in done.stderr


class SheetWhoseFolderGoes(RunSheet):
    """A sheet whose folder is replaced by a file just before the sheet is written."""

    def write(self, *, interrupted: bool) -> bool:
        shutil.rmtree(self._place.parent)
        self._place.parent.write_text("")
        return super().write(interrupted=interrupted)


def test_a_sheet_that_cannot_be_written_fails_the_run(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The images are encoded, a line names the sheet, and the status is 1."""
    place = tmp_path / "later" / "sheet.html"
    assert run(IMAGES / "photo.jpg", place=place, kind=SheetWhoseFolderGoes) == FAILED
    assert len(list((tmp_path / "output").glob("*.pt"))) == 1
    assert f"Error: {place}: no contact sheet was written. Cannot write to output folder" in capfd.readouterr().err


def test_folder_of_latents(encode: Encode, settings: Settings, tmp_path: Path, encoder: object) -> None:
    """Latents in a folder and below it, in any format, have a row each; unreadable ones are failures, and the status is 1."""
    assert encoder is not None
    encode("photo.jpg", request_id="1")
    encode("grey.png", request_id="2", latent_format="safetensors", output_dir=str(tmp_path / "below"))
    encode("rgba.png", request_id="3", latent_format="comfy")
    (tmp_path / "latent_bad.pt").write_bytes(b"no latent")
    place = tmp_path / "sheets" / "sheet.html"
    lines: list[str] = []
    assert of_latents.run(settings, [str(tmp_path)], place, as_json=True, echo=lines.append) == FAILED
    assert [json.loads(line) for line in lines] == [{"page": str(place), "latents": 4, "faulty": 1}]
    page = sheet_of(place)
    assert len(page.rows["latents"]) == 3
    ((name, code, _),) = page.rows["failures"]
    assert (name, code) == (str(tmp_path / "latent_bad.pt"), "unreadable latent")
    (tmp_path / "latent_bad.pt").unlink()
    assert of_latents.run(settings, [str(tmp_path)], place, as_json=False, echo=lines.append) == 0
    assert lines[-1] == f"{place}: 3 latents, none with problems"


def test_problems_are_in_the_row(encode: Encode, settings: Settings, tmp_path: Path) -> None:
    """A file that differs from its checksum is named in the first row, and not shown."""
    encode("photo.jpg", request_id="1")
    done = encode("grey.png", request_id="2")
    shutil.copy(IMAGES / "rgba.png", done.scaled_image_path)
    place = tmp_path / "sheet.html"
    assert of_latents.run(settings, [str(tmp_path)], place, as_json=False, echo=print) == FAILED
    first = sheet_of(place).rows["latents"][0]
    assert "its checksum differs" in first[0]
    assert first[1] == "none"


def test_inspect_mode_without_latents(run_main: RunMain, tmp_path: Path) -> None:
    """A folder without latents is an error; a folder without --html FILE gets a hint."""
    (tmp_path / "empty").mkdir()
    done = run_main("--mode", "inspect", "empty", "--html", "sheet.html")
    assert (done.returncode, done.stdout) == (1, "")
    assert "No latents (.pt, .safetensors, .latent) in empty." in done.stderr
    assert not (tmp_path / "sheet.html").exists()
    done = run_main("--mode", "inspect", "empty")
    assert (done.returncode, done.stdout) == (1, "")
    assert "--html sheet.html writes a contact sheet" in done.stderr


def test_flag_still_writes_a_page_for_each_latent(encode: Encode, tmp_path: Path, run_main: RunMain) -> None:
    """`--html` without a name that ends in .html is the flag that it was, before and after the files."""
    latent = Path(encode("photo.jpg").latent_file_path)
    for arguments in ((latent, "--html"), ("--html", latent)):
        done = run_main("--mode", "inspect", *arguments)
        assert done.returncode == 0, done.stderr
        page = Path(f"{latent}.html")
        assert "Histograms" in page.read_text()
        page.unlink()
    assert list(tmp_path.glob("*.html")) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--html"], ["--html="]),
        (["--html", "x.pt"], ["--html=", "x.pt"]),
        (["--html", "a.html", "x.pt"], ["--html=a.html", "x.pt"]),
        (["--html", "--json"], ["--html=", "--json"]),
        (["--html", "-.html"], ["--html=", "-.html"]),
        (["--html", "--html", "a.html"], ["--html=", "--html=a.html"]),
        (["--html=x", "y"], ["--html=x", "y"]),
        (["--html", "--", "a.html"], ["--html=", "--", "a.html"]),
        (["--", "--html", "a.html"], ["--", "--html", "a.html"]),
        (["--html", ""], ["--html=", ""]),
    ],
)
def test_only_a_name_that_ends_in_html_is_the_value(words: list[str], expected: list[str]) -> None:
    assert joined(words, ["--html"]) == expected


def test_the_next_image_is_no_sheet(photos: Path, run_main: RunMain, tmp_path: Path) -> None:
    """`--image_path a.png --html sheet.html` and `--html sheet.html a.png` name the same sheet and the same image."""
    image = photos / "grey.png"
    for arguments in (("--image_path", image, "--html", "s.html"), ("--html", "s.html", image), ("--html=s.html", image)):
        assert run_main(*arguments, *TINY).returncode == 0
        assert len(sheet_of(tmp_path / "s.html").rows["latents"]) == 1
        (tmp_path / "s.html").unlink()
