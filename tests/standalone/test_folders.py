"""The walk through folders: links, own outputs, unreadable folders, and the counts of everything that is left out."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import get_args

import pytest

from config import Settings
from latent_encoder import inspection
from latent_encoder.outputs.names import output_files
from latent_encoder.standalone.folders import LeftOut, Walk, shown_counts
from latent_encoder.standalone.inputs import IMAGE_SUFFIXES, UnusableInputs, find_images
from models import IMAGE_FILES, FileFormat
from service import LatentEncoder
from tests.cli.test_cli import TINY, powerless
from tests.helpers import IMAGES, RunMain, request_for

OURS = {"original_image_shape": [1, 1, 3], "scaled_image_shape": [1, 1, 3], "latent_shape": [1], "vae_model_name": "v"}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def walked(*paths: str, recursive: bool = True) -> tuple[list[str], dict[str, int]]:
    """Return the images that the paths stand for, and the counts of everything that was left out."""
    walk = Walk(IMAGE_SUFFIXES, recursive=recursive)
    return list(find_images(paths, walk)), walk.counts


def test_everything_left_out_is_counted_by_reason(base: Path) -> None:
    """Each entry that is not taken is counted under one reason; subfolders count only if they are not walked."""
    make("p/a.png", "p/notes.txt", "p/.hidden.png", "p/.git/x.png", "p/.git/y.png", "p/sub/b.png")
    make("p/.latent-encoder-1.lock")
    os.mkfifo("p/pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("p/socket.jpg")
    counts = {"other_ending": 1, "hidden": 2, "special_file": 2, "own_output": 1}
    assert walked("p") == (["p/a.png", "p/sub/b.png"], counts)
    assert walked("p", recursive=False) == (["p/a.png"], counts | {"subfolder": 1})
    assert base.is_dir()


def test_links_are_followed_once(base: Path) -> None:
    """Links to folders and files are followed, loops end, and a file that is reached twice is taken under its own name."""
    make("p/z.png", "p/sub/b.png", "elsewhere/c.png", "elsewhere/deep/d.png", "other.png")
    for link, target in {
        "p/a.png": "z.png",
        "p/loop": ".",
        "p/sub/up": "..",
        "p/out": "../elsewhere",
        "p/out2": "../elsewhere/",
        "elsewhere/back": "../p",
        "p/linked.png": "../other.png",
        "p/self": "self",
    }.items():
        Path(link).symlink_to(target)
    os.link("other.png", "p/sub/hard.png")
    images, counts = walked("p")
    assert images == ["p/out/c.png", "p/out/deep/d.png", "p/sub/b.png", "p/sub/hard.png", "p/z.png"]
    assert counts == {"seen_before": 6, "other_ending": 1}
    assert walked("p/**/*.png", recursive=False)[0] == images
    assert walked("p", "p/sub", str(base / "p"))[0] == images


def test_link_that_leads_nowhere_is_an_image_that_is_missing(base: Path) -> None:
    """A broken link with the name of an image is taken, so that it gets an error response; so is a loop."""
    make("p/a.png")
    Path("p/broken.png").symlink_to("none.png")
    Path("p/round.png").symlink_to("round.png")
    assert walked("p")[0] == walked("p/*.png")[0] == ["p/a.png", "p/broken.png", "p/round.png"]
    assert base.is_dir()


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("p/**/*.jpg", ["p/b/x.jpg", "p/b/c/y.jpg", "p/z.jpg"]),
        ("p/**", ["p/a.png", "p/b/x.jpg", "p/b/c/y.jpg", "p/z.jpg"]),
        ("**/c/*", ["p/b/c/y.jpg"]),
        ("p/*/c/?.jpg", ["p/b/c/y.jpg"]),
        ("p/.h*/*", ["p/.hid/h.jpg"]),
        ("p/**/.hid/*", ["p/.hid/h.jpg"]),
        ("p/b/../[az].*", ["p/b/../a.png", "p/b/../z.jpg"]),
        ("./p/[a]*", ["p/a.png"]),
        ("p/**/**/**/**/**/**/**/**/**/**/**/**/**/**/**/**/**/**/y.*", ["p/b/c/y.jpg"]),
    ],
)
def test_patterns_are_those_of_a_shell(pattern: str, names: list[str], base: Path) -> None:
    """`**` is folders to any depth, and hidden names need a pattern that begins with a dot; so for absolute patterns."""
    make("p/a.png", "p/b/x.jpg", "p/b/c/y.jpg", "p/z.jpg", "p/.hid/h.jpg")
    assert walked(pattern, recursive=False)[0] == sorted(names, key=lambda name: name.split("/"))
    assert walked(f"{base}/{pattern}", recursive=False)[0] == sorted(
        (str(base / name) for name in names), key=lambda name: name.split("/")
    )


def own_files(folder: str, stem: str, metadata: object = OURS) -> list[Path]:
    """Write the files of a request, its latent excepted, and return the images."""
    files = output_files(folder, f"{stem}.png", "1")
    images: list[Path] = [getattr(files, name) for name in IMAGE_FILES]
    files.folder.mkdir(parents=True, exist_ok=True)
    for image in images:
        image.touch()
    files.metadata.write_text(metadata if isinstance(metadata, str) else json.dumps(metadata))
    return images


def test_own_outputs_are_recognised_wherever_they_lie(base: Path) -> None:
    """Images with our metadata or their latent beside them are no input, through links and patterns too."""
    make("p/a.png")
    own = own_files("p", "a") + own_files("p/deep/out", "b")
    make("p/scaled_image_killed_1.png", "p/latent_killed_1.safetensors")
    Path("p/link.png").symlink_to(own[0].name)
    images, counts = walked("p")
    assert images == ["p/a.png"]
    assert counts == {"own_output": 10, "other_ending": 1}
    assert walked("p/**/*.png")[0] == ["p/a.png"]
    assert list(find_images([str(own[0])], Walk(IMAGE_SUFFIXES))) == [str(own[0])], "a file that is named is taken as it is"
    assert base.is_dir()


@pytest.mark.parametrize("latent_format", get_args(FileFormat))
def test_outputs_that_were_moved_apart_are_recognised(
    latent_format: str, encoder: LatentEncoder, settings: Settings, base: Path
) -> None:
    """Each file of a request, its page too, is known where no other lies beside it; under another name it is the user's."""
    seeing = LatentEncoder(settings.model_copy(update={"preview": True, "roundtrip": True}), encoder.runtime)
    response = seeing.encode(request_for(settings, base / "out", "photo.jpg", {"latent_format": latent_format}))
    latent = response.latent_file_path
    assert inspection.run(settings, [latent], html=True, as_json=True, echo=lambda _: None) == 0
    files = sorted((base / "out").iterdir())
    assert len(files) == 6
    for number, file in enumerate(files):
        (base / "moved" / str(number)).mkdir(parents=True)
        file.rename(base / "moved" / str(number) / file.name)
    make("moved/mine.png", "moved/page.html")
    assert walked("moved") == (["moved/mine.png"], {"own_output": 6, "other_ending": 1})
    assert walked("moved/**/*") == (["moved/mine.png", "moved/page.html"], {"own_output": 6})
    (scaled,) = Path("moved").glob("*/scaled_image_*")
    shutil.copy(scaled, "moved/renamed.png")
    assert "moved/renamed.png" in walked("moved")[0]


