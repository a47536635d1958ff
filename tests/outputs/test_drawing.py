"""Images that are asked for after the encode: made of the stored latent, with the bytes that an encode would give them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, get_args

import pytest

from config import Settings
from errors import OutputDirNotWritable
from latent_encoder.outputs.drawing import Undrawn, draw
from latent_encoder.outputs.names import OutputFiles
from models import EncodeRequest, FileFormat, SuccessResponse
from service import LatentEncoder
from tests.helpers import request_for


def seeing(encoder: LatentEncoder, settings: Settings, **more: bool) -> LatentEncoder:
    """Return an encoder with these of PREVIEW and ROUNDTRIP."""
    return LatentEncoder(settings.model_copy(update=more), encoder.runtime)


def complete(encoder: LatentEncoder, request: EncodeRequest) -> SuccessResponse:
    """Add the images to a stored latent, as the stages do."""
    return encoder.add_images(draw(encoder.runtime, undrawn(encoder, request)))


def undrawn(encoder: LatentEncoder, request: EncodeRequest) -> Undrawn:
    found = encoder.undrawn(request)
    assert found is not None
    return found


@pytest.mark.parametrize("latent_format", get_args(FileFormat))
def test_images_are_those_of_a_run_that_asked_for_them(
    latent_format: str, encoder: LatentEncoder, settings: Settings, tmp_path: Path
) -> None:
    """Images, metadata and response are the same, byte for byte, and the latent's file is not written again."""
    both = seeing(encoder, settings, preview=True, roundtrip=True)
    there = request_for(settings, tmp_path / "there", "astronaut.png", {"latent_format": latent_format})
    here = request_for(settings, tmp_path / "here", "astronaut.png", {"latent_format": latent_format})
    wanted = both.encode(there)
    first = encoder.encode(here)
    untouched = [Path(first.latent_file_path), Path(first.scaled_image_path)]
    states = [(file.stat().st_ino, file.stat().st_mtime_ns) for file in untouched]
    response = complete(both, here)
    assert [(file.stat().st_ino, file.stat().st_mtime_ns) for file in untouched] == states
    for made, expected in ((response.preview_path, wanted.preview_path), (response.roundtrip_path, wanted.roundtrip_path)):
        assert Path(str(made)).read_bytes() == Path(str(expected)).read_bytes()
    varying = {"timings_ms", "processing_time_ms", "timestamp", "fingerprint"}
    assert response.metadata.model_dump(exclude=varying) == wanted.metadata.model_dump(exclude=varying)
    timings = response.metadata.timings_ms
    assert timings.roundtrip > 0
    assert timings.model_copy(update={"roundtrip": 0.0}) == first.metadata.timings_ms
    assert response.metadata.timestamp == first.metadata.timestamp
    assert both.stored_response(here) == response
    assert both.undrawn(here) is None
    assert not list((tmp_path / "here").glob(".*"))


def test_only_what_lacks_is_made(encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> None:
    """An image that is there and whole stays, one that is damaged is made again, and one that is not asked for is named."""
    request = request_for(settings, tmp_path, "photo.jpg", {})
    encoder.encode(request)
    with_preview = complete(seeing(encoder, settings, preview=True), request)
    preview = Path(str(with_preview.preview_path))
    state = preview.stat().st_mtime_ns
    decoding = seeing(encoder, settings, roundtrip=True)
    with_both = complete(decoding, request)
    assert with_both.preview_path == str(preview)
    assert (preview.stat().st_mtime_ns, with_both.metadata.preview_sha256) == (state, with_preview.metadata.preview_sha256)
    whole = preview.read_bytes()
    preview.write_bytes(b"damaged")
    assert complete(seeing(encoder, settings, preview=True, roundtrip=True), request).metadata == with_both.metadata
    assert preview.read_bytes() == whole


@pytest.mark.parametrize("change", ["no metadata", "latent", "scaled image", "another request"])
def test_latent_that_does_not_match_is_encoded(
    change: str, encoder: LatentEncoder, settings: Settings, tmp_path: Path
) -> None:
    """Damaged files, those of another input, and those without metadata give no images."""
    drawing = seeing(encoder, settings, preview=True)
    request = request_for(settings, tmp_path, "photo.jpg", {})
    assert drawing.undrawn(request) is None
    files = OutputFiles.of(Path(encoder.encode(request).latent_file_path))
    if change == "no metadata":
        files.metadata.unlink()
    elif change == "another request":
        request = request.model_copy(update={"megapixels": 0.03})
    else:
        (files.latent if change == "latent" else files.scaled_image).write_bytes(b"damaged")
    assert drawing.undrawn(request) is None


def test_latent_that_was_replaced_meanwhile_keeps_its_files(
    encoder: LatentEncoder, settings: Settings, tmp_path: Path
) -> None:
    """Images of a latent that another process has replaced are not written beside the new one; another image is kept."""
    request = request_for(settings, tmp_path, "photo.jpg", {})
    encoder.encode(request)
    drawing, decoding = seeing(encoder, settings, preview=True), seeing(encoder, settings, roundtrip=True)
    drawn = draw(drawing.runtime, undrawn(drawing, request))
    decoded = complete(decoding, request)
    both = drawing.add_images(drawn)
    assert (both.metadata.roundtrip, both.roundtrip_path) == (decoded.metadata.roundtrip, decoded.roundtrip_path)
    assert both.metadata.preview_sha256 is not None

    other = request.model_copy(update={"megapixels": 0.03})
    replacing = encoder.encode(other)
    with pytest.raises(OutputDirNotWritable, match="send the request again"):
        drawing.add_images(drawn)
    assert encoder.stored_response(other) == replacing


def test_failed_write_leaves_the_former_files(encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> None:
    """If an image cannot be placed, the metadata still describe the stored files."""
    request = request_for(settings, tmp_path, "photo.jpg", {})
    first = encoder.encode(request)
    files = OutputFiles.of(Path(first.latent_file_path))
    files.preview.mkdir()
    drawing = seeing(encoder, settings, preview=True)
    with pytest.raises(OutputDirNotWritable):
        complete(drawing, request)
    assert encoder.stored_response(request) == first
    assert set(tmp_path.iterdir()) == {files.latent, files.metadata, files.scaled_image, files.preview}


def test_metadata_are_there_at_every_moment(
    encoder: LatentEncoder, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed between two renames leaves the former metadata, so the latent is not encoded again."""
    request = request_for(settings, tmp_path, "photo.jpg", {})
    files = OutputFiles.of(Path(encoder.encode(request).latent_file_path))
    drawing = seeing(encoder, settings, preview=True, roundtrip=True)
    seen: list[Any] = []
    rename = os.replace

    def watched(*arguments: Any, **more: Any) -> None:
        rename(*arguments, **more)
        seen.append(json.loads(files.metadata.read_text())["latent_sha256"])

    monkeypatch.setattr(os, "replace", watched)
    complete(drawing, request)
    assert len(seen) == 3
