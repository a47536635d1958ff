"""Write docs/schemas/: the Kafka messages as JSON Schema, and the service's side of Kafka as AsyncAPI.

    python scripts/write_schemas.py

Fields, defaults and topics come from models.py, config.py and kafka/records.py, examples and descriptions of topics from here.

A new version may add optional fields, and codes to enumerations. So the schemas allow fields that they do not name, and in
responses each enumeration except `status` is open: one of the known values, or another text.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from config import VERSION, Settings
from errors import ImageNotFound
from latent_encoder.kafka import records as kafka_records
from latent_encoder.requests import parse_request
from models import (
    EncodeRequest,
    ErrorResponse,
    Metadata,
    ResponseMessage,
    SuccessResponse,
    Timings,
    utc_timestamp,
)

FOLDER = PROJECT / "docs" / "schemas"
REQUEST = "request.schema.json"
RESPONSE = "response.schema.json"
ASYNCAPI = "asyncapi.yaml"

ENVELOPE = ("request_id", "correlation_id", "status", "timestamp")
"""The fields of a response's record that both outcomes have."""
IF_THERE = ("preview_path", "roundtrip_path")
"""The fields that are absent instead of null."""

Document = dict[str, Any]

DEFAULTS = Settings.model_construct()  # the defaults, even if the environment has other values
NULL = {"type": "null"}
KAFKA_BINDING = {"bindingVersion": "0.5.0"}

RESPONDED_AT = datetime(2024, 11, 6, 12, tzinfo=UTC)
GIVEN: Document = {
    "request_id": "0b9e3a52-5a1e-4f57-9c1c-0c6f7d1d3f0e",
    "correlation_id": "workflow-7f2d",
    "image_path": "/path/to/masked_person.jpg",
    "output_dir": "/path/to/output",
    "timestamp": 1730894395,
}
EXAMPLE_REQUEST = parse_request(GIVEN, {}).model_dump() | GIVEN

# The headers that are added to a dead letter. All are text in UTF-8, numbers in decimal digits.
DLQ_HEADERS = {
    kafka_records.ERROR_CODE: "Code of the error.",
    kafka_records.ERROR_MESSAGE: "Fault, the file or field, and how to fix it.",
    kafka_records.ERROR_CLASS: "Python class of the exception that caused it.",
    kafka_records.ORIGINAL_TOPIC: "Topic that the record was consumed from.",
    kafka_records.ORIGINAL_PARTITION: "Its partition there.",
    kafka_records.ORIGINAL_OFFSET: "Its offset there.",
    kafka_records.ORIGINAL_TIMESTAMP: "Its timestamp there, in milliseconds of Unix time; empty if it has none.",
    kafka_records.GROUP: "Consumer group of the service.",
    kafka_records.ATTEMPTS: "Number of attempts to encode it, those before a replay included; 0 if it never came to that.",
    kafka_records.SERVICE_VERSION: "Version of the service.",
}
REPLAY_HEADERS = {
    kafka_records.REQUEST_ID: "Id of the request, if it is known.",
    kafka_records.REPLAYS: "Number of replays; absent before the first.",
    kafka_records.REPLAY_OF: "Topic, partition and offset of the dead letter that was replayed; absent before the first.",
}

# The headers of a dead letter that its topic refused for its size.
OMISSIONS = {
    kafka_records.VALUE_OMITTED: "Bytes of the value, which is left out.",
    kafka_records.KEY_OMITTED: "Bytes of the key, which is left out.",
    kafka_records.HEADERS_OMITTED: "Bytes of the record's headers, which are left out; `unreadable` if a name is not UTF-8.",
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in documents().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"{FOLDER.relative_to(PROJECT) / name} written")


def documents() -> dict[str, str]:
    """Return the text of each file by its name."""
    return {REQUEST: as_json(request_schema()), RESPONSE: as_json(response_schema()), ASYNCAPI: as_yaml(asyncapi())}


def as_json(document: Document) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def as_yaml(document: Document) -> str:
    return "# Written by scripts/write_schemas.py.\n" + yaml.safe_dump(
        document, sort_keys=False, allow_unicode=True, width=120
    )