@pytest.mark.parametrize("metadata", ["{}", "[]", "not JSON", '{"original_image_shape": 1}', "[" * 10_000])
def test_images_of_a_user_with_such_names_are_inputs(metadata: str, base: Path) -> None:
    """A name like an output's is not enough: without metadata of ours beside it, the image is the user's."""
    images = own_files("p", "mine", metadata)
    make("p/preview_of_mine.png", "p/scaled_image_.png", "p/latent_space.png")
    expected = {*(image.name for image in images), "preview_of_mine.png", "scaled_image_.png", "latent_space.png"}
    assert {Path(path).name for path in walked("p")[0]} == expected
    assert base.is_dir()


def test_outputs_of_a_run_are_no_input_of_the_next(tmp_path: Path, run_main: RunMain) -> None:
    """A second run over a folder that holds the outputs of the first finds the same images and encodes none."""
    folder = tmp_path / "p"
    folder.mkdir()
    shutil.copy(IMAGES / "photo.jpg", folder)
    arguments = ("--image_path", folder, "--recursive", *TINY, "--output_dir", folder / "out", "--preview", "--roundtrip")
    assert run_main(*arguments).returncode == 0
    again = run_main(*arguments)
    assert (again.returncode, len(again.stdout.splitlines())) == (0, 1)
    ended = json.loads(again.stderr.splitlines()[-1])
    assert (ended["event"], ended["stored"]) == ("run ended", 1)
    assert ended["left_out"] == {"own_output": 5}


