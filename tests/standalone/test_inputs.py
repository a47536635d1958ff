"""The inputs made of the command line's paths, patterns and lists; nothing is encoded here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latent_encoder.standalone.folders import Walk
from latent_encoder.standalone.inputs import (
    IMAGE_SUFFIXES,
    ImageSelection,
    Inputs,
    RefusedInput,
    UnusableInputs,
    find_images,
    inputs_of,
)
from models import EncodeRequest

DEFAULTS: dict[str, Any] = {
    "vae_model_name": "a.safetensors",
    "upscale_method": "lanczos",
    "megapixels": 1.0,
    "output_dir": "out",
    "latent_format": "pt",
}


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the folder `photos` with images, other files, and images below it."""
    folder = tmp_path / "photos"
    for name in ("b.png", "A.JPG", "c.jpeg", "notes.txt", ".hidden.png", "below/d.png", "below/deep/e.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    return folder


def found(*paths: str | Path, recursive: bool = False) -> list[str]:
    return list(find_images(map(str, paths), Walk(IMAGE_SUFFIXES, recursive=recursive)))


def requests(inputs: Inputs) -> list[EncodeRequest]:
    items = list(inputs.items)
    assert all(isinstance(item, EncodeRequest) for item in items)
    return [item for item in items if isinstance(item, EncodeRequest)]


@pytest.mark.parametrize(
    ("path", "recursive", "names"),
    [
        ("photos", False, ["photos/A.JPG", "photos/b.png", "photos/c.jpeg"]),
        ("photos/below/", True, ["photos/below/d.png", "photos/below/deep/e.jpg"]),
        ("photos/*.[pP]*", False, ["photos/b.png"]),
        ("photos/**/*.jpg", False, ["photos/below/deep/e.jpg"]),
        ("photos/be*", True, ["photos/below/d.png", "photos/below/deep/e.jpg"]),
        ("photos/notes.txt", False, ["photos/notes.txt"]),
        ("no/such.png", False, ["no/such.png"]),
    ],
)
def test_paths_stand_for_images(path: str, recursive: bool, names: list[str], photos: Path) -> None:
    """Folders and patterns stand for the images in them, sorted by name; a file that is named is taken as it is."""
    assert photos.is_dir()
    assert found(path, recursive=recursive) == names


@pytest.mark.parametrize("ending", ["jpe", "jfif", "JFIF", "jif", "jfi", "pjpeg", "pjp", "mpo", "Jpeg", "PNG", "jpg_large"])
def test_folder_has_images_of_every_usual_ending(ending: str, tmp_path: Path) -> None:
    """Endings that Windows, browsers and phones give to JPEGs count like `.jpg`, in any case."""
    (tmp_path / f"a.{ending}").touch()
    assert found(tmp_path) == [f"{tmp_path}/a.{ending}"]


def test_image_named_twice_is_one(photos: Path) -> None:
    """An image that is named twice is encoded once, in its first place."""
    assert photos.is_dir()
    assert found("photos/c.jpeg", "photos", "photos/*.png", "./photos/b.png") == [
        "photos/c.jpeg",
        "photos/A.JPG",
        "photos/b.png",
    ]


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        (ImageSelection(("photos", "photos/*.gif")), r"No file matches photos/\*\.gif"),
        (ImageSelection(("photos/folder.png",)), "No JPEG or PNG in the folder photos/folder.png; --recursive looks"),
        (ImageSelection(("photos/folder.png",), recursive=True), "No JPEG or PNG in the folder photos/folder.png$"),
        (ImageSelection(input_list="no.jsonl"), r"Cannot read no.jsonl \(No such file or directory\)"),
        (ImageSelection(input_list="photos"), r"Cannot read photos \(Is a directory\)"),
    ],
)
def test_nothing_to_encode_is_an_error(selection: ImageSelection, words: str, photos: Path) -> None:
    """The error names the folder, pattern or list, before anything is encoded."""
    assert photos.is_dir()
    with pytest.raises(UnusableInputs, match=words):
        inputs_of(selection, {}, DEFAULTS)


def test_file_whose_name_looks_like_a_pattern_is_that_file(photos: Path) -> None:
    """An existing file is not taken for a pattern: `[1].png` is a common name."""
    (photos / "b[1].png").touch()
    inputs = inputs_of(ImageSelection(("photos/b[1].png",)), {}, DEFAULTS)
    assert (inputs.single, [request.image_path for request in requests(inputs)]) == (True, ["photos/b[1].png"])


def test_ids_last_over_runs_and_differ_by_what_is_asked(photos: Path) -> None:
    """Equal requests have the same id in any folder; another size, VAE, format, method or alpha has another id."""
    there = [
        (request.image_path, request.request_id) for request in requests(inputs_of(ImageSelection(("photos",)), {}, DEFAULTS))
    ]
    absolute = inputs_of(ImageSelection((str(photos),)), {}, {**DEFAULTS, "output_dir": "elsewhere"})
    assert [request.request_id for request in requests(absolute)] == [request_id for _, request_id in there]
    others: list[dict[str, Any]] = [
        {"megapixels": 0.5},
        {"vae_model_name": "b"},
        {"latent_format": "comfy"},
        {"upscale_method": "area"},
        {"alpha": "grey"},
    ]
    ids = {request_id for _, request_id in there}
    for fields in others:
        ids |= {request.request_id for request in requests(inputs_of(ImageSelection(("photos",)), fields, DEFAULTS))}
    assert len(ids) == 3 * 6


