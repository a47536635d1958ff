"""Ids of images in runs: the same in each run and of a moved folder, and never those of another image's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from config import Settings
from latent_encoder.access import absolute
from latent_encoder.outputs.metadata import fingerprint
from latent_encoder.standalone import run as standalone
from latent_encoder.standalone.inputs import ImageSelection, inputs_of
from latent_encoder.standalone.run import RunOptions
from latent_encoder.telemetry.logs import LogStyle
from models import EncodeRequest
from service import LatentEncoder
from tests.helpers import IMAGES, TINY_VAE, load_latent

STYLE = LogStyle("INFO", "text", tracebacks=True)
USUAL = RunOptions()


class Ended:
    """The end of a run."""

    def __init__(self, status: int, output: str, errors: str) -> None:
        self.status = status
        self.responses: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
        summary = errors.splitlines()[-1]
        self.encoded, self.stored = (int(words.split()[0]) for words in summary.split(", ")[:2])

    @property
    def latents(self) -> list[str]:
        return [response["latent_file_path"] for response in self.responses]


Run = Callable[..., Ended]


@pytest.fixture
def run(settings: Settings, tmp_path: Path, capfd: pytest.CaptureFixture[str], encoder: object) -> Run:
    """Encode images in this process, in several lines of output; options are fields, `options` those of the run."""
    assert encoder is not None

    def run(
        *paths: Path | str, recursive: bool = False, options: RunOptions = USUAL, name: str | None = None, **more: Any
    ) -> Ended:
        capfd.readouterr()
        fields = {"output_dir": str(tmp_path / "out"), "vae_model_name": TINY_VAE, "megapixels": 0.02, **more}
        selection = ImageSelection(tuple(map(str, paths)), recursive=recursive, name=name)
        status = standalone.run(settings, selection, fields, options, STYLE)
        return Ended(status, *capfd.readouterr())

    return run


def folder(place: Path, **images: str) -> Path:
    """Make a folder with copies of test images: `photo="grey.png"` is `photo.png` with that content."""
    place.mkdir(parents=True)
    for name, source in images.items():
        shutil.copy(IMAGES / source, place / f"{name}.png")
    return place


def test_moved_folders_resume(run: Run, tmp_path: Path) -> None:
    """After the images were moved, or the outputs, or both, nothing is encoded again."""
    photos = folder(tmp_path / "photos", a="grey.png", b="rgba.png")
    (photos / "below").mkdir()
    shutil.copy(IMAGES / "palette.png", photos / "below" / "a.png")
    first = run(photos, recursive=True)
    assert (first.encoded, first.stored) == (3, 0)
    (tmp_path / "else").mkdir()
    photos = photos.rename(tmp_path / "else" / "pictures")
    second = run(photos, recursive=True)
    assert (second.encoded, second.stored, second.latents) == (0, 3, first.latents)
    assert second.responses[0]["metadata"]["image_path"] == str(photos / "a.png")
    moved = (tmp_path / "out").rename(tmp_path / "else" / "latents")
    third = run(photos.rename(tmp_path / "again"), recursive=True, output_dir=str(moved))
    assert (third.encoded, third.stored) == (0, 3)
    assert third.latents == [str(moved / Path(latent).name) for latent in first.latents]


def test_two_folders_with_equal_names_do_not_share_files(run: Run, tmp_path: Path) -> None:
    """In one run or one after the other, in any order, and when both were moved, each image keeps files of its own."""
    one, two = folder(tmp_path / "one", a="grey.png"), folder(tmp_path / "two", a="rgba.png")
    together = run(one, two)
    assert (together.encoded, len(set(together.latents))) == (2, 2)
    shas = {path: load_latent(path) for path in together.latents}
    for paths in ([one], [two], [two, one], [one, two]):
        again = run(*paths)
        assert (again.encoded, set(again.latents) <= set(together.latents)) == (0, True), paths
    moved = run(two.rename(tmp_path / "new two"), one.rename(tmp_path / "new one"))
    assert (moved.encoded, moved.latents) == (0, together.latents[::-1])
    assert all(torch.equal(load_latent(path), latent) for path, latent in shas.items())


def test_second_folder_replaces_no_file_of_the_first(run: Run, tmp_path: Path) -> None:
    """A folder that comes later gets other ids where the image differs, and the stored response where it is the same."""
    one = folder(tmp_path / "one", a="grey.png", same="palette.png")
    two = folder(tmp_path / "two", a="rgba.png", same="palette.png")
    first = run(one)
    kept = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    second = run(two)
    assert (second.encoded, second.stored) == (1, 1)
    assert second.latents[0] != first.latents[0]
    assert {path: path.read_bytes() for path in kept} == kept
    assert (run(one).encoded, run(two).encoded) == (0, 0)


def test_changed_image_replaces_its_own_files(run: Run, tmp_path: Path) -> None:
    """An image that was changed is encoded anew under its id, and leaves no stale files."""
    one = folder(tmp_path / "one", a="grey.png")
    first = run(one)
    shutil.copy(IMAGES / "rgba.png", one / "a.png")
    second = run(one)
    assert (second.encoded, second.latents) == (1, first.latents)
    assert len(list((tmp_path / "out").glob("*.pt"))) == 1


@pytest.mark.parametrize("options", [RunOptions(), RunOptions(force=True)], ids=["resumed", "forced"])
def test_image_keeps_its_files_whichever_folder_is_given(run: Run, tmp_path: Path, options: RunOptions) -> None:
    """An image has the same files if it is named itself, or through a folder above it, before or after."""
    photos = folder(tmp_path / "photos" / "below", a="grey.png", b="rgba.png").parent
    whole = run(photos, recursive=True)
    below, named = (
        run(photos / "below", options=options),
        run(*(photos / "below" / name for name in ("a.png", "b.png")), options=options),
    )
    assert whole.latents == below.latents == named.latents
    assert (below.stored, named.stored) == ((0, 0) if options.force else (2, 2))


def test_files_of_earlier_versions_are_found(run: Run, encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> None:
    """Files under the id by the absolute path, with the fingerprint by the absolute path, are not encoded again."""
    photos = folder(tmp_path / "photos", a="grey.png")
    fields = {"output_dir": str(tmp_path / "out"), "vae_model_name": TINY_VAE, "megapixels": 0.02}
    (named,) = inputs_of(ImageSelection((str(photos / "a.png"),)), fields, settings.request_defaults).items
    assert isinstance(named, EncodeRequest)
    response = encoder.encode(EncodeRequest(**{name: getattr(named, name) for name in EncodeRequest.model_fields}))
    file = Path(f"{response.latent_file_path}.json")
    stored = json.loads(file.read_text())
    del stored["source_id"], stored["image_path"]
    stored["fingerprint"] = fingerprint(
        named, response.latent_file_path, stored["image_sha256"], encoder.vaes.get(TINY_VAE), encoder.runtime
    )
    file.write_text(json.dumps(stored))
    again = run(photos)
    assert (again.encoded, again.stored, again.latents) == (0, 1, [response.latent_file_path])
    shutil.copy(IMAGES / "rgba.png", photos / "a.png")
    assert run(photos).latents == again.latents


def test_image_that_is_gone_gets_no_response_of_another(run: Run, tmp_path: Path) -> None:
    """A broken link whose place is that of another folder's image is an error, and not that image's latent."""
    run(folder(tmp_path / "one", a="grey.png"))
    two = folder(tmp_path / "two")
    (two / "a.png").symlink_to("gone.png")
    ended = run(two)
    assert [response["error_code"] for response in ended.responses] == ["IMAGE_NOT_FOUND"]


def test_folders_that_are_encoded_at_the_same_time_are_told_apart(
    encoder: LatentEncoder, settings: Settings, tmp_path: Path
) -> None:
    """Two runs that have both begun with one id: the second to write replaces nothing, and the retry gets another id."""
    requests = []
    for name, image in (("one", "grey.png"), ("two", "rgba.png")):
        (request,) = inputs_of(
            ImageSelection((str(folder(tmp_path / name, a=image)),)),
            {"output_dir": str(tmp_path / "out"), "vae_model_name": TINY_VAE},
            settings.request_defaults,
        ).items
        assert isinstance(request, EncodeRequest)
        requests.append(encoder.settled(request))
    assert requests[0].request_id == requests[1].request_id
    late = encoder.encode_prepared(encoder.prepare(requests[1]))
    first = encoder.encode(requests[0])
    with pytest.raises(Exception, match="another image"):
        encoder.write(late)
    with pytest.raises(Exception, match="another image"):
        encoder.prepare(requests[1])
    again = encoder.settled(requests[1])
    assert again.request_id != requests[1].request_id
    assert encoder.encode(again).latent_file_path != first.latent_file_path
    assert encoder.stored_response(requests[0]) == first


def test_single_image_is_encoded_once(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], settings: Settings) -> None:
    """A single image gives the same document again, and is encoded anew with --force."""
    assert run is not None
    fields = {"output_dir": str(tmp_path / "out"), "vae_model_name": TINY_VAE, "megapixels": 0.02}

    def document(**options: Any) -> Any:
        capfd.readouterr()
        selection = ImageSelection((str(IMAGES / "grey.png"),))
        assert standalone.run(settings, selection, fields, RunOptions(**options), STYLE) == 0
        return json.loads(capfd.readouterr().out)

    first = document()
    assert document() == first
    forced = document(force=True)
    assert forced["latent_file_path"] == first["latent_file_path"]
    assert forced["metadata"]["timings_ms"] != first["metadata"]["timings_ms"]
    assert absolute(forced["latent_file_path"]).is_file()