def test_unreadable_folder_is_status_1_and_the_others_are_encoded(tmp_path: Path, run_main: RunMain) -> None:
    """A folder that cannot be read is logged with the reason and counted; the images in the others get their responses."""
    for name in ("p/readable", "p/locked"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(IMAGES / "photo.jpg", tmp_path / name)
    (tmp_path / "p" / "locked").chmod(0)
    done = run_main("--image_path", "p", "--recursive", *TINY, prefix=powerless())
    assert (done.returncode, json.loads(done.stdout)["status"]) == (1, "success")
    events = [json.loads(line) for line in done.stderr.splitlines()]
    (reported,) = [event for event in events if event["event"].startswith("folder cannot be read")]
    assert (reported["level"], reported["folder"], reported["reason"]) == ("error", "p/locked", "Permission denied")
    assert events[-1]["left_out"] == {"unreadable_folder": 1}
    done = run_main("--image_path", "p/*/photo.jpg", *TINY, prefix=powerless())
    assert (done.returncode, json.loads(done.stdout)["status"]) == (1, "success")
    done = run_main("--image_path", "p/locked", *TINY, prefix=powerless())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("Error: Cannot read p/locked (Permission denied)\n")


def test_folder_with_nothing_to_take_names_the_reasons(base: Path) -> None:
    """The error of a folder without images has the counts of everything that was left out there."""
    make("p/notes.txt", "p/.hidden.png")
    with pytest.raises(
        UnusableInputs, match=r"in the folder p \(left out: 1 with another ending, 1 hidden\); --recursive looks"
    ):
        walked("p", recursive=False)
    assert base.is_dir()


def test_every_reason_has_words() -> None:
    """The summary for people can show each reason."""
    counts: dict[str, int] = {reason.value: 1 for reason in LeftOut}
    assert shown_counts(counts).count("1 ") == len(LeftOut)
    assert shown_counts({}) == ""


def test_thousands_of_files_take_seconds(base: Path) -> None:
    """A folder of 4000 images and the outputs of as many requests is walked in well under the time of one encode."""
    Path("p").mkdir()
    for number in range(4000):
        for name in (f"{number}.png", f"scaled_image_{number}_1.png", f"latent_{number}_1.pt", f"latent_{number}_1.pt.json"):
            (base / "p" / name).write_text(json.dumps(OURS) if name.endswith("json") else "")
    started = time.monotonic()
    images, counts = walked("p")
    assert (len(images), counts) == (4000, {"own_output": 12_000})
    assert time.monotonic() - started < 20, "it takes under a second on an idle machine"


def test_order_is_that_of_the_names(base: Path) -> None:
    """The images are sorted by their paths, part by part, whatever the file system's order is."""
    names = ["p/b.png", "p/a/z.png", "p/a.png", "p/B.png", "p/a-b/c.png"]
    make(*names)
    assert walked("p")[0] == sorted(names, key=lambda name: name.split("/"))
    assert base.is_dir()