class UntitledFields(GenerateJsonSchema):
    """A generator without titles of fields, which would only repeat their names, and with arrays that every tool reads."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False

    def tuple_schema(self, schema: Any) -> Document:
        """Return the schema of an array of a fixed length by `items`: many tools do not read `prefixItems`."""
        made = super().tuple_schema(schema)
        items = made.get("prefixItems")
        if not items or items.count(items[0]) < len(items):
            return made
        del made["prefixItems"]
        return {**made, "items": items[0]}


def request_schema() -> Document:
    """Return the schema of the fields that `requests.parse_request` accepts."""
    schema = EncodeRequest.model_json_schema(schema_generator=UntitledFields)
    for name in schema["properties"].keys() - schema["required"]:
        schema["properties"][name] = or_null(schema["properties"][name])
    schema["description"] += " Null counts as absent. The service's settings can change the defaults."
    head = {"$schema": GenerateJsonSchema.schema_dialect, "$id": identifier("request")}
    head |= {key: schema[key] for key in ("title", "description", "type", "required", "properties")}
    return {**head, **schema, "examples": [EXAMPLE_REQUEST]}


def or_null(schema: Document) -> Document:
    """Return the schema of a field that may also be null; its description and default stay in front."""
    if NULL in schema.get("anyOf", ()):
        return schema
    notes = {key: value for key, value in schema.items() if key in ("description", "default")}
    restrictions = {key: value for key, value in schema.items() if key not in notes}
    return {**notes, "anyOf": [restrictions, NULL]}


def response_schema() -> Document:
    """Return the schema of a response: a success or an error, told apart by `status`."""
    both = ResponseMessage.model_json_schema(mode="serialization", schema_generator=UntitledFields)
    parts = {name: opened(part) for name, part in both["$defs"].items()}
    outcomes = {
        "SuccessMessage": outcome(both, SuccessResponse, "success"),
        "ErrorMessage": outcome(both, ErrorResponse, "error"),
    }
    del parts["ErrorCode"]
    responses = (example_success(), example_error())
    messages = (ResponseMessage.of(response, EXAMPLE_REQUEST["correlation_id"], RESPONDED_AT) for response in responses)
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "$id": identifier("response"),
        "title": "Response",
        "description": "Response to a request, as a record of the response topic. Accept fields and codes that are not listed "
        "here: a newer version may add some.",
        "oneOf": [{"$ref": f"#/$defs/{name}"} for name in outcomes],
        "$defs": {**outcomes, **parts},
        "examples": [message.model_dump(mode="json") for message in messages],
    }


def outcome(both: Document, response: type[BaseModel], status: str) -> Document:
    """Return the schema of one outcome's record: its own fields without null, and those of the other one as null alone.

    `both` is the schema of the record's class, `response` the class of the outcome.
    """
    own = {*ENVELOPE, *response.model_fields}
    fields: dict[str, Document] = {}
    for name, field in both["properties"].items():
        if name in own:
            fields[name] = without_null(inlined(field, both)) if name != "correlation_id" else field
        elif name not in IF_THERE:
            fields[name] = {"type": "null", "description": f"Null in a response with the status `{status}`."}
    fields["status"] = {"type": "string", "const": status, "description": "Outcome of the request."}
    return opened(
        {
            "title": f"{status.capitalize()}Message",
            "description": (response.__doc__ or "").partition("\n")[0],
            "type": "object",
            "required": [name for name in fields if name not in IF_THERE],
            "properties": fields,
        }
    )


def without_null(field: Document) -> Document:
    """Return the schema of a field whose value is never null."""
    kept = {key: value for key, value in field.items() if key != "default"}
    options = [option for option in kept.pop("anyOf", []) if option != NULL]
    return {**kept, **options[0]} if len(options) == 1 else {**kept, **({"anyOf": options} if options else {})}


def inlined(field: Document, both: Document) -> Document:
    """Return the schema of a field with the error codes in it instead of a reference to them."""
    code = {key: value for key, value in both["$defs"]["ErrorCode"].items() if key in ("type", "enum")}
    options = [code if option.get("$ref") == "#/$defs/ErrorCode" else option for option in field.get("anyOf", [])]
    return {**field, "anyOf": options} if options else field


def opened(schema: Document) -> Document:
    """Return the schema without defaults, and with open enumerations: also values that a later version adds are valid."""
    schema = {key: value for key, value in schema.items() if key != "default"}
    if "enum" in schema:
        known = {key: schema.pop(key) for key in ("type", "enum")}
        return {**schema, "anyOf": [known, {"type": "string", "description": "A value that a later version adds."}]}
    return {key: opened_parts(value) for key, value in schema.items()}


def opened_parts(value: Any) -> Any:
    """Return a part of a schema with each schema in it `opened`."""
    if isinstance(value, dict):
        return opened(value)
    return [opened_parts(part) for part in value] if isinstance(value, list) else value


def identifier(name: str) -> str:
    """Return the `$id` of a schema, which has the version of the service."""
    return f"urn:latent-encoder:{name}:{VERSION}"


def example_success() -> SuccessResponse:
    """Return the response to the example request, for a square JPEG of one megapixel."""
    request = parse_request(EXAMPLE_REQUEST, {})
    files = f"masked_person_{request.request_id}"
    timings = Timings(load_vae=0.1, load_image=12.4, scale=9.8, encode=402.5, save=25.2)
    return SuccessResponse(
        request_id=request.request_id,
        latent_file_path=f"{request.output_dir}/latent_{files}.pt",
        latent_shape=(1, 16, 128, 128),
        scaled_image_path=f"{request.output_dir}/scaled_image_{files}.png",
        metadata=Metadata(
            original_image_shape=(1024, 1024, 3),
            scaled_image_shape=(1024, 1024, 3),
            latent_shape=(1, 16, 128, 128),
            vae_model_name=request.vae_model_name,
            image_path=request.image_path,
            processing_time_ms=450,
            timestamp=utc_timestamp(RESPONDED_AT),
            timings_ms=timings,
            upscale_method=request.upscale_method,
            megapixels=request.megapixels,
            crop=(0, 0, 1024, 1024),
            image_notes=(),
            latent_dtype="float32",
            vae_dtype="bfloat16",
            encoder="single-frame",
            tiled=False,
            device="cuda:0",
            comfyui_version="0.3.75",
            image_decoder="Pillow 13.0.0, libjpeg-turbo 3.2.0",
            torch_version="2.14.1+cu130",
            image_sha256=example_checksum("image"),
            vae_sha256=example_checksum("vae"),
            latent_sha256=example_checksum("latent"),
            scaled_image_sha256=example_checksum("scaled image"),
            fingerprint=example_checksum("fingerprint"),
        ),
    )


def example_error() -> ErrorResponse:
    """Return the response to the example request if its image does not exist."""
    request = parse_request(EXAMPLE_REQUEST, {})
    return ErrorResponse.of(ImageNotFound(f"Image file not found: {request.image_path}"), request.request_id, RESPONDED_AT)


def example_checksum(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def asyncapi() -> Document:
    """Return the service's side of its three topics. The names of topics and group are the defaults of the settings."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Latent Encoder",
            "version": VERSION,
            "description": "Encodes images to the latent space of diffusion models, with ComfyUI's own nodes. "
            "The names of topics and consumer group are the defaults; the service's settings can change them.",
            "license": {"name": "MIT"},
        },
        "defaultContentType": "application/json",
        "channels": {
            "requests": channel(DEFAULTS.kafka_request_topic, "Requests to encode an image.", request=request_message()),
            "responses": channel(
                DEFAULTS.kafka_response_topic,
                "The responses to the requests.",
                success=response_message("SuccessMessage", "Success", "The latent is written."),
                error=response_message("ErrorMessage", "Error", "There is no latent."),
            ),
            "deadLetters": channel(
                DEFAULTS.kafka_dlq_topic, "Records that the service could not process.", deadLetter=dead_letter_message()
            ),
        },
        "operations": {
            "encode": {
                **operation(
                    "receive",
                    "requests",
                    "Encode an image, and respond. The offset of the request is committed after the response.",
                    "request",
                ),
                "reply": reply("responses", "success", "error"),
            },
            "sendDeadLetter": operation(
                "send",
                "deadLetters",
                "Put aside a record that holds no request, one that failed for a transient reason and is not tried again, "
                "or one whose response was refused for its size.",
                "deadLetter",
            ),
        },
    }


