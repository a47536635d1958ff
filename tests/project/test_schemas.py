"""The committed schemas: the code writes the same ones, and accepts and refuses the same requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from config import VERSION, Settings
from errors import ErrorCode, InvalidRequest, RequestError
from latent_encoder.kafka.records import DLQ_HEADERS, OMISSIONS, REPLAY_HEADERS, Incoming, response_record
from latent_encoder.requests import parse_request
from models import (
    MAX_MEGAPIXELS,
    MIN_MEGAPIXELS,
    EncodeRequest,
    ErrorResponse,
    ImageNote,
    LatentStatistics,
    Response,
    ResponseMessage,
    Roundtrip,
    UpscaleMethod,
)
from scripts.write_schemas import (
    ASYNCAPI,
    FOLDER,
    IF_THERE,
    REQUEST,
    RESPONDED_AT,
    RESPONSE,
    documents,
    example_error,
    example_success,
)

REQUEST_SCHEMA = json.loads((FOLDER / REQUEST).read_text(encoding="utf-8"))
RESPONSE_SCHEMA = json.loads((FOLDER / RESPONSE).read_text(encoding="utf-8"))
REQUESTS = Draft202012Validator(REQUEST_SCHEMA)
RESPONSES = Draft202012Validator(RESPONSE_SCHEMA)
SERVICE = yaml.safe_load((FOLDER / ASYNCAPI).read_text(encoding="utf-8"))
IMAGE = {"image_path": "photo.jpg"}
OPTIONAL = sorted(EncodeRequest.model_fields.keys() - IMAGE.keys())


def is_accepted(fields: dict[str, Any]) -> bool:
    try:
        parse_request(fields, {})
    except InvalidRequest:
        return False
    return True


@pytest.mark.parametrize(("name", "text"), documents().items())
def test_committed_files_are_what_the_command_writes(name: str, text: str) -> None:
    """Each committed file is the output of the command, character for character."""
    assert (FOLDER / name).read_text(encoding="utf-8") == text, "run: .venv/bin/python scripts/write_schemas.py"


def test_nothing_else_is_committed_there() -> None:
    """Each file in the folder is one that the command writes."""
    assert {path.name for path in FOLDER.iterdir()} == documents().keys()


@pytest.mark.parametrize("schema", [REQUEST_SCHEMA, RESPONSE_SCHEMA], ids=[REQUEST, RESPONSE])
def test_schemas_are_valid_and_so_are_their_examples(schema: dict[str, Any]) -> None:
    """Each schema is valid in the dialect that it names, and so is each of its examples."""
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema)
    for example in schema["examples"]:
        Draft202012Validator(schema).validate(example)


def test_example_request_shows_every_field_and_is_accepted() -> None:
    """The example request has every field, and the service accepts it."""
    (example,) = REQUEST_SCHEMA["examples"]
    assert example.keys() == EncodeRequest.model_fields.keys()
    assert is_accepted(example)


def test_example_responses_are_both_outcomes() -> None:
    """The example responses are a success and an error, each as the service writes it."""
    examples = RESPONSE_SCHEMA["examples"]
    assert [example["status"] for example in examples] == ["success", "error"]
    for example in examples:
        message = ResponseMessage.model_validate_json(json.dumps(example))
        assert json.loads(message.model_dump_json()) == example


def test_defaults_are_the_requests() -> None:
    """The schema states the defaults that a request gets, except the id, which is made anew for each request."""
    properties = REQUEST_SCHEMA["properties"]
    stated = {name: field["default"] for name, field in properties.items() if "default" in field}
    request = parse_request(IMAGE, {})
    assert stated == request.model_dump(exclude={"image_path", "request_id"})


@pytest.mark.parametrize("fields", [IMAGE, {**IMAGE, "priority": 7}, *({**IMAGE, name: None} for name in OPTIONAL)])
def test_only_the_image_is_required(fields: dict[str, Any]) -> None:
    """Schema and service accept absent, null and unknown fields beside the image."""
    assert is_accepted(fields)
    REQUESTS.validate(fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_path", " "),
        ("vae_model_name", "sub/vae.safetensors"),
        ("vae_model_name", "..."),
        ("vae_model_name", "a..b/..c/d.."),
        ("vae_model_name", "./vae.safetensors"),
        ("upscale_method", "nearest-exact"),
        ("megapixels", MIN_MEGAPIXELS),
        ("megapixels", 1),
        ("megapixels", MAX_MEGAPIXELS),
        ("output_dir", "../output"),
        ("request_id", "a/../b"),
        ("correlation_id", ""),
        ("timestamp", 1730894395),
        ("timestamp", -0.5),
    ],
)
def test_good_value_is_accepted_by_both(field: str, value: object) -> None:
    """A valid value is accepted by the schema and by the service."""
    fields = {**IMAGE, field: value}
    assert is_accepted(fields)
    REQUESTS.validate(fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_path", None),
        ("image_path", ""),
        ("image_path", 7),
        ("image_path", "nul\0byte.png"),
        ("image_path", "line\n\0"),
        ("vae_model_name", ""),
        ("vae_model_name", "nul\0byte"),
        ("vae_model_name", "/models/vae.safetensors"),
        ("vae_model_name", ".."),
        ("vae_model_name", "../vae.safetensors"),
        ("vae_model_name", "sub/.."),
        ("vae_model_name", "sub//../../vae.safetensors"),
        ("vae_model_name", "line\n/../vae.safetensors"),
        ("upscale_method", "Lanczos"),
        ("megapixels", MIN_MEGAPIXELS / 2),
        ("megapixels", MAX_MEGAPIXELS + 1),
        ("megapixels", "1.0"),
        ("megapixels", True),
        ("output_dir", ""),
        ("output_dir", "nul\0byte"),
        ("request_id", ""),
        ("request_id", 42),
        ("correlation_id", 42),
        ("timestamp", "2024-11-06T12:00:00Z"),
        ("timestamp", False),
    ],
)
def test_bad_value_is_refused_by_both(field: str, value: object) -> None:
    """A value that is not valid is refused by the schema and by the service."""
    fields = {**IMAGE, field: value}
    assert not is_accepted(fields)
    assert not REQUESTS.is_valid(fields)


def test_request_without_image_is_refused_by_both() -> None:
    """A request without an image is refused by the schema and by the service."""
    assert not is_accepted({})
    assert not REQUESTS.is_valid({})


# No newline: in Python, the `$` of a pattern also matches before a newline at the end, which it does not in JSON Schema.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\n"))
paths = st.lists(st.sampled_from(["", ".", "..", "...", "a", "..a", "\0"]), max_size=3).map("/".join)
numbers = st.integers(-1, 20) | st.floats(0, 20) | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
methods = st.sampled_from(get_args(UpscaleMethod))
values = st.none() | st.booleans() | numbers | texts | paths | methods | st.lists(texts, max_size=1)
names = st.sampled_from([*EncodeRequest.model_fields, "priority"])


@settings(max_examples=1000)
@given(st.dictionaries(names, values, max_size=2))
def test_schema_and_service_agree(fields: dict[str, Any]) -> None:
    """Schema and service both accept or both refuse a request, whatever one or two of its fields hold."""
    request = {**IMAGE, **fields}
    assert REQUESTS.is_valid(request) == is_accepted(request)


def written(response: Response) -> Any:
    """Return the content of the record of a response."""
    record = Incoming("requests", partition=0, offset=0, timestamp=None, key=None, value=None, headers=())
    value = response_record(record, ResponseMessage.of(response, None, RESPONDED_AT), "responses").value
    assert value is not None
    return json.loads(value)


@pytest.mark.parametrize("error", RequestError.__subclasses__())
def test_every_error_response_validates(error: type[RequestError]) -> None:
    """An error response with any code is valid by its schema."""
    RESPONSES.validate(written(ErrorResponse.of(error("Went wrong."), "id", RESPONDED_AT)))


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"vae_sha256": None},
        {"image_notes": ("alpha_dropped",)},
        {"latent_space": "SD15", "latent_statistics": LatentStatistics(mean=(0.0,) * 4, std=(5.49,) * 4)},
        {"roundtrip": Roundtrip(psnr_db=None, ssim=0.5, image_sha256="0" * 64), "preview_sha256": "f" * 64},
    ],
)
def test_every_success_response_validates(changed: dict[str, Any]) -> None:
    """A success response is valid by its schema, also without a VAE file and with notes."""
    success = example_success()
    metadata = success.metadata.model_copy(update=changed)
    RESPONSES.validate(written(success.model_copy(update={"metadata": metadata})))


@pytest.mark.parametrize("name", sorted(ResponseMessage.model_fields.keys() - IF_THERE))
@pytest.mark.parametrize("status", ["success", "error"])
def test_no_field_of_a_response_is_ever_absent(status: str, name: str) -> None:
    """A response without one of its fields is not valid; a field that does not apply is null."""
    response = written(example_success() if status == "success" else example_error())
    del response[name]
    assert not RESPONSES.is_valid(response)


@pytest.mark.parametrize("name", sorted(IF_THERE))
def test_path_of_an_image_that_was_not_asked_for_is_absent(name: str) -> None:
    """The paths of preview and roundtrip image stand in a success that has the file, and nowhere else; they are never null."""
    success = example_success()
    drawn = written(success.model_copy(update={name: "/output/drawn.png"}))
    assert drawn[name] == "/output/drawn.png"
    RESPONSES.validate(drawn)
    assert not RESPONSES.is_valid({**drawn, name: None})
    assert name not in written(success)
    assert name not in written(example_error())


@pytest.mark.parametrize("name", ["latent_file_path", "latent_shape", "scaled_image_path", "metadata"])
def test_outcomes_do_not_mix(name: str) -> None:
    """A success without its files, or an error with one, is not valid."""
    success, error = written(example_success()), written(example_error())
    assert not RESPONSES.is_valid({**success, name: None})
    assert not RESPONSES.is_valid({**error, name: success[name]})
    assert not RESPONSES.is_valid({**success, "status": "error"})
    assert not RESPONSES.is_valid({**error, "status": "success"})
    assert not RESPONSES.is_valid({**error, "status": "pending"})


def test_additions_of_a_later_version_are_valid() -> None:
    """Unknown fields, codes, notes and methods in a response are valid, as API.md promises."""
    error = written(example_error())
    RESPONSES.validate({**error, "error_code": "TOMORROWS_CODE", "hint": "none"})
    success = written(example_success())
    metadata = {**success["metadata"], "image_notes": ["tomorrows_note"], "upscale_method": "sinc", "more": {"a": 1}}
    RESPONSES.validate({**success, "metadata": metadata})
    assert not RESPONSES.is_valid({**error, "error_code": 7})


def schemas_in(node: Any) -> Iterator[dict[str, Any]]:
    """Yield the schema of every field, at any depth."""
    if isinstance(node, dict):
        yield from node.get("properties", {}).values()
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from schemas_in(child)


@pytest.mark.parametrize("schema", [REQUEST_SCHEMA, RESPONSE_SCHEMA], ids=[REQUEST, RESPONSE])
def test_every_field_is_described(schema: dict[str, Any]) -> None:
    """Each field has a description of at least two words, and each object too."""
    fields = list(schemas_in(schema))
    assert len(fields) > 10
    assert [field for field in fields if " " not in field.get("description", "")] == []
    assert all(part["description"] for part in schema.get("$defs", {}).values())


@pytest.mark.parametrize(("schema", "name"), [(REQUEST_SCHEMA, "request"), (RESPONSE_SCHEMA, "response")])
def test_id_has_the_version(schema: dict[str, Any], name: str) -> None:
    """The `$id` of each schema is a URN with the version of the service."""
    assert schema["$id"] == f"urn:latent-encoder:{name}:{VERSION}"


def test_forms_of_texts_are_marked() -> None:
    """Checksums have a pattern, and times the format of a date."""
    fields = [pair for part in RESPONSE_SCHEMA["$defs"].values() for pair in part["properties"].items()]
    checksums = [json.dumps(field) for name, field in fields if name.endswith("sha256") or name == "fingerprint"]
    assert len(checksums) == 7
    assert [field for field in checksums if '"^[0-9a-f]{64}$"' not in field] == []
    assert RESPONSE_SCHEMA["$defs"]["Metadata"]["properties"]["timestamp"]["format"] == "date-time"
    success = written(example_success())
    assert not RESPONSES.is_valid({**success, "metadata": {**success["metadata"], "latent_sha256": "none"}})


@pytest.mark.parametrize(("field", "known"), [("error_code", ErrorCode), ("image_notes", get_args(ImageNote))])
def test_codes_are_listed(field: str, known: Any) -> None:
    """The schema lists every code that this version has, in its order."""
    parts = RESPONSE_SCHEMA["$defs"]
    schema = parts["ErrorMessage" if field == "error_code" else "Metadata"]["properties"][field]
    assert schema.get("items", schema)["anyOf"][0]["enum"] == list(known)


def references(node: Any) -> Iterator[str]:
    """Yield every `$ref` in a document."""
    if isinstance(node, dict):
        yield from [node["$ref"]] if "$ref" in node else []
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from references(child)


def resolved(reference: str) -> Any:
    """Return the target of a reference in the AsyncAPI document."""
    file, _, pointer = reference.partition("#")
    node = json.loads((FOLDER / file).read_text(encoding="utf-8")) if file else SERVICE
    for name in pointer.split("/")[1:]:
        node = node[name]
    return node


def test_asyncapi_has_what_version_3_requires() -> None:
    """The document has its version, a title and version of the service, and an action, channel and messages per operation."""
    assert SERVICE["asyncapi"] == "3.0.0"
    assert (SERVICE["info"]["title"], SERVICE["info"]["version"]) == ("Latent Encoder", VERSION)
    for operation in SERVICE["operations"].values():
        assert operation["action"] in {"send", "receive"}
        channel = operation["channel"]["$ref"]
        assert all(message["$ref"].startswith(f"{channel}/messages/") for message in operation["messages"])


def test_references_lead_somewhere() -> None:
    """Each reference in the AsyncAPI document has a target, in the document or in a schema."""
    found = set(references(SERVICE))
    payloads = {f"./{REQUEST}", *(f"./{RESPONSE}#/$defs/{name}" for name in ("SuccessMessage", "ErrorMessage"))}
    assert payloads < found
    assert all(isinstance(resolved(reference), dict) for reference in found)


def test_operations_are_the_services() -> None:
    """The service receives from one topic in its group, replies to one and sends to one, with the settings' default names."""
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    operations = SERVICE["operations"].values()
    assert [(each["action"], resolved(each["channel"]["$ref"])["address"]) for each in operations] == [
        ("receive", defaults["kafka_request_topic"]),
        ("send", defaults["kafka_dlq_topic"]),
    ]
    (replies,) = [each["reply"] for each in operations if "reply" in each]
    assert resolved(replies["channel"]["$ref"])["address"] == defaults["kafka_response_topic"]
    assert [resolved(message["$ref"])["title"] for message in replies["messages"]] == ["Success", "Error"]
    groups = [each["bindings"]["kafka"]["groupId"]["const"] for each in operations if each["action"] == "receive"]
    assert groups == [defaults["kafka_consumer_group"]]


@pytest.mark.parametrize(("channel", "message"), [("requests", "request"), ("responses", "success"), ("responses", "error")])
def test_correlation_id_is_where_asyncapi_says(channel: str, message: str) -> None:
    """The correlation id of each message is a field of the payload's schema."""
    described = SERVICE["channels"][channel]["messages"][message]
    name = described["correlationId"]["location"].removeprefix("$message.payload#/")
    assert name in resolved(described["payload"]["$ref"])["properties"]


def test_every_dead_letter_header_is_described() -> None:
    """The dead letter's headers are described in their order; those of a replay and of omitted parts are not required."""
    headers = SERVICE["channels"]["deadLetters"]["messages"]["deadLetter"]["headers"]
    assert tuple(headers["properties"]) == DLQ_HEADERS + REPLAY_HEADERS + OMISSIONS
    assert tuple(headers["required"]) == DLQ_HEADERS
