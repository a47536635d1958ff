"""Repeated requests: they get the stored response if all files asked for are there, whole and of the same input."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import pytest

from config import Settings
from models import FileFormat, ResponseMessage
from service import LatentEncoder
from tests.helpers import request_for

FORMATS: tuple[FileFormat, ...] = get_args(FileFormat)


@pytest.fixture
def seeing(encoder: LatentEncoder, settings: Settings) -> LatentEncoder:
    """Return an encoder with PREVIEW and ROUNDTRIP."""
    return LatentEncoder(settings.model_copy(update={"preview": True, "roundtrip": True}), encoder.runtime)


@pytest.mark.parametrize("latent_format", FORMATS)
def test_repeated_request_gets_its_stored_response(
    latent_format: FileFormat, encoder: LatentEncoder, settings: Settings, tmp_path: Path
) -> None:
    """A request in another format is encoded, and gets a file of its own."""
    response = encoder.encode(request_for(settings, tmp_path, "photo.jpg", {"latent_format": latent_format}))
    assert response.metadata.latent_format == latent_format
    for other in FORMATS:
        request = request_for(settings, tmp_path, "photo.jpg", {"latent_format": other})
        assert encoder.stored_response(request) == (response if other == latent_format else None)
    latent = Path(response.latent_file_path)
    latent.write_bytes(latent.read_bytes()[:-1] + b"\xff")
    assert encoder.stored_response(request_for(settings, tmp_path, "photo.jpg", {"latent_format": latent_format})) is None


def test_a_stored_response_has_the_images_that_are_asked_for(
    encoder: LatentEncoder, seeing: LatentEncoder, settings: Settings, tmp_path: Path
) -> None:
    """A preview is named if it was written and is whole, even if it is not asked for now; otherwise its key is absent."""
    request = request_for(settings, tmp_path, "photo.jpg", {})
    first = encoder.encode(request)
    assert encoder.stored_response(request) == first
    assert seeing.stored_response(request) is None, "it has no preview yet"

    drawn = seeing.encode(request)
    assert seeing.stored_response(request) == drawn
    assert encoder.stored_response(request) == drawn, "they are there, though not asked for"

    Path(str(drawn.preview_path)).write_bytes(b"damaged")
    assert seeing.stored_response(request) is None
    stored = encoder.stored_response(request)
    assert stored is not None
    assert (stored.preview_path, stored.roundtrip_path) == (None, drawn.roundtrip_path)
    messages = (ResponseMessage.of(response, None, datetime.now(UTC)) for response in (first, drawn, stored))
    keys = [{"preview_path", "roundtrip_path"} & json.loads(message.model_dump_json()).keys() for message in messages]
    assert keys == [set(), {"preview_path", "roundtrip_path"}, {"roundtrip_path"}]
