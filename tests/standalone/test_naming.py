"""Names of the output files by `--name`: patterns, sub-folders, and collisions, which are refused before an encode."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from latent_encoder import inspection
from latent_encoder.outputs.names import OutputFiles
from latent_encoder.outputs.run_requests import RunRequest, files_of
from latent_encoder.standalone.inputs import ImageSelection, Inputs, RefusedInput, UnusableInputs, inputs_of
from models import EncodeRequest
from tests.cli.test_cli import TINY
from tests.helpers import IMAGES, RunMain
from tests.standalone.test_inputs import DEFAULTS, photos
from tests.standalone.test_lasting_ids import Run, folder, run

__all__ = ["photos", "run"]


def selected(name: str, *paths: str, **more: Any) -> Inputs:
    return inputs_of(ImageSelection(paths, recursive=True, name=name, **more), {}, DEFAULTS)


def latents(inputs: Inputs) -> list[str]:
    """Return the latents of the requests, relative to the output folder."""
    items = list(inputs.items)
    assert all(isinstance(item, RunRequest) for item in items)
    return [str(files_of(item).latent.relative_to(Path.cwd() / "out")) for item in items if isinstance(item, RunRequest)]


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("{stem}", "latent_A.pt latent_b.pt latent_c.pt below/deep/latent_e.pt below/latent_d.pt"),
        ("{folder}/x{stem}", "latent_xA.pt latent_xb.pt latent_xc.pt below/deep/latent_xe.pt below/latent_xd.pt"),
        ("{index:03}", "latent_001.pt latent_002.pt latent_005.pt below/deep/latent_004.pt below/latent_003.pt"),
        ("{folder}-{stem}", "latent_-A.pt latent_-b.pt latent_-c.pt latent_below_deep-e.pt latent_below-d.pt"),
        ("{{{stem}}}é", "latent_{A}é.pt latent_{b}é.pt latent_{c}é.pt below/deep/latent_{e}é.pt below/latent_{d}é.pt"),
    ],
)
def test_pattern_names_the_files(name: str, names: str, photos: Path) -> None:
    """Each field is filled in. Sub-folders are made below the output folder, unless the folder is a part of the name."""
    assert photos.is_dir()
    assert sorted(latents(selected(name, "photos"))) == sorted(names.split())


def test_usual_pattern_gives_the_usual_names(photos: Path) -> None:
    """`{stem}_{id}` is the default, also for a stem and an id that have to be made safe."""
    shutil.copy(photos / "b.png", photos / "ü b.png")
    for path in ("photos/ü b.png", "photos/b.png"):
        for request_id in (None, "a_b", "x" * 300):
            pair = [
                inputs_of(ImageSelection((path,), name=name), {"request_id": request_id}, DEFAULTS).items
                for name in (None, "{stem}_{id}")
            ]
            (usual,), (named,) = (list(items) for items in pair)
            assert isinstance(usual, EncodeRequest)
            assert isinstance(named, EncodeRequest)
            assert (files_of(usual), usual.request_id) == (files_of(named), named.request_id)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{stam}", r"\{stam\} is no field; there are \{stem\}, \{id\}, \{index\}, \{folder\}; did you mean \{stem\}\?"),
        ("{}", r"\{\} is no field"),
        ("{stem.x}", "is no field"),
        ("{stem[0]}", "is no field"),
        ("{stem!r}", "takes no format"),
        ("{stem:>9}", "takes no format"),
        ("{index:99999}", "takes no format"),
        ("{stem", "braces"),
        ("stem}", "braces"),
        ("a/{stem}", "'/' in 'a/{stem}' cannot be in a name"),
        ("{stem}/{folder}", "'/' in"),
        ("../{stem}", "'/' in"),
        ("a\\{stem}", "cannot be in a name"),
        ("{stem}\n", "cannot be in a name"),
        ("{stem}\0", "cannot be in a name"),
        ("caf\udce9{stem}", "is not UTF-8"),
        ("", "the pattern is empty"),
        (" ", "the pattern is empty"),
        ("{folder}/", "the pattern is empty"),
        ("{folder}", "gives photos/A.JPG an empty name; add {stem}"),
        ("x" * 255 + "{stem}", "a file name of 280 bytes, and .*/out takes 255; choose a shorter one"),
        ("é" * 120 + "{stem}", "bytes"),
        ("latent", "photos/A.JPG and photos/b.png would both get .*/out/latent_latent.pt; give them different names"),
    ],
)
def test_patterns_that_cannot_be_used_are_refused(name: str, words: str, photos: Path) -> None:
    """One line says why, before anything is encoded."""
    (photos / "below").rename(photos.parent / "below")
    with pytest.raises(UnusableInputs, match=words) as caught:
        selected(name, "photos")
    assert "\n" not in str(caught.value)


def test_images_that_would_share_files_are_refused(photos: Path) -> None:
    """Two folders, two endings and two formats of one name collide; sub-folders keep equal names apart."""
    shutil.copytree(photos, "others")
    with pytest.raises(UnusableInputs, match=r"photos/A.JPG and others/A.JPG would both get"):
        selected("{stem}", "photos", "others")
    shutil.copy(photos / "b.png", photos / "b.jpg")
    with pytest.raises(UnusableInputs, match=r"photos/b.jpg and photos/b.png would both get"):
        selected("{stem}", "photos")
    (photos / "b.jpg").rename(photos / "below" / "b.jpg")
    assert len(latents(selected("{stem}", "photos"))) == 6
    with pytest.raises(UnusableInputs, match="would both get"):
        selected("{stem}", "photos/**/b.*", "photos/below/../below/b.jpg", "others/b.png")


LINES: list[dict[str, Any]] = [
    {"image_path": "photos/b.png"},
    {"image_path": "photos/b.png", "latent_format": "comfy"},
    {"image_path": "photos/c.jpeg", "request_id": "r"},
    {"image_path": "photos/c.jpeg", "request_id": "r"},
    {"image_path": 7},
]


def test_list_is_refused_as_a_whole_and_a_stream_line_by_line(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is checked before anything is encoded; on standard input, the second of two lines is an error response."""
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    (photos / "list.jsonl").write_text(text)
    with pytest.raises(UnusableInputs, match=r"photos/b.png and photos/b.png would both get"):
        selected("{stem}", input_list="photos/list.jsonl")
    with (photos / "list.jsonl").open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        first, second, third, again, wrong = selected("{stem}", input_list="-").items
    assert isinstance(first, RunRequest)
    assert isinstance(third, RunRequest)
    assert isinstance(again, RunRequest), "the same request may come twice"
    assert isinstance(second, RefusedInput)
    assert (second.response.error_code, second.image_path) == ("INVALID_REQUEST", "photos/b.png")
    assert "would both get" in second.response.error_message
    assert isinstance(wrong, RefusedInput)


