"""Requests: their defaults, their limits, and the messages for wrong ones."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import ErrorCode, InvalidRequest
from latent_encoder.requests import MOST_CANDIDATES, SEARCHED_BYTES, find_text, parse_request, request_id_of
from models import EncodeRequest

IMAGE = {"image_path": "photo.jpg"}


def test_defaults_are_the_specifications() -> None:
    """Only the image must be named; the request id is a new UUID4 each time."""
    first, second = (parse_request(IMAGE, {}) for _ in range(2))
    assert (first.vae_model_name, first.upscale_method) == ("qwen_image_vae.safetensors", "lanczos")
    assert (first.megapixels, first.output_dir) == (1.0, "./output")
    assert UUID(first.request_id).version == 4
    assert first.request_id != second.request_id


def test_settings_fill_what_is_absent_or_null() -> None:
    """A null counts as absent."""
    request = parse_request({**IMAGE, "megapixels": None}, {"megapixels": 2.0, "upscale_method": "area"})
    assert (request.megapixels, request.upscale_method) == (2.0, "area")


def test_unknown_fields_are_ignored() -> None:
    """A newer sender may send more fields than we know."""
    assert parse_request({**IMAGE, "priority": 7}, {}).image_path == "photo.jpg"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_path", None),
        ("image_path", ""),
        ("image_path", 7),
        ("image_path", "nul\0byte.png"),
        ("image_path", "/" * 4097),
        ("image_path", "lone surrogate \ud800.png"),
        ("vae_model_name", "../secret.safetensors"),
        ("vae_model_name", "sub/../../secret.safetensors"),
        ("vae_model_name", "/models/vae.safetensors"),
        ("vae_model_name", ""),
        ("upscale_method", "Lanczos"),
        ("upscale_method", "cubic"),
        ("megapixels", 0),
        ("megapixels", 0.009),
        ("megapixels", -1.0),
        ("megapixels", math.nan),
        ("megapixels", math.inf),
        ("megapixels", 17),
        ("megapixels", "1.0"),
        ("megapixels", True),
        ("megapixels", [1.0]),
        ("output_dir", ""),
        ("output_dir", "nul\0byte"),
        ("output_dir", "a/" * 2049),
        ("request_id", ""),
        ("request_id", 42),
        ("request_id", "\ud800"),
        ("correlation_id", "a\udcff"),
    ],
)
def test_wrong_value_is_refused_by_the_fields_name(field: str, value: object) -> None:
    """The code is INVALID_REQUEST, and the message begins with the field."""
    with pytest.raises(InvalidRequest, match=f"^Invalid request: {field}: ") as caught:
        parse_request({**IMAGE, field: value}, {})
    assert caught.value.code == ErrorCode.INVALID_REQUEST
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize("value", [0.01, 1, 16, 16.0])
def test_limits_themselves_are_in_range(value: float) -> None:
    """0.01 and 16 are ComfyUI's own limits; a whole number is a number."""
    assert parse_request({**IMAGE, "megapixels": value}, {}).megapixels == value


@given(st.dictionaries(st.sampled_from([*EncodeRequest.model_fields, "other"]), st.text() | st.floats() | st.none()))
def test_any_fields_give_a_request_or_invalid_request(fields: dict[str, Any]) -> None:
    """No input raises anything else, and there is always an id for the response."""
    try:
        request = parse_request(fields, {})
    except InvalidRequest:
        assert request_id_of(fields)
    else:
        assert request.request_id == (fields.get("request_id") or request.request_id)


def test_invalid_request_gets_a_response_with_its_own_id() -> None:
    """If the id itself is invalid, the response has a new one."""
    assert request_id_of({"request_id": "mine", "megapixels": 0}) == "mine"
    assert UUID(request_id_of({"request_id": 7})).version == 4


def nested(value: object, wrap: Callable[[object], object]) -> object:
    for _level in range(2000):
        value = wrap(value)
    return value


@pytest.mark.parametrize(
    "value",
    [nested(1, lambda inner: [inner]), nested(1, lambda inner: {"a": inner}), "a" * 10**6],
    ids=["list", "dict", "text"],
)
def test_deep_or_large_value_is_described(value: object) -> None:
    """Python's own `repr` fails on values that are nested about as deeply as JSON may be."""
    with pytest.raises(InvalidRequest, match=r"^Invalid request: megapixels: Input should be a valid number \(got .{1,80}\)$"):
        parse_request({**IMAGE, "megapixels": value}, {})


LARGE = 8 * 2**20
"""Bytes of a large message."""


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b'{"request_id": "a", "pad": "' + b"x" * LARGE, "a"),
        (b'{"pad": "' + b"x" * LARGE + b'", "request_id": "a"', "a"),
        (b'{"request_id": "a", "pad": "' + b"x" * LARGE + b'", "request_id": "a"', "a"),
        (b'{"request_id": "a", "pad": "' + b"x" * LARGE + b'", "request_id": "b"', None),
        (b'{"pad": "' + b"x" * LARGE + b'", "request_id": "a", "end": "' + b"x" * LARGE, None),
        (b'"request_id": "' * (LARGE // 15), None),
        (b'"request_id": "' + b'\\"' * (LARGE // 2), None),
        (b'"request_id"' + b" " * LARGE, None),
        (b"".join(b'"request_id": "%d\x01"' % n for n in range(LARGE // 20)), None),
    ],
    ids=["first", "last", "both", "two", "middle", "many", "open", "spaces", "damaged"],
)
def test_id_of_a_large_message_is_found_in_little_memory(message: bytes, expected: str | None) -> None:
    """Only the beginning and the end are searched, so 8 MiB take less than 2 MB."""
    tracemalloc.start()
    try:
        assert find_text(message, "request_id") == expected
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("place", [SEARCHED_BYTES - 20, SEARCHED_BYTES, 2 * SEARCHED_BYTES - 60])
def test_id_is_found_anywhere_in_a_short_message(place: int) -> None:
    """A message of twice the searched length is searched as a whole, also where the two parts meet."""
    message = b"x" * place + b'"correlation_id": "c"'
    assert find_text(message + b"x" * (2 * SEARCHED_BYTES - len(message)), "correlation_id") == "c"


def test_message_with_many_ids_has_none() -> None:
    """Beyond MOST_CANDIDATES different texts, none is tried, even if only one is valid."""
    invalid = b"".join(b'"request_id": "\\ud800%d" ' % n for n in range(MOST_CANDIDATES - 1))
    assert find_text(invalid + b'"request_id": "a"', "request_id") == "a"
    assert find_text(invalid + b'"request_id": "\\ud800", "request_id": "a"', "request_id") is None