def test_single_image_has_the_same_id_each_time(photos: Path) -> None:
    """The id of a single image is that of the image among others that are named, unless one is given."""
    selection = ImageSelection((str(photos / "b.png"),))
    first, second = (requests(inputs_of(selection, {"request_id": None}, DEFAULTS))[0].request_id for _ in range(2))
    named = requests(inputs_of(ImageSelection(("photos/b.png", "photos/c.jpeg")), {}, DEFAULTS))
    assert first == second == named[0].request_id != named[1].request_id
    assert requests(inputs_of(selection, {"request_id": "mine"}, DEFAULTS))[0].request_id == "mine"


@pytest.mark.parametrize("path", ["photos", "photos/", "photos/**/*.*[gG]", "{0}", "{0}/**/*", "./photos/../photos"])
def test_id_is_that_of_the_path_below_the_folder(path: str, photos: Path) -> None:
    """The folder's own place does not count, nor does the fixed part of a pattern; so a moved folder keeps its ids."""
    (photos / "notes.txt").unlink()
    (photos / "folder.png").rmdir()
    elsewhere = photos.parent / "else" / "where"

    def ids(path: str) -> set[str]:
        found = requests(inputs_of(ImageSelection((path,), recursive=True), {}, DEFAULTS))
        return {request.request_id for request in found}

    before = ids(path.format(photos))
    elsewhere.parent.mkdir()
    photos.rename(elsewhere)
    assert before == ids("else/where")
    assert len(before) == 5


def test_list_holds_requests_as_kafka_has_them(photos: Path) -> None:
    """Each line is a request; absent fields are the command line's, else the settings'; a bad line is refused in its place."""
    lines = [
        json.dumps({"image_path": "photos/b.png", "request_id": "r", "correlation_id": "c", "megapixels": 0.5}),
        "",
        "{",
        '["photos/b.png"]',
        json.dumps({"image_path": "photos/b.png", "request_id": "s", "correlation_id": "c", "megapixels": "1"}),
        json.dumps({"image_path": "photos/c.jpeg", "vae_model_name": None}),
    ]
    (photos / "list.jsonl").write_text("\n".join(lines) + "\n")
    inputs = inputs_of(ImageSelection(input_list="photos/list.jsonl"), {"upscale_method": "area"}, DEFAULTS)
    first, broken, array, wrong, last = inputs.items
    assert (inputs.total, inputs.single) == (5, False)
    assert isinstance(first, EncodeRequest)
    assert (first.request_id, first.correlation_id, first.megapixels, first.upscale_method) == ("r", "c", 0.5, "area")
    assert isinstance(last, EncodeRequest)
    assert (last.vae_model_name, last.output_dir) == ("a.safetensors", "out")
    assert isinstance(broken, RefusedInput)
    assert broken.response.error_code == "MESSAGE_UNUSABLE"
    assert broken.response.error_message.startswith("Line 3 of photos/list.jsonl: The message is not JSON: ")
    assert isinstance(array, RefusedInput)
    assert array.response.error_message == "Line 4 of photos/list.jsonl: The message is JSON but not an object: list."
    assert isinstance(wrong, RefusedInput)
    assert (wrong.response.request_id, wrong.response.error_code, wrong.correlation_id) == ("s", "INVALID_REQUEST", "c")


def test_home_folder_in_a_list(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the paths of a line `~` is a home folder, and a home that is not known is an error response that names the field."""
    monkeypatch.setenv("HOME", str(photos))
    lines = [
        {"image_path": "~/b.png", "output_dir": "~/out"},
        {"image_path": "b.png", "output_dir": "~no-such-user/out", "request_id": "r"},
        {"image_path": 1},
    ]
    (photos / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given, unknown, number = inputs_of(ImageSelection(input_list="photos/list.jsonl"), {}, DEFAULTS).items
    assert isinstance(given, EncodeRequest)
    assert (given.image_path, given.output_dir) == (f"{photos}/b.png", f"{photos}/out")
    assert isinstance(unknown, RefusedInput)
    assert (unknown.response.request_id, unknown.response.error_code) == ("r", "INVALID_REQUEST")
    assert "output_dir: ~ cannot be expanded: no user has the name after ~" in unknown.response.error_message
    assert isinstance(number, RefusedInput)


def test_name_that_is_not_utf8_is_an_error_response(photos: Path) -> None:
    """A file whose name is not UTF-8 gets an error response that tells it; the others are encoded."""
    (photos / "caf\udce9.jpg").touch()
    inputs = inputs_of(ImageSelection(("photos",)), {}, DEFAULTS)
    (refused,) = [item for item in inputs.items if isinstance(item, RefusedInput)]
    assert inputs.total == 4
    assert refused.response.error_message == (
        "Invalid request: image_path: is not UTF-8, so no response can hold it (got 'photos/caf\\udce9.jpg')"
    )