# The tests below encode.


def test_named_files_are_found_again(run: Run, tmp_path: Path) -> None:
    """A run with names resumes, also after the folder was moved and if an image is named itself."""
    images = folder(tmp_path / "photos", a="grey.png")
    folder(images / "below", a="rgba.png")
    first = run(images, recursive=True, name="{stem}")
    assert first.latents == [f"{tmp_path}/out/latent_a.pt", f"{tmp_path}/out/below/latent_a.pt"]
    moved = images.rename(tmp_path / "moved")
    again = run(moved, recursive=True, name="{stem}")
    assert (again.encoded, again.latents) == (0, first.latents)
    assert [response["request_id"] for response in again.responses] == [response["request_id"] for response in first.responses]
    moved.rename(images)
    shutil.copy(IMAGES / "palette.png", images / "b.png")
    named = run(images / "a.png", images / "b.png", name="{stem}")
    assert (named.encoded, named.stored, named.latents[0]) == (1, 1, first.latents[0])
    shutil.copy(IMAGES / "palette.png", images / "a.png")
    changed = run(images, recursive=True, name="{stem}")
    assert (changed.encoded, changed.stored, changed.latents[0], changed.latents[2]) == (1, 2, *first.latents)


@pytest.mark.parametrize("other", ["folder", "size", "id"])
def test_files_of_another_request_are_refused(other: str, run: Run, tmp_path: Path) -> None:
    """Files of another image, of another size or of another id stay, and nothing is encoded."""
    images = folder(tmp_path / "photos", a="grey.png")
    run(images, name="{stem}")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    more: dict[str, Any] = {}
    if other == "folder":
        images = folder(tmp_path / "others", a="rgba.png", b="grey.png")
    elif other == "size":
        more["megapixels"] = 0.03
    else:
        images, more["request_id"] = images / "a.png", "mine"
    with pytest.raises(
        UnusableInputs, match=r"latent_a.pt, which is there and belongs to another request, of .*a.png; choose"
    ):
        run(images, name="{stem}", **more)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("file", ["latent_a.pt", "preview_a.png", "latent_a.safetensors.json"])
def test_files_of_a_person_are_refused(file: str, run: Run, tmp_path: Path) -> None:
    """A file without metadata of the service beside it is neither replaced nor removed."""
    images = folder(tmp_path / "photos", a="grey.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_bytes(b"mine")
    with pytest.raises(UnusableInputs, match=f"{file} is there, and no metadata"):
        run(images, name="{stem}")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [file]


def test_named_outputs_are_known_and_inspected(run: Run, tmp_path: Path, settings: Any) -> None:
    """Outputs among the images, with names, are no inputs; the files beside a latent are found by its name."""
    images = folder(tmp_path / "photos", a="grey.png")
    folder(images / "below", b="rgba.png")
    first = run(images, recursive=True, name="{folder}_{stem}", output_dir=str(images))
    again = run(images, recursive=True, name="{folder}_{stem}", output_dir=str(images))
    assert (len(again.responses), again.encoded) == (2, 0)
    shown: list[str] = []
    assert inspection.run(settings, first.latents, html=False, as_json=True, echo=shown.append) == 0
    assert json.loads(shown[1])["hashes"] == {"latent": "ok", "scaled_image": "ok"}
    assert OutputFiles.of(Path(first.latents[1])).preview == images / "preview_below_b.png"


def test_name_on_the_command_line(run_main: RunMain, tmp_path: Path) -> None:
    """A wrong pattern is one line and status 2 without a response; a right one names the files, in worker processes too."""
    folder(tmp_path / "p" / "below", a="grey.png")
    folder(tmp_path / "p" / "other", a="rgba.png")
    wrong = run_main("p", "--recursive", *TINY, "--name", "{stam}")
    assert (wrong.returncode, wrong.stdout, len(wrong.stderr.splitlines())) == (2, "", 1)
    assert wrong.stderr.startswith("Error: --name: {stam} is no field;")
    done = run_main("p", "--recursive", *TINY, "--name", "{stem}", "--workers", "2")
    assert done.returncode == 0, done.stderr
    paths = {Path(json.loads(line)["scaled_image_path"]) for line in done.stdout.splitlines()}
    assert paths == {tmp_path / "output" / name / "scaled_image_a.png" for name in ("below", "other")}
    assert all(path.is_file() for path in paths)
    elsewhere = run_main("--mode", "kafka", "--name", "{stem}")
    assert (elsewhere.returncode, "--name is for --mode standalone" in elsewhere.stderr) == (2, True)
