"""The path of the image in metadata: in responses, files, reports and log events, and not in the fingerprint."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from config import Settings
from latent_encoder import inspection
from latent_encoder.outputs.marks import HEADER_KEY
from models import Metadata
from service import LatentEncoder
from tests.helpers import IMAGES, Encode, request_for
from tests.kafka_tools import Bench, Events, read_responses, wait_until


@pytest.mark.parametrize(("latent_format", "ending"), [("safetensors", "safetensors"), ("comfy", "latent")])
def test_success_names_its_image(latent_format: str, ending: str, encode: Encode, tmp_path: Path) -> None:
    """The path stands as it was given in the response, in the metadata file and in the latent's header."""
    given = str(IMAGES / ".." / "test_images" / "photo.jpg")
    response = encode(given, latent_format=latent_format)
    assert response.metadata.image_path == given
    latent = tmp_path / f"latent_photo_test.{ending}"
    assert json.loads(latent.with_name(f"{latent.name}.json").read_text())["image_path"] == given
    with safe_open(latent, "pt") as file:
        assert json.loads(file.metadata()[HEADER_KEY])["image_path"] == given


def test_stored_response_has_the_path_of_its_request(encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> None:
    """The path is no part of the fingerprint: another path to the same image gets the stored response, with that path."""
    shutil.copy(IMAGES / "photo.jpg", tmp_path)
    first = encoder.encode(request_for(settings, tmp_path, "photo.jpg", {}))
    again = encoder.stored_response(request_for(settings, tmp_path, tmp_path / "photo.jpg", {}))
    assert again is not None
    assert again.metadata.image_path == str(tmp_path / "photo.jpg")
    assert again.metadata.model_copy(update={"image_path": first.metadata.image_path}) == first.metadata


def test_metadata_of_older_versions_name_no_image(encode: Encode, encoder: LatentEncoder, settings: Settings) -> None:
    """Metadata without the path are read, and the response to a repeated request has it."""
    file = Path(f"{encode('photo.jpg').latent_file_path}.json")
    fields = json.loads(file.read_text())
    del fields["image_path"]
    file.write_text(json.dumps(fields))
    assert Metadata.model_validate(fields).image_path is None
    stored = encoder.stored_response(request_for(settings, file.parent, "photo.jpg", {}))
    assert stored is not None
    assert stored.metadata.image_path == str(IMAGES / "photo.jpg")


def test_reports_name_the_image(encode: Encode, settings: Settings, tmp_path: Path) -> None:
    """The report as text and as JSON has the path; so has the title of the page, where markup is escaped."""
    image = tmp_path / "<b>.jpg"
    shutil.copy(IMAGES / "photo.jpg", image)
    latent = encode(image).latent_file_path
    shown: list[str] = []
    assert inspection.run(settings, [latent], html=True, as_json=False, echo=shown.append) == 0
    assert re.search(rf"^  image_path +{re.escape(str(image))}$", shown[0], re.MULTILINE)
    assert inspection.run(settings, [latent], html=False, as_json=True, echo=shown.append) == 0
    assert json.loads(shown[-1])["metadata"]["image_path"] == str(image)
    assert f"<title>{tmp_path}/&lt;b&gt;.jpg: {Path(latent).name}</title>" in Path(f"{latent}.html").read_text()


def test_space_for_the_longest_path_is_needed(encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> None:
    """A path whose characters need the most bytes in JSON fits into the space that is asked for."""
    small = encoder.encode(request_for(settings, tmp_path, "photo.jpg", {"latent_format": "safetensors"}))
    facts = small.metadata.model_copy(update={"image_path": "\U0001f600" * 4096})
    header = json.dumps({HEADER_KEY: json.dumps(facts.model_dump(mode="json"))})
    assert len(header) + len(facts.model_dump_json(indent=2).encode()) < 32_768 + 20 * 4096


FAILED: dict[str, Any] = {"image_path": "/no/such.jpg", "request_id": "gone"}


def test_log_events_of_kafka_name_the_image(bench: Bench, encoder: LatentEncoder, settings: Settings, events: Events) -> None:
    """Responses and failures name the image, also that of an invalid request and of a message that was cut off."""
    responses = bench.responses
    with bench.worker(encoder, bench.settings(settings)):
        bench.send({"image_path": str(IMAGES / "photo.jpg")})
        bench.send(FAILED)
        bench.send({"image_path": "bad.jpg", "megapixels": "1"})
        bench.send(b'{"request_id": "cut", "image_path": "cut.jpg", "megapi')
        bench.send({"image_path": 7})
        read_responses(responses, 5)
        wait_until(lambda: len(events("request answered")) == 5, "the end of all")
    named = [event["image_path"] for event in events("request answered")]
    assert named == [str(IMAGES / "photo.jpg"), "/no/such.jpg", "bad.jpg", "cut.jpg", None]
    assert [event["image_path"] for event in events("request failed")] == named[1:]