def channel(topic: str, description: str, **messages: Document) -> Document:
    return {"address": topic, "description": description, "messages": messages}


def operation(action: str, channel: str, description: str, *messages: str) -> Document:
    described = {"action": action, **reply(channel, *messages), "description": description}
    if action == "receive":
        group = {"type": "string", "const": DEFAULTS.kafka_consumer_group}
        described["bindings"] = {"kafka": {"groupId": group, **KAFKA_BINDING}}
    return described


def reply(channel: str, *messages: str) -> Document:
    """Return the references to a channel and to messages in it."""
    return {
        "channel": {"$ref": f"#/channels/{channel}"},
        "messages": [{"$ref": f"#/channels/{channel}/messages/{message}"} for message in messages],
    }


def request_message() -> Document:
    limit = DEFAULTS.kafka_max_message_bytes
    return json_message(
        REQUEST,
        title="Request",
        description=f"A JSON object in UTF-8 of at most {limit} bytes, unless `KAFKA_MAX_MESSAGE_BYTES` sets another limit.",
        headers="Any; they come back in the response.",
        key="Any or none; it comes back as the key of the response.",
    )


def response_message(schema: str, title: str, description: str) -> Document:
    return json_message(
        f"{RESPONSE}#/$defs/{schema}",
        title=title,
        description=description,
        headers="Those of the request.",
        key="That of the request, or the response's `request_id` if the request has none.",
    )


def json_message(schema: str, *, title: str, description: str, headers: str, key: str) -> Document:
    return {
        "title": title,
        "description": description,
        "contentType": "application/json",
        "correlationId": {"location": "$message.payload#/correlation_id"},
        "headers": {"type": "object", "description": headers},
        "payload": {"$ref": f"./{schema}"},
        "bindings": kafka_key(key),
    }


def dead_letter_message() -> Document:
    descriptions = DLQ_HEADERS | REPLAY_HEADERS | OMISSIONS
    added = {name: {"type": "string", "description": meaning} for name, meaning in descriptions.items()}
    return {
        "title": "Dead letter",
        "description": "A record of the request topic, unchanged, with headers that state the reason and its former place.",
        "contentType": "application/octet-stream",
        "headers": {
            "type": "object",
            "description": "Those of the record, untouched, and these after them: UTF-8, numbers in decimal digits.",
            "required": list(DLQ_HEADERS),
            "properties": added,
        },
        "payload": {"description": "The value of the record, byte for byte; none if it has none."},
        "bindings": kafka_key("That of the record."),
    }


def kafka_key(description: str) -> Document:
    return {"kafka": {"key": {"description": description}, **KAFKA_BINDING}}


if __name__ == "__main__":
    main()
